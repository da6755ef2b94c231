"""A model in this process with its engine and adapters: a `routes.ModelBackend`."""

import logging
from collections.abc import Hashable

import torch

from raytune_llama.model.vocab import num_embedding_rows
from raytune_llama.serve.adapters.pool import AdapterPool
from raytune_llama.serve.adapters.registry import AdapterRegistry
from raytune_llama.serve.config import ReplicaConfig, ServeConfig, ServedModelConfig
from raytune_llama.serve.engine.loop import TransformersEngine
from raytune_llama.serve.engine.protocol import InferenceEngine, Vectors
from raytune_llama.serve.engine.scheduler import BatchScheduler
from raytune_llama.serve.engine.vllm import VllmEngine, choose_engine, has_vllm
from raytune_llama.serve.generation.completion import CompletionService
from raytune_llama.serve.generation.embeddings import EmbeddingService
from raytune_llama.serve.generation.model import ServedModel, load_served_model
from raytune_llama.serve.generation.output import OutputDelta, Stream
from raytune_llama.serve.protocol.chat import ChatRequest
from raytune_llama.serve.protocol.completions import CompletionRequest
from raytune_llama.serve.protocol.embeddings import EmbeddingRequest

logger = logging.getLogger(__name__)

PREFILL_TOKENS = 256
"""Default of `ReplicaConfig.prefill_tokens` for the transformers engine."""


def start_vllm(
    model: ServedModelConfig, served: ServedModel, replicas: ReplicaConfig
) -> VllmEngine:
    """Start a vLLM engine.

    Args:
        model: settings of the model.
        served: the model on the meta device, without weights.
        replicas: settings of the replicas.
    """
    return VllmEngine(
        model.path,
        dtype=served.model.dtype,
        num_slots=replicas.slots,
        max_waiting=replicas.waiting,
        max_context=served.max_context,
        num_tokens=len(served.tokenizer),
        num_rows=num_embedding_rows(served.model),
        prefill_tokens=replicas.prefill_tokens,
    )


class LoadedModel:
    """A model with its own engine."""

    def __init__(self, model: ServedModelConfig, config: ServeConfig) -> None:
        """Load the model; reject a damaged one, or one tuned with another chat template."""
        replicas = config.replicas
        torch.set_num_threads(max(1, int(replicas.cpus)))
        self._engine: InferenceEngine
        self._pool: AdapterPool | None = None
        chosen = choose_engine(
            replicas.engine,
            has_gpu=replicas.use_gpu and torch.cuda.is_available(),
            has_adapters=model.adapters_dir is not None,
            is_installed=has_vllm(),
        )
        logger.info("model %s: using the %s engine", model.served_name, chosen)
        if chosen == "vllm":
            served = load_served_model(model, torch.device("meta"))
            self._engine = start_vllm(model, served, replicas)
            self._service = CompletionService(served, self._engine, config.defaults)
            self._embeddings = EmbeddingService(served, self._engine)
            return
        served = load_served_model(model, torch.device("cuda" if replicas.use_gpu else "cpu"))

        def make_stepper(served: ServedModel) -> BatchScheduler:
            return BatchScheduler(
                served.model,
                num_slots=replicas.slots,
                max_context=served.max_context,
                num_tokens=len(served.tokenizer),
                prefill_tokens=replicas.prefill_tokens or PREFILL_TOKENS,
            )

        engine = TransformersEngine(make_stepper(served), max_waiting=replicas.waiting)
        self._engine = engine
        self._embeddings = EmbeddingService(served, engine)

        def make_service(served: ServedModel, adapter: Hashable | None) -> CompletionService:
            return CompletionService(served, engine, config.defaults, adapter)

        self._service = make_service(served, None)
        if model.adapters_dir is not None:
            # Imports PEFT, which takes seconds.
            from raytune_llama.serve.adapters.loading import AdapterLoader

            self._pool = AdapterPool(
                self._service,
                AdapterRegistry.from_path(model.adapters_dir),
                AdapterLoader(model, served),
                engine,
                make_answerer=make_service,
                make_stepper=make_stepper,
                max_adapters=model.max_adapters,
            )

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
