"""The engine on vLLM, against a stand-in with the signatures of vLLM 0.29.0: no GPU is here."""

import asyncio
import json
from pathlib import Path
from typing import Literal

import llguidance
import llguidance.hf
import pytest
import torch

from raytune_llama.config.settings import ConfigError
from raytune_llama.model.vocab import num_embedding_rows
from raytune_llama.serve.backend import LoadedModel
from raytune_llama.serve.config import ReplicaConfig, ServeConfig, ServedModelConfig
from raytune_llama.serve.engine.grammar import GrammarCompiler
from raytune_llama.serve.engine.protocol import (
    EngineRequest,
    SampledToken,
    SamplingOptions,
    TokenOutput,
)
from raytune_llama.serve.engine.vllm import choose_engine
from raytune_llama.serve.errors import BusyError, EngineError, InvalidRequestError
from raytune_llama.serve.generation.model import ServedModel, load_served_model
from tests.serve.engine.vllm_standin import (
    Answer,
    ClientError,
    DeadError,
    GenerateError,
    Logprob,
    Output,
    OutputKind,
    Standin,
    build,
    standin,
    vllm_modules,
)

__all__ = ["standin", "vllm_modules"]

Wanted = Literal["auto", "transformers", "vllm"]


def tokens_of(steps: list[TokenOutput]) -> list[int]:
    return [step.sampled.token for step in steps]


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
    sampling = SamplingOptions(
        temperature=0.7, top_p=0.9, top_k=40, repetition_penalty=1.1, seed=3, num_logprobs=None
    )
    steps = standin.ask(EngineRequest((5, 6), sampling, 20, frozenset({2, 1})))
    assert tokens_of(steps) == [7, 8, 9, 2]
    assert [step.finish_reason for step in steps] == [None, None, None, "stop"]
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
    unlikely, likeliest = standin.ask(EngineRequest((1,), SamplingOptions(num_logprobs=2), 2))
    assert unlikely.sampled.logprob == -3.0
    assert unlikely.sampled.top_logprobs == ((4, -0.5), (5, -1.0))
    assert likeliest.sampled.top_logprobs == ((4, -0.25), (9, -2.0))
    assert [unlikely.finish_reason, likeliest.finish_reason] == [None, "length"]
    assert standin.vllm.asked[0][1]["logprobs"] == 2


def test_penalties_bias_and_min_p_are_vllms_own(standin: Standin) -> None:
    standin.vllm.told = [Answer([Output([2], "stop")], finished=True, prompt_logprobs=[None])]
    sampling = SamplingOptions(
        min_p=0.1, frequency_penalty=0.5, presence_penalty=-0.25, logit_bias=((7, -100.0), (9, 2.5))
    )
    standin.ask(EngineRequest((1,), sampling, 9, num_prompt_logprobs=3))
    wanted = {
        "min_p": 0.1,
        "frequency_penalty": 0.5,
        "presence_penalty": -0.25,
        "logit_bias": {7: -100.0, 9: 2.5},
        "prompt_logprobs": 3,
    }
    settings = standin.vllm.asked[0][1]
    assert {name: settings[name] for name in wanted} == wanted


def test_request_without_penalties_and_bias_sets_none(standin: Standin) -> None:
    standin.vllm.told = [Answer([Output([2], "stop")], finished=True)]
    standin.ask(EngineRequest((1,), SamplingOptions(), 9))
    settings = standin.vllm.asked[0][1]
    assert [settings[f"{name}_penalty"] for name in ("frequency", "presence")] == [0.0, 0.0]
    assert (settings["min_p"], settings["logit_bias"]) == (0.0, None)
    assert settings["prompt_logprobs"] is None


def test_logprobs_of_the_prompt_come_with_the_first_token(standin: Standin) -> None:
    second = {6: Logprob(-3.0, rank=7), 4: Logprob(-0.5, rank=1), 5: Logprob(-1.0, rank=2)}
    third = {4: Logprob(-0.25, rank=1), 9: Logprob(-2.0, rank=2)}
    standin.vllm.told = [
        Answer([Output([7, 8])], prompt_logprobs=[None, second, third]),
        Answer([Output([2], "stop")], prompt_logprobs=[], finished=True),
    ]
    generation = EngineRequest((5, 6, 4), SamplingOptions(), 9, num_prompt_logprobs=2)
    first, *later = standin.ask(generation)
    assert first.prompt == (
        SampledToken(6, -3.0, ((4, -0.5), (5, -1.0))),
        SampledToken(4, -0.25, ((4, -0.25), (9, -2.0))),
    )
    assert [step.prompt for step in later] == [(), ()]


