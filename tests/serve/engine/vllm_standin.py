"""A stand-in of vLLM's modules, as far as our engine knows them: there is no GPU here.

What it takes and tells is that of vLLM 0.29.0, the version that Ray 2.60's extra `llm`
takes: names of arguments, kinds of errors and what a cancelled request does are from its
`engine/arg_utils.py`, `sampling_params.py`, `inputs/engine.py`, `outputs.py`, `exceptions.py`,
`v1/engine/async_llm.py` and `v1/engine/exceptions.py`. Anything else is an error here.
"""

# ruff: noqa: ANN401, ARG002, ARG003 - the stand-in's arguments are vLLM's, used here or not.

import asyncio
import enum
import sys
import types
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from raytune_llama.serve.engine.protocol import EngineRequest, TokenOutput
from raytune_llama.serve.engine.vllm import VllmEngine

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


class Sampling(taking(SAMPLING)):
    """`SamplingParams`, with the checks of its own that our requests may meet."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2.0 <= given.get(name, 0.0) <= 2.0:
                raise ClientError(f"{name} must be in [-2, 2], got {given[name]}.")


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
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


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
    steps: list[TokenOutput] = field(default_factory=list)

    def ask(self, generation: EngineRequest) -> list[TokenOutput]:
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
            SamplingParams=Sampling,
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
        dtype=torch.bfloat16,
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
