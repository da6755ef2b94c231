"""The engine on vLLM, against a stand-in of vLLM's modules: there is no GPU here.

What the stand-in takes and tells is that of vLLM 0.29.0, the version that Ray 2.60's extra `llm`
takes: names of arguments, kinds of errors and what a cancelled request does are from its
`engine/arg_utils.py`, `sampling_params.py`, `inputs/engine.py`, `outputs.py`, `exceptions.py`,
`v1/engine/async_llm.py` and `v1/engine/exceptions.py`. Anything else is an error here.
"""

# ruff: noqa: ANN401, ARG002, ARG003 - the stand-in's arguments are vLLM's, used here or not.

import asyncio
import enum
import json
import sys
import types
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any

import llguidance
import llguidance.hf
import pytest

from raytune_llama.config import ConfigError
from raytune_llama.serve.engine.base import Generation, Step
from raytune_llama.serve.engine.grammar import Grammars
from raytune_llama.serve.engine.sampling import Sampling
from raytune_llama.serve.engine.vllm import VllmEngine, choose_engine
from raytune_llama.serve.errors import BusyError, EngineError
from raytune_llama.serve.models import ServedModel

SAMPLING = """
    n presence_penalty frequency_penalty repetition_penalty temperature top_p top_k min_p seed stop
    stop_token_ids ignore_eos max_tokens min_tokens logprobs prompt_logprobs logprob_token_ids
    flat_logprobs detokenize skip_special_tokens spaces_between_special_tokens
    include_stop_str_in_output output_kind stream_interval skip_clone output_text_buffer_length
    structured_outputs logit_bias allowed_token_ids extra_args bad_words skip_reading_prefix_cache
    thinking_token_budget repetition_detection routed_experts_prompt_start trace_decode_token_ids
"""
FORMS = """
    json regex choice grammar json_object disable_any_whitespace disable_additional_properties
    whitespace_pattern structural_tag
"""
ENGINE = """
    model tokenizer skip_tokenizer_init trust_remote_code load_format dtype seed max_model_len
    tensor_parallel_size enable_prefix_caching gpu_memory_utilization max_num_batched_tokens
    max_num_seqs max_logprobs logprobs_mode disable_log_stats enforce_eager enable_chunked_prefill
    structured_outputs_config generation_config override_generation_config enable_log_requests
"""
STRUCTURED = """
    backend disable_any_whitespace disable_additional_properties reasoning_parser
    reasoning_parser_plugin enable_in_reasoning
"""


def taking(names: str) -> type:
    """Return a class that takes these arguments by name, and no other."""
    known = set(names.split())

    class Taken:
        def __init__(self, **given: object) -> None:
            if unknown := set(given) - known:
                raise TypeError(f"unexpected keyword arguments {sorted(unknown)}")
            self.given = given

    return Taken


class ClientError(Exception):
    """`vllm.exceptions.VLLMClientError`, above all that is wrong with a request."""


class ServerError(Exception):
    """`vllm.exceptions.VLLMServerError`."""


class DeadError(ServerError):
    """`EngineDeadError`: raised to all that wait."""


class GenerateError(ServerError):
    """`EngineGenerateError`: raised to one."""