def test_prompt_of_one_token_has_no_logprobs(standin: Standin) -> None:
    standin.vllm.told = [Answer([Output([2], "stop")], finished=True, prompt_logprobs=[None])]
    (step,) = standin.ask(EngineRequest((5,), SamplingOptions(), 9, num_prompt_logprobs=2))
    assert step.prompt == ()


@pytest.mark.parametrize("found", [None, [], [None], [None, {6: Logprob(-1.0, rank=1)}]])
def test_logprobs_of_the_prompt_that_are_missing_are_an_error(
    standin: Standin, found: list[dict[int, Logprob] | None] | None
) -> None:
    standin.vllm.told = [Answer([Output([2], "stop")], finished=True, prompt_logprobs=found)]
    with pytest.raises(EngineError, match="of a prompt of 3"):
        standin.ask(EngineRequest((5, 6, 4), SamplingOptions(), 9, num_prompt_logprobs=0))


@pytest.mark.parametrize("token", [-1, 400])
def test_bias_of_a_token_that_does_not_exist_is_refused(vllm_modules: None, token: int) -> None:
    standin = build(num_rows=410)
    standin.vllm.told = [Answer([Output([2], "stop")], finished=True)]
    sampling = SamplingOptions(logit_bias=((3, 1.0), (token, 1.0)))
    with pytest.raises(InvalidRequestError, match=f"got token id {token}, wanted 0 to 399"):
        standin.ask(EngineRequest((1,), sampling, 9))
    assert not standin.vllm.asked


def test_settings_that_vllm_refuses_are_an_invalid_request(standin: Standin) -> None:
    standin.vllm.told = [Answer([Output([2], "stop")], finished=True)]
    # As often as requests may be open: none of those refused stays open.
    for _ in range(4):
        with pytest.raises(InvalidRequestError, match="presence_penalty"):
            standin.ask(EngineRequest((1,), SamplingOptions(presence_penalty=3.0), 9))
    assert tokens_of(standin.ask(EngineRequest((1,), SamplingOptions(), 9))) == [2]


def test_rows_beyond_the_tokens_are_never_generated(vllm_modules: None) -> None:
    standin = build(num_rows=410)
    standin.vllm.told = [Answer([Output([2], "stop")], finished=True)]
    standin.ask(EngineRequest((1,), SamplingOptions(), 9))
    assert standin.vllm.asked[0][1]["allowed_token_ids"] == list(range(400))


def test_form_is_told_as_a_grammar_that_means_the_same(
    standin: Standin, served: ServedModel
) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    schema |= {"additionalProperties": False}
    grammar = GrammarCompiler(served.tokenizer, served.stop_ids).compile_schema(schema)
    standin.vllm.told = [Answer([Output([2], "stop")], finished=True)]
    standin.ask(EngineRequest((1,), SamplingOptions(), 9, constraint=grammar))
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
        steps = standin.engine.generate(EngineRequest((1,), SamplingOptions(), 9))
        assert (await anext(steps)).sampled.token == 7
        await steps.aclose()
        waiting = standin.engine.generate(EngineRequest((1,), SamplingOptions(), 9))
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
        asked = EngineRequest((1,), SamplingOptions(), 9)
        running = [standin.engine.generate(asked) for _ in range(3)]
        for one in running:
            await anext(one)
        with pytest.raises(BusyError):
            await anext(standin.engine.generate(asked))
        await running.pop().aclose()
        again = standin.engine.generate(asked)
        assert (await anext(again)).sampled.token == 7
        for one in (*running, again):
            await one.aclose()

    asyncio.run(main())


