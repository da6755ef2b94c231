"""A model replica as a Ray Serve deployment. Imports torch, so the gateway must not import it."""

import logging
from collections.abc import AsyncGenerator, Hashable
from contextlib import aclosing

import torch

from raytune_llama.logs import setup_logging
from raytune_llama.model.vocab import num_embedding_rows
from raytune_llama.serve.adapters.loading import AdapterLoader
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
from raytune_llama.serve.generation.output import OutputDelta
from raytune_llama.serve.protocol.chat import ChatRequest, CompletionRequest
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
        # Ray Serve bounds the queue.
        max_waiting=10**6,
        max_context=served.max_context,
        num_tokens=len(served.tokenizer),
        num_rows=num_embedding_rows(served.model),
        prefill_tokens=replicas.prefill_tokens,
    )


class ModelReplica:
    """A model with its own engine."""

    def __init__(self, model: ServedModelConfig, config: ServeConfig) -> None:
        """Load the model; reject a damaged one, or one tuned with another chat template."""
        setup_logging()
        replicas = config.replicas
        torch.set_num_threads(max(1, int(replicas.cpus)))
        self._engine: InferenceEngine
        self._answerer: CompletionService | AdapterPool
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
            self._answerer = CompletionService(served, self._engine, config.defaults)
            self._vectors = EmbeddingService(served, self._engine)
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

        # Ray Serve bounds the queue, so the engine does not have to.
        self._engine = engine = TransformersEngine(make_stepper(served), max_waiting=10**6)

        self._vectors = EmbeddingService(served, engine)

        def make_answerer(served: ServedModel, adapter: Hashable | None) -> CompletionService:
            return CompletionService(served, engine, config.defaults, adapter)

        self._answerer = base = make_answerer(served, None)
        if model.adapters_dir is not None:
            self._answerer = AdapterPool(
                base,
                AdapterRegistry.from_path(model.adapters_dir),
                AdapterLoader(model, served),
                engine,
                make_answerer=make_answerer,
                make_stepper=make_stepper,
                max_adapters=model.max_adapters,
            )

    async def answer(
        self, request: ChatRequest | CompletionRequest
    ) -> AsyncGenerator[int | OutputDelta, None]:
        """Yield the number of prompt tokens, then the output deltas of all choices."""
        async with aclosing(self._answerer.respond(request)) as items:
            async for item in items:
                yield item

    async def embed(self, request: EmbeddingRequest) -> AsyncGenerator[int | Vectors, None]:
        """Yield the total number of input tokens, then batches of vectors."""
        async with aclosing(self._vectors.respond(request)) as items:
            async for item in items:
                yield item

    async def check_health(self) -> None:
        """Raise if the engine has failed, so that Ray Serve replaces the replica."""
        self._engine.check_health()