class OutputKind(enum.Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class Output:
    """`CompletionOutput`."""

    token_ids: list[int]
    finish_reason: str | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    index: int = 0
    text: str = ""


@dataclass
class Answer:
    """`RequestOutput`."""

    outputs: list[Output]
    finished: bool = False


class Async:
    """`AsyncLLM`, as far as our engine knows it; answers are told by the test."""

    def __init__(self, arguments: Any) -> None:
        self.arguments = arguments.given
        self.asked: list[tuple[Any, dict[str, Any], str]] = []
        self.aborted: list[str] = []
        self.told: list[Answer | Exception] = []
        self.errored, self.dead_error, self.is_shut = False, DeadError("EngineCore"), False

    @classmethod
    def from_engine_args(cls, engine_args: Any, start_engine_loop: bool = True) -> "Async":  # noqa: FBT001, FBT002
        return cls(engine_args)

    async def generate(
        self,
        prompt: Mapping[str, Any],
        sampling_params: Any,
        request_id: str,
        *,
        prompt_text: str | None = None,
        lora_request: Any = None,
    ) -> AsyncGenerator[Answer, None]:
        self.asked.append((prompt, sampling_params.given, request_id))
        try:
            for answer in self.told:
                await asyncio.sleep(0)
                if isinstance(answer, Exception):
                    raise answer
                yield answer
                if answer.finished:
                    return
            await asyncio.Event().wait()
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted.append(request_id)
            raise

    def shutdown(self, timeout: float | None = None) -> None:
        self.is_shut = True


@dataclass
class Standin:
    """What of vLLM a test may look at."""

    engine: VllmEngine
    vllm: Async
    steps: list[Step] = field(default_factory=list)

    def ask(self, generation: Generation) -> list[Step]:
        """Return the steps up to the last one."""

        async def main() -> None:
            async for step in self.engine.generate(generation):
                self.steps.append(step)

        asyncio.run(main())
        return self.steps


def module(name: str, **contents: object) -> types.ModuleType:
    made = types.ModuleType(name)
    vars(made).update(contents)
    return made


@pytest.fixture
def vllm_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    def tokens_input(
        prompt_token_ids: list[int], *, prompt: str | None = None, cache_salt: str | None = None
    ) -> dict[str, Any]:
        return {"type": "token", "prompt_token_ids": prompt_token_ids}

    for made in (
        module("vllm"),
        module("vllm.config", StructuredOutputsConfig=taking(STRUCTURED)),
        module("vllm.engine"),
        module("vllm.engine.arg_utils", AsyncEngineArgs=taking(ENGINE)),
        module("vllm.exceptions", VLLMClientError=ClientError),
        module("vllm.inputs", tokens_input=tokens_input),
        module(
            "vllm.sampling_params",
            SamplingParams=taking(SAMPLING),
            StructuredOutputsParams=taking(FORMS),
            RequestOutputKind=OutputKind,
        ),
        module("vllm.v1"),
        module("vllm.v1.engine"),
        module("vllm.v1.engine.async_llm", AsyncLLM=Async),
        module(
            "vllm.v1.engine.exceptions",
            EngineDeadError=DeadError,
            EngineGenerateError=GenerateError,
        ),
    ):
        monkeypatch.setitem(sys.modules, made.__name__, made)


def build(*, num_rows: int = 400, max_waiting: int = 1) -> Standin:
    engine = VllmEngine(
        "/models/tiny",
        precision="bf16",
        num_slots=2,
        max_waiting=max_waiting,
        max_context=100,
        num_tokens=400,
        num_rows=num_rows,
    )
    vllm: Any = engine._engine  # the stand-in
    return Standin(engine, vllm)


@pytest.fixture
def standin(vllm_modules: None) -> Standin:
    return build()


def tokens_of(steps: list[Step]) -> list[int]:
    return [step.choice.token for step in steps]


def test_model_is_loaded_from_its_directory_and_runs_no_code_of_it(standin: Standin) -> None:
    told = standin.vllm.arguments
    assert told["model"] == "/models/tiny"
    assert [told["dtype"], told["max_model_len"], told["max_num_seqs"]] == ["bfloat16", 100, 2]
    assert told["trust_remote_code"] is False
    assert told["load_format"] == "safetensors"


def test_request_becomes_ids_and_settings_and_tokens_come_one_by_one(standin: Standin) -> None:
    standin.vllm.told = [
        Answer([Output([7])]),
        Answer([Output([8, 9])]),  # those that came while nobody asked
        Answer([Output([2], "stop")], finished=True),
    ]
    sampling = Sampling(
        temperature=0.7, top_p=0.9, top_k=40, repetition_penalty=1.1, seed=3, num_logprobs=None
    )
    steps = standin.ask(Generation((5, 6), sampling, 20, frozenset({2, 1})))
    assert tokens_of(steps) == [7, 8, 9, 2]
    assert [step.finish for step in steps] == [None, None, None, "stop"]
    ((prompt, settings, _),) = standin.vllm.asked
    assert prompt == {"type": "token", "prompt_token_ids": [5, 6]}
    wanted = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "repetition_penalty": 1.1,
        "seed": 3,
        "stop_token_ids": [1, 2],
        "max_tokens": 20,
        "detokenize": False,
        "output_kind": OutputKind.DELTA,
    }
    assert {name: settings[name] for name in wanted} == wanted
    for name in ("logprobs", "allowed_token_ids", "structured_outputs"):
        assert settings.get(name) is None
    assert not standin.vllm.aborted