@pytest.mark.parametrize("length", [0, 100, 101])
def test_prompt_that_does_not_fit_is_refused(standin: Standin, length: int) -> None:
    with pytest.raises(ValueError, match=f"{length} tokens, wanted 1 to 99"):
        standin.ask(EngineRequest((1,) * length, SamplingOptions(), 9))
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
        standin.ask(EngineRequest((1,), SamplingOptions(), 9))
    assert tokens_of(standin.steps) == [7]
    # One that failed waits no more.
    standin.vllm.told = [Answer([Output([2], "stop")], finished=True)]
    for _ in range(4):
        standin.ask(EngineRequest((1,), SamplingOptions(), 9))


@pytest.mark.parametrize("reason", ["abort", "error", "repetition"])
def test_end_for_a_reason_of_vllms_own_is_an_error(standin: Standin, reason: str) -> None:
    standin.vllm.told = [Answer([Output([7], reason)], finished=True)]
    with pytest.raises(EngineError, match=reason):
        standin.ask(EngineRequest((1,), SamplingOptions(), 9))


def test_engine_that_is_dead_or_closed_answers_nothing(standin: Standin) -> None:
    standin.engine.check_health()
    standin.vllm.errored = True
    with pytest.raises(EngineError):
        standin.engine.check_health()
    with pytest.raises(EngineError):
        standin.ask(EngineRequest((1,), SamplingOptions(), 9))
    standin.vllm.errored = False
    standin.engine.close()
    assert standin.vllm.is_shut
    with pytest.raises(EngineError, match="closed"):
        standin.ask(EngineRequest((1,), SamplingOptions(), 9))


def test_vectors_are_refused(standin: Standin) -> None:
    with pytest.raises(InvalidRequestError, match="embeddings"):
        asyncio.run(anext(standin.engine.embed([(1, 2)])))  # type: ignore[arg-type]


def test_adapters_are_refused(standin: Standin) -> None:
    with pytest.raises(ValueError, match="adapter"):
        standin.ask(EngineRequest((1,), SamplingOptions(), 9, adapter="poet"))
    assert not standin.vllm.asked


@pytest.mark.parametrize(
    ("wanted", "missing", "chosen"),
    [
        ("auto", [], "vllm"),
        ("auto", ["has_gpu"], "transformers"),
        ("auto", ["is_installed"], "transformers"),
        ("auto", ["no_adapters"], "transformers"),
        ("transformers", [], "transformers"),
        ("vllm", [], "vllm"),
    ],
)
def test_engine_is_chosen_by_what_there_is(wanted: Wanted, missing: list[str], chosen: str) -> None:
    assert choose(wanted, missing) == chosen


def choose(wanted: Wanted, missing: list[str]) -> str:
    return choose_engine(
        wanted,
        has_gpu="has_gpu" not in missing,
        has_adapters="no_adapters" in missing,
        is_installed="is_installed" not in missing,
    )


def test_vllm_that_can_not_answer_is_refused_with_what_to_do() -> None:
    missing = ["has_gpu", "is_installed", "no_adapters"]
    with pytest.raises(ConfigError, match=r"pip install raytune_llama\[vllm\]") as caught:
        choose("vllm", missing)
    assert len(caught.value.problems) == 3
    for one in missing:
        with pytest.raises(ConfigError):
            choose("vllm", [one])


def test_replica_with_a_gpu_alone_is_told_to_install_vllm(served_dir: Path) -> None:
    config = ServeConfig(
        models=(ServedModelConfig(path=str(served_dir)),), replicas=ReplicaConfig(engine="vllm")
    )
    with pytest.raises(ConfigError, match=r"replicas\.engine: vllm"):
        LoadedModel(config.models[0], config)


def test_model_for_another_engine_is_described_without_its_weights(
    served_dir: Path, served: ServedModel
) -> None:
    config = ServedModelConfig(path=str(served_dir), template="belle")
    outline = load_served_model(config, torch.device("meta"))
    assert {weight.device.type for weight in outline.model.parameters()} == {"meta"}
    assert outline.stop_ids == served.stop_ids
    assert outline.max_context == served.max_context
    assert outline.model.dtype == torch.float32
    assert num_embedding_rows(outline.model) == num_embedding_rows(served.model)
