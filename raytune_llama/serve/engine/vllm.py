"""The engine on vLLM, for GPUs: the same ids in and out, with vLLM's batching and kernels.

Written against the sources of vLLM 0.29.0 and tested only with a stub of their signatures: it has
never run on a GPU. vLLM is imported when an engine is started, so that everything else works
without it (`pip install raytune_llama[vllm]`).

Differences from `TransformersEngine`: equal seeds give other tokens, and a temperature below 0.01
that is not 0 counts as 0.01. Log-probabilities are normalized over all rows of the model: those
beyond the vocabulary of the tokenizer count too, and may be among the most likely. Grammars are
enforced by the same library, llguidance.
"""

import importlib.util
import itertools
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Literal

import torch

from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import ConfigError
from raytune_llama.serve.engine.grammar import Grammar
from raytune_llama.serve.engine.protocol import (
    EngineFinishReason,
    EngineRequest,
    SampledToken,
    TokenOutput,
    Vectors,
)
from raytune_llama.serve.errors import BusyError, EngineError, InvalidRequestError

EngineName = Literal["transformers", "vllm"]


def has_vllm() -> bool:
    """Return whether vLLM is installed, without importing it."""
    return importlib.util.find_spec("vllm") is not None


def choose_engine(
    wanted: Literal["auto", "transformers", "vllm"],
    *,
    has_gpu: bool,
    has_adapters: bool,
    is_installed: bool,
) -> EngineName:
    """Return which engine to use.

    Args:
        wanted: engine in the config; auto: vLLM if it can serve the model.
        has_gpu: whether the replica has a GPU.
        has_adapters: whether the model has a directory of adapters.
        is_installed: whether vLLM is installed.

    Raises:
        ConfigError: vLLM is configured but can't be used; lists every reason.
    """
    problems: list[str] = []
    if not is_installed:
        problems.append("replicas.engine: vllm is not installed; pip install raytune_llama[vllm]")
    if not has_gpu:
        problems.append(
            "replicas.engine: vllm needs a GPU; set replicas.use_gpu=true on nodes that have one"
        )
    if has_adapters:
        problems.append(
            "replicas.engine: vllm can't serve adapters here; merge them, or set transformers"
        )
    if wanted == "vllm" and problems:
        raise ConfigError(problems)
    return "transformers" if wanted == "transformers" or problems else "vllm"


class VllmEngine:
    """vLLM's engine with the interface of `InferenceEngine`."""

    def __init__(
        self,
        model_dir: str,
        *,
        dtype: torch.dtype,
        num_slots: int,
        max_waiting: int,
        max_context: int,
        num_tokens: int,
        num_rows: int,
        prefill_tokens: int | None = None,
    ) -> None:
        """Load the model onto the GPU.

        Args:
            model_dir: model directory; safetensors only.
            dtype: dtype of the weights.
            num_slots: maximum number of running sequences; more wait.
            max_waiting: maximum number of waiting requests.
            max_context: maximum tokens per sequence, prompt and answer.
            num_tokens: vocabulary size of the tokenizer; rows beyond it are never generated.
            num_rows: number of embedding rows.
            prefill_tokens: maximum prompt tokens per pass; None: vLLM's default.
        """
        from vllm.config import StructuredOutputsConfig  # pyright: ignore[reportMissingImports]
        from vllm.engine.arg_utils import AsyncEngineArgs  # pyright: ignore[reportMissingImports]
        from vllm.v1.engine.async_llm import AsyncLLM  # pyright: ignore[reportMissingImports]

        self._max_context, self._max_open = max_context, num_slots + max_waiting
        self._num_tokens = num_tokens
        # The full list is sent with each request, so only if some rows must not be generated.
        self._allowed = list(range(num_tokens)) if num_tokens < num_rows else None
        self._names, self._prefix = itertools.count(), uuid.uuid4().hex
        self._num_open, self._is_closed = 0, False
        arguments = AsyncEngineArgs(
            model=model_dir,
            # Never `auto`, with which vLLM loads float32 weights in half precision.
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=max_context,
            max_num_seqs=num_slots,
            # A pass holds chunks of prompts and one token per running sequence.
            max_num_batched_tokens=prefill_tokens and prefill_tokens + num_slots,
            enable_chunked_prefill=True,
            load_format="safetensors",
            trust_remote_code=False,
            enable_log_requests=False,
            disable_log_stats=True,
            logprobs_mode="raw_logprobs",
            structured_outputs_config=StructuredOutputsConfig(backend="guidance"),
        )
        self._engine: Any = AsyncLLM.from_engine_args(arguments)

    @property
    def capacity(self) -> int:
        """Maximum number of sequences, running and waiting."""
        return self._max_open

    async def generate(self, generation: EngineRequest) -> AsyncGenerator[TokenOutput, None]:
        """Yield a request's tokens; see `InferenceEngine`."""
        from vllm.exceptions import VLLMClientError  # pyright: ignore[reportMissingImports]
        from vllm.inputs import tokens_input  # pyright: ignore[reportMissingImports]
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError  # pyright: ignore[reportMissingImports]

        self.check_health()
        generation.check(max_context=self._max_context, num_tokens=self._num_tokens)
        if self._num_open >= self._max_open:
            raise BusyError(
                f"queue full: {self._max_open} requests are running or waiting; retry later"
            )
        if generation.adapter is not None:
            raise UserError(
                "adapters are not supported on vLLM; merge the adapter, or set "
                "replicas.engine=transformers"
            )
        key = f"{self._prefix}-{next(self._names)}"
        self._num_open += 1
        try:
            parameters = self._parameters(generation)
            is_first = True
            # Closing vLLM's generator aborts its request.
            answers = self._engine.generate(
                tokens_input(list(generation.prompt)), parameters, request_id=key
            )
            async with aclosing(answers):
                async for answer in answers:
                    for step in _steps(key, answer, generation, is_first=is_first):
                        is_first = False
                        yield step
        except VLLMClientError as error:
            raise InvalidRequestError(str(error)) from error
        except (EngineDeadError, EngineGenerateError) as error:
            raise EngineError(f"the engine has failed: {error}") from error
        finally:
            self._num_open -= 1

    async def embed(self, texts: Sequence[tuple[int, ...]]) -> AsyncGenerator[Vectors, None]:
        """Refuse: vLLM computes embeddings only with an engine started for that.

        Raises:
            InvalidRequestError: always.
        """
        for _ in texts:
            raise InvalidRequestError(
                "embeddings are not supported on vLLM; set replicas.engine=transformers"
            )
            yield

    def check_health(self) -> None:
        """Raise EngineError if the engine can't generate any more."""
        if self._is_closed:
            raise EngineError("the engine was closed")
        if self._engine.errored:
            raise EngineError(f"the engine has failed: {self._engine.dead_error}")

    def close(self) -> None:
        """Stop the engine; running requests end with an EngineError."""
        self._is_closed = True
        self._engine.shutdown()

    def _parameters(self, generation: EngineRequest) -> Any:  # noqa: ANN401  # vLLM's
        """Return vLLM's sampling parameters of a request."""
        from vllm.sampling_params import (  # pyright: ignore[reportMissingImports]
            RequestOutputKind,
            SamplingParams,
            StructuredOutputsParams,
        )

        structured = None
        if generation.constraint is not None:
            if not isinstance(generation.constraint, Grammar):
                kind = type(generation.constraint).__name__
                raise UserError(f"vLLM supports grammar constraints only, got {kind}")
            structured = StructuredOutputsParams(grammar=generation.constraint.lark)
        sampling = generation.sampling
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or 0,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            logit_bias=dict(sampling.logit_bias) or None,
            seed=_seed(sampling.seed),
            logprobs=sampling.num_logprobs,
            prompt_logprobs=generation.num_prompt_logprobs,
            stop_token_ids=sorted(generation.stop_ids),
            max_tokens=min(generation.max_tokens, self._max_context - len(generation.prompt)),
            allowed_token_ids=self._allowed,
            structured_outputs=structured,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )


def _seed(seed: int | None) -> int | None:
    """Return a seed that vLLM accepts as one: it takes -1 for no seed."""
    return 2**63 - 1 if seed == -1 else seed


def _steps(
    key: str,
    answer: Any,  # noqa: ANN401  # vLLM's
    generation: EngineRequest,
    *,
    is_first: bool,
) -> Iterator[TokenOutput]:
    """Yield the tokens of one of vLLM's outputs, which may hold several."""
    output, num_top = answer.outputs[0], generation.sampling.num_logprobs
    finish = _finish(output.finish_reason)
    tokens = list(output.token_ids)
    if finish is not None and not tokens:
        raise EngineError("vLLM ended a sequence without its last token")
    for place, token in enumerate(tokens):
        choice = SampledToken(token)
        if num_top is not None:
            choice = _scored(token, output.logprobs[place], num_top)
        is_start, is_end = is_first and place == 0, place == len(tokens) - 1
        prompt = _scored_prompt(answer.prompt_logprobs, generation) if is_start else ()
        yield TokenOutput(key, choice, finish if is_end else None, prompt)


def _scored(token: int, found: Mapping[int, Any], num_top: int) -> SampledToken:
    """Return a token with the log-probabilities that vLLM found at its position."""
    ranked = sorted((one.rank, other, one.logprob) for other, one in found.items())
    # vLLM adds the token itself to the most likely ones, whatever its rank.
    likeliest = tuple((other, value) for rank, other, value in ranked if rank <= num_top)
    return SampledToken(token, found[token].logprob, likeliest[:num_top])


def _scored_prompt(
    found: Sequence[Mapping[int, Any] | None] | None, generation: EngineRequest
) -> tuple[SampledToken, ...]:
    """Return the log-probabilities of a prompt's tokens but the first, if they are requested.

    Raises:
        EngineError: vLLM has not returned them for every token.
    """
    num_top = generation.num_prompt_logprobs
    if num_top is None:
        return ()
    num_found, num_tokens = len(found or ()), len(generation.prompt)
    # The first token has none.
    later = [one for one in found or () if one is not None]
    if num_found != num_tokens or len(later) != num_tokens - 1:
        raise EngineError(
            f"vLLM returned log-probabilities of {num_found} tokens of a prompt of {num_tokens}"
        )
    pairs = zip(generation.prompt[1:], later, strict=True)
    return tuple(_scored(token, one, num_top) for token, one in pairs)


def _finish(reason: str | None) -> EngineFinishReason | None:
    """Return our finish reason for vLLM's.

    Raises:
        EngineError: vLLM ended the sequence for another reason.
    """
    match reason:
        case None | "stop" | "length":
            return reason
        case _:
            raise EngineError(f"vLLM ended a sequence with finish reason {reason}")
