"""A model in this process with its engine and adapters.

`start_model` loads one and starts its engine, for any job. `LoadedModel` is a replica's, with a
pool of adapters: a `routes.ModelBackend`.
"""

import logging
import os
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from raytune_llama.model.embeddings import embedding_layers
from raytune_llama.model.vocab import num_embedding_rows
from raytune_llama.serve.adapters.pool import AdapterPool
from raytune_llama.serve.adapters.registry import AdapterRegistry
from raytune_llama.serve.config import ReplicaConfig, ServeConfig, ServedModelConfig
from raytune_llama.serve.engine.choice import choose_engine, find_vllm
from raytune_llama.serve.engine.loop import TransformersEngine
from raytune_llama.serve.engine.protocol import InferenceEngine, Vectors
from raytune_llama.serve.engine.scheduler import BatchScheduler
from raytune_llama.serve.engine.vllm import VLLM_ADAPTER_RANK, AdapterLimits, VllmEngine
from raytune_llama.serve.generation.completion import CompletionService
from raytune_llama.serve.generation.embeddings import EmbeddingService
from raytune_llama.serve.generation.model import ServedModel, load_served_model
from raytune_llama.serve.generation.output import OutputDelta, Stream
from raytune_llama.serve.protocol.chat import ChatRequest
from raytune_llama.serve.protocol.completions import CompletionRequest
from raytune_llama.serve.protocol.embeddings import EmbeddingRequest
from raytune_llama.storage.directories import fetched

logger = logging.getLogger(__name__)

PREFILL_TOKENS = 256
"""Default of `ReplicaConfig.prefill_tokens` for the transformers engine."""


_CPU_CACHE_SHARE = 4
"""vLLM's cache of keys and values takes at most one part of so many of a CPU machine's memory."""


def _start_vllm(model: ServedModelConfig, replicas: ReplicaConfig) -> "StartedModel":
    """Start a vLLM engine, which loads the model."""
    if model.precision == "auto" and not replicas.use_gpu:
        model = replace(model, precision="fp32")
    served = load_served_model(model, torch.device("meta"))
    adapters = None
    if model.adapters_dir is not None:
        adapters = AdapterLimits(
            model.max_adapters,
            model.max_adapter_rank or VLLM_ADAPTER_RANK,
            _linear_layers(served.model),
        )
    engine = VllmEngine(
        str(fetched(model.path)),
        dtype=served.model.dtype,
        num_slots=replicas.slots,
        max_waiting=replicas.waiting,
        max_context=served.max_context,
        num_tokens=len(served.tokenizer),
        num_rows=num_embedding_rows(served.model),
        prefill_tokens=replicas.prefill_tokens,
        cpu_threads=None if replicas.use_gpu else max(1, int(replicas.cpus)),
        cache_bytes=None if replicas.use_gpu else _cpu_cache_bytes(served, replicas.slots),
        adapters=adapters,
    )
    return StartedModel(served, engine, None)