def test_logprobs_are_the_chosen_ones_and_the_likeliest_in_order(standin: Standin) -> None:
    found = {9: Logprob(-3.0, rank=7), 4: Logprob(-0.5, rank=1), 5: Logprob(-1.0, rank=2)}
    likely = {4: Logprob(-0.25, rank=1), 9: Logprob(-2.0, rank=2)}
    standin.vllm.told = [Answer([Output([9, 4], "length", [found, likely])], finished=True)]
    unlikely, likeliest = standin.ask(Generation((1,), Sampling(num_logprobs=2), 2))
    assert unlikely.choice.logprob == -3.0
    assert unlikely.choice.likeliest == ((4, -0.5), (5, -1.0))
    assert likeliest.choice.likeliest == ((4, -0.25), (9, -2.0))
    assert [unlikely.finish, likeliest.finish] == [None, "length"]
    assert standin.vllm.asked[0][1]["logprobs"] == 2


def test_rows_beyond_the_tokens_are_never_generated(vllm_modules: None) -> None:
    standin = build(num_rows=410)
    standin.vllm.told = [Answer([Output([2], "stop")], finished=True)]
    standin.ask(Generation((1,), Sampling(), 9))
    assert standin.vllm.asked[0][1]["allowed_token_ids"] == list(range(400))


def test_form_is_told_as_a_grammar_that_means_the_same(
    standin: Standin, served: ServedModel
) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    schema |= {"additionalProperties": False}
    grammar = Grammars(served.tokenizer, served.stop_ids).of_schema(schema)
    standin.vllm.told = [Answer([Output([2], "stop")], finished=True)]
    standin.ask(Generation((1,), Sampling(), 9, constraint=grammar))
    form = standin.vllm.asked[0][1]["structured_outputs"].given
    assert standin.vllm.arguments["structured_outputs_config"].given["backend"] == "guidance"
    # As that backend reads it: v1/structured_output/backend_guidance.py.
    read = llguidance.grammar_from("grammar", form["grammar"])
    tokenizer = llguidance.hf.from_tokenizer(
        served.tokenizer, eos_token=served.tokenizer.convert_tokens_to_ids("</s>")
    )
    for text, is_kept in ((json.dumps({"a": 2}), True), ('{"a":2}', False), ('{"a": 3}', False)):
        matcher = llguidance.LLMatcher(tokenizer, read)
        tokens = served.tokenizer.encode(text, add_special_tokens=False)
        assert (matcher.validate_tokens(tokens) == len(tokens)) == is_kept


def test_caller_that_goes_away_aborts_its_request(standin: Standin) -> None:
    standin.vllm.told = [Answer([Output([7])])]

    async def main() -> None:
        steps = standin.engine.generate(Generation((1,), Sampling(), 9))
        assert (await anext(steps)).choice.token == 7
        await steps.aclose()
        waiting = standin.engine.generate(Generation((1,), Sampling(), 9))
        await anext(waiting)
        async with asyncio.timeout(60):
            task = asyncio.create_task(anext(waiting))  # type: ignore[arg-type]
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait({task})

    asyncio.run(main())
    assert standin.vllm.aborted == [request_id for _, _, request_id in standin.vllm.asked]
    assert len(set(standin.vllm.aborted)) == 2


