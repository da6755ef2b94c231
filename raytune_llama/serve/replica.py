"""A copy of a model in an actor of Ray Serve. Imports torch; the gateway does not import this."""

from collections.abc import AsyncGenerator

import torch

from raytune_llama.logs import setup_logging
from raytune_llama.serve.answers import Answerer
from raytune_llama.serve.config import ServeConfig, ServedModelConfig
from raytune_llama.serve.engine.loop import TransformersEngine
from raytune_llama.serve.engine.stepper import Stepper
from raytune_llama.serve.http.protocol import ChatRequest, CompletionRequest
from raytune_llama.serve.models import load_served
from raytune_llama.serve.parts import Part


class ModelReplica:
    """A copy of a model, with its own engine."""

    def __init__(self, model: ServedModelConfig, config: ServeConfig) -> None:
        """Load the model; refuse one that is damaged, or tuned with another template."""
        setup_logging()
        replicas = config.replicas
        torch.set_num_threads(max(1, int(replicas.cpus)))
        device = torch.device("cuda" if replicas.use_gpu else "cpu")
        served = load_served(model, device)
        stepper = Stepper(
            served.model,
            num_slots=replicas.slots,
            max_context=served.max_context,
            num_tokens=len(served.tokenizer),
            prefill_tokens=replicas.prefill_tokens,
        )
        # Ray Serve bounds what waits; here it never has to.
        self._engine = TransformersEngine(stepper, max_waiting=10**6)
        self._answerer = Answerer(served, self._engine, config.defaults)

    async def answer(
        self, request: ChatRequest | CompletionRequest
    ) -> AsyncGenerator[int | Part, None]:
        """Yield the prompt's number of tokens, then the parts of all answers."""
        async for item in self._answerer.respond(request):
            yield item

    async def check_health(self) -> None:
        """Let Ray Serve replace a replica whose engine has failed."""
        self._engine.check()