def _linear_layers(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the last parts of the names of the linear layers, without the output head."""
    heads = embedding_layers(model)
    linear = (name for name, layer in model.named_modules() if isinstance(layer, nn.Linear))
    return tuple(sorted({name.rpartition(".")[2] for name in linear if name not in heads}))


def _cpu_cache_bytes(served: ServedModel, num_slots: int) -> int:
    """Return the size of a cache in which every slot has its whole context, or a share of memory.

    With less, vLLM lets sequences wait.
    """
    config: Any = served.model.config
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    layer_values = 2 * num_heads * head_size
    token_bytes = config.num_hidden_layers * layer_values * served.model.dtype.itemsize
    # vLLM's blocks have 128 tokens on CPUs; one more for the last of each sequence, one unused.
    sequence_bytes = (served.max_context + 2 * 128) * token_bytes
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(2 * sequence_bytes, min(num_slots * sequence_bytes, memory // _CPU_CACHE_SHARE))


AttachCopy = Callable[[Hashable, ServedModel], Awaitable[None]]
"""Attaches a copy of the base with a merged adapter to its engine."""


@dataclass(frozen=True)
class StartedModel:
    """A model and the engine that runs it."""

    served: ServedModel
    """The model; on the meta device if the engine has loaded the weights itself."""

    engine: VllmEngine | TransformersEngine
    """The running engine. Whoever has started it closes it."""

    attach_copy: AttachCopy | None
    """Attaches a copy of the model with a merged adapter; None: the engine runs no copies."""

    async def attach_adapter(
        self, config: ServedModelConfig, folder: Path, key: Hashable
    ) -> ServedModel:
        """Load an adapter, attach it to the engine, and return the model that requests get with it.

        Args:
            config: config of the model, as given to `start_model`, with `adapters_dir`.
            folder: local directory of the adapter.
            key: unique key of the adapter, which requests to the engine name.

        Raises:
            UserError: the adapter is damaged, made for another base, or the engine can't run it.
            EngineError: the engine has failed.
        """
        # Imports PEFT, which takes seconds.
        from raytune_llama.serve.adapters.loading import AdapterLoader

        loaded = AdapterLoader(config, self.served).load(folder, self.served.name)
        if loaded.updates is not None:
            await self.engine.attach(key, loaded.updates)
        else:
            assert self.attach_copy is not None, "the loader makes no copies"
            await self.attach_copy(key, loaded.served)
        return loaded.served


def start_model(
    model: ServedModelConfig,
    replicas: ReplicaConfig,
    *,
    section: str = "replicas",
    default_prefill_tokens: int = PREFILL_TOKENS,
) -> StartedModel:
    """Load a model into this process and start its engine.

    Args:
        model: settings of the model; `adapters_dir` makes room for adapters.
        replicas: engine, device, threads and batch of the process.
        section: where the config has the engine and the device, for error messages.
        default_prefill_tokens: of our own engine, where the config has none.

    Raises:
        ConfigError: the model is incomplete or was tuned with another chat template, or the engine
            can't be used.
    """
    torch.set_num_threads(max(1, int(replicas.cpus)))
    chosen = choose_engine(
        replicas.engine,
        has_gpu=replicas.use_gpu and torch.cuda.is_available(),
        build=find_vllm(),
        section=section,
    )
    logger.info("model %s: using the %s engine", model.served_name, chosen)
    if chosen == "vllm":
        return _start_vllm(model, replicas)
    return _start_own(model, replicas, replicas.prefill_tokens or default_prefill_tokens)


def _start_own(
    model: ServedModelConfig, replicas: ReplicaConfig, prefill_tokens: int
) -> StartedModel:
    """Load a model into this process."""
    served = load_served_model(model, torch.device("cuda" if replicas.use_gpu else "cpu"))

    def make_stepper(served: ServedModel) -> BatchScheduler:
        return BatchScheduler(
            served.model,
            num_slots=replicas.slots,
            max_context=served.max_context,
            num_tokens=len(served.tokenizer),
            prefill_tokens=prefill_tokens,
        )

    engine = TransformersEngine(make_stepper(served), max_waiting=replicas.waiting)

    async def attach_copy(key: Hashable, served: ServedModel) -> None:
        await engine.attach_copy(key, make_stepper(served))

    return StartedModel(served, engine, attach_copy)


class LoadedModel:
    """A model with its own engine."""

    def __init__(self, model: ServedModelConfig, config: ServeConfig) -> None:
        """Load the model; reject a damaged one, or one tuned with another chat template."""
        started = start_model(model, config.replicas)
        engine = started.engine
        self._engine: InferenceEngine = engine
        self._pool: AdapterPool | None = None
        self._embeddings = EmbeddingService(started.served, engine)

        def make_service(served: ServedModel, adapter: Hashable | None) -> CompletionService:
            return CompletionService(served, engine, config.defaults, adapter)

        self._service = make_service(started.served, None)
        if model.adapters_dir is not None:
            # Imports PEFT, which takes seconds.
            from raytune_llama.serve.adapters.loading import AdapterLoader

            self._pool = AdapterPool(
                self._service,
                AdapterRegistry.from_path(model.adapters_dir),
                AdapterLoader(model, started.served),
                engine,
                make_answerer=make_service,
                attach_copy=started.attach_copy,
                max_adapters=model.max_adapters,
            )

    def close(self) -> None:
        """Stop the engine, on the event loop of its requests or while that runs.

        Running requests end with an EngineError.
        """
        self._engine.close()

    async def respond(self, request: ChatRequest | CompletionRequest) -> Stream[OutputDelta]:
        """Return the stream of a request's answers; see `routes.ModelBackend`."""
        return await (self._pool or self._service).respond(request)

    async def embed(self, request: EmbeddingRequest) -> Stream[Vectors]:
        """Return the stream of a request's vectors; see `routes.EmbeddingBackend`."""
        return await self._embeddings.respond(request)

    async def adapters(self) -> list[str]:
        """Return the names of the model's adapters."""
        return [] if self._pool is None else await self._pool.names()

    async def check(self) -> None:
        """Raise EngineError if the engine can't generate any more."""
        self._engine.check_health()