def test_more_than_may_wait_are_refused_until_one_has_gone(standin: Standin) -> None:
    standin.vllm.told = [Answer([Output([7])])]

    async def main() -> None:
        asked = Generation((1,), Sampling(), 9)
        running = [standin.engine.generate(asked) for _ in range(3)]
        for one in running:
            await anext(one)
        with pytest.raises(BusyError):
            await anext(standin.engine.generate(asked))
        await running.pop().aclose()
        again = standin.engine.generate(asked)
        assert (await anext(again)).choice.token == 7
        for one in (*running, again):
            await one.aclose()

    asyncio.run(main())


@pytest.mark.parametrize("length", [0, 100, 101])
def test_prompt_that_does_not_fit_is_refused(standin: Standin, length: int) -> None:
    with pytest.raises(ValueError, match=f"{length} tokens, wanted 1 to 99"):
        standin.ask(Generation((1,) * length, Sampling(), 9))
    assert not standin.vllm.asked


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (DeadError("EngineCore"), EngineError),
        (GenerateError("x"), EngineError),
        (ClientError("no such token"), ValueError),
    ],
)
def test_errors_of_vllm_are_told_as_ours(
    standin: Standin, error: Exception, wanted: type[Exception]
) -> None:
    standin.vllm.told = [Answer([Output([7])]), error]
    with pytest.raises(wanted):
        standin.ask(Generation((1,), Sampling(), 9))
    assert tokens_of(standin.steps) == [7]
    # One that failed waits no more.
    standin.vllm.told = [Answer([Output([2], "stop")], finished=True)]
    for _ in range(4):
        standin.ask(Generation((1,), Sampling(), 9))


@pytest.mark.parametrize("reason", ["abort", "error", "repetition"])
def test_end_for_a_reason_of_vllms_own_is_an_error(standin: Standin, reason: str) -> None:
    standin.vllm.told = [Answer([Output([7], reason)], finished=True)]
    with pytest.raises(EngineError, match=reason):
        standin.ask(Generation((1,), Sampling(), 9))


def test_engine_that_is_dead_or_closed_answers_nothing(standin: Standin) -> None:
    standin.engine.check()
    standin.vllm.errored = True
    with pytest.raises(EngineError):
        standin.engine.check()
    with pytest.raises(EngineError):
        standin.ask(Generation((1,), Sampling(), 9))
    standin.vllm.errored = False
    standin.engine.close()
    assert standin.vllm.is_shut
    with pytest.raises(EngineError, match="closed"):
        standin.ask(Generation((1,), Sampling(), 9))


def test_adapters_are_refused(standin: Standin) -> None:
    with pytest.raises(ValueError, match="adapter"):
        standin.ask(Generation((1,), Sampling(), 9, adapter="poet"))
    assert not standin.vllm.asked


@pytest.mark.parametrize(
    ("wanted", "has_gpu", "is_installed", "chosen"),
    [
        ("auto", True, True, "vllm"),
        ("auto", False, True, "transformers"),
        ("auto", True, False, "transformers"),
        ("transformers", True, True, "transformers"),
        ("vllm", True, True, "vllm"),
    ],
)
def test_engine_is_chosen_by_what_there_is(
    wanted: Any, chosen: str, *, has_gpu: bool, is_installed: bool
) -> None:
    assert choose_engine(wanted, has_gpu=has_gpu, is_installed=is_installed) == chosen


def test_vllm_that_can_not_run_is_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"pip install raytune_llama\[vllm\]") as caught:
        choose_engine("vllm", has_gpu=False, is_installed=False)
    assert len(caught.value.problems) == 2
