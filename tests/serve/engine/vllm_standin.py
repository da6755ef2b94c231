"""A stand-in of vLLM's modules that fails as the real one does only when something breaks.

What the real one does is tested in tests/serve/vllm; here are errors that can't be provoked there.
Their kinds are those of vLLM 0.29.0: `exceptions.py` and `v1/engine/exceptions.py`.
"""

# ruff: noqa: ANN401, ARG002, ARG003 - the stand-in's arguments are vLLM's, used here or not.

import asyncio
import enum
import sys
import types
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from raytune_llama.serve.engine.protocol import EngineRequest, TokenOutput
from raytune_llama.serve.engine.vllm import VllmEngine


class Taken:
    """Any of vLLM's classes of arguments."""

    def __init__(self, **given: object) -> None:
        self.given = given


class ClientError(Exception):
    """`vllm.exceptions.VLLMClientError`, above all that is wrong with a request."""


class ServerError(Exception):
    """`vllm.exceptions.VLLMServerError`."""


class DeadError(ServerError):
    """`EngineDeadError`: raised to all that wait."""


class GenerateError(ServerError):
    """`EngineGenerateError`: raised to one."""


class OutputKind(enum.Enum):
    DELTA = 1


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None


@dataclass
class Output:
    """`CompletionOutput`."""

    token_ids: list[int]
    finish_reason: str | None = None
    logprobs: list[dict[int, Logprob]] | None = None


@dataclass
class Answer:
    """`RequestOutput`."""

    outputs: list[Output]
    finished: bool = False
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


class Async:
    """`AsyncLLM`, as far as our engine knows it; answers are told by the test."""

    def __init__(self) -> None:
        self.told: list[Answer | Exception] = []
        self.errored, self.dead_error, self.is_shut = False, DeadError("EngineCore"), False

    @classmethod
    def from_engine_args(cls, engine_args: Any) -> "Async":
        return cls()

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *, lora_request: Any = None
    ) -> AsyncGenerator[Answer, None]:
        for answer in self.told:
            await asyncio.sleep(0)
            if isinstance(answer, Exception):
                raise answer
            yield answer

    def shutdown(self) -> None:
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
def standin(monkeypatch: pytest.MonkeyPatch) -> Standin:
    def tokens_input(prompt_token_ids: list[int]) -> list[int]:
        return prompt_token_ids

    for made in (
        module("vllm"),
        module("vllm.config", StructuredOutputsConfig=Taken),
        module("vllm.engine"),
        module("vllm.engine.arg_utils", AsyncEngineArgs=Taken),
        module("vllm.exceptions", VLLMClientError=ClientError),
        module("vllm.inputs", tokens_input=tokens_input),
        module(
            "vllm.sampling_params",
            SamplingParams=Taken,
            StructuredOutputsParams=Taken,
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
    engine = VllmEngine(
        "/models/tiny",
        dtype=torch.bfloat16,
        num_slots=2,
        max_waiting=1,
        max_context=100,
        num_tokens=400,
        num_rows=400,
    )
    vllm: Any = engine._engine  # the stand-in
    return Standin(engine, vllm)
