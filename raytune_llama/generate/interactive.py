"""A chat in the terminal with a model in this process, without a server."""

import asyncio
import logging
import os
import queue
import signal
import threading
from collections import abc
from contextlib import aclosing, closing
from typing import Any, TextIO

from raytune_llama.config.errors import UserError
from raytune_llama.generate.batch import resolve_paths
from raytune_llama.generate.config import GenerateConfig
from raytune_llama.generate.worker import Generator, describe_model
from raytune_llama.logs import waiting
from raytune_llama.serve.client.config import TerminalConfig
from raytune_llama.serve.client.endpoint import EndpointError, RequestRejectedError, StreamEnd
from raytune_llama.serve.client.terminal import converse
from raytune_llama.serve.errors import EngineError
from raytune_llama.serve.protocol.chat import ChatRequest

logger = logging.getLogger(__name__)

_Item = str | StreamEnd | BaseException


class LocalAnswers:
    """A model in this process as a source of answers for the terminal chat."""

    def __init__(self, model: Generator, name: str, stops: abc.Sequence[str]) -> None:
        """Start the event loop of the model's requests, in a thread.

        Args:
            model: the model.
            name: name of the model in the chat.
            stops: texts that end an answer.
        """
        self._model, self._name, self._stops = model, name, list(stops)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="chat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the event loop and the model's engine."""
        self._model.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def list_models(self) -> list[str]:
        """Return the name of the model."""
        return [self._name]

    def stream(self, request: abc.Mapping[str, Any]) -> abc.Generator[str | StreamEnd]:
        """Yield the text of an answer as it is generated, then its end; closing stops it.

        Args:
            request: fields of `/chat/completions`.

        Raises:
            RequestRejectedError: the conversation does not fit the template or the context.
            EndpointError: the engine has failed.
        """
        items: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        answering = asyncio.run_coroutine_threadsafe(self._answer(request, items.put), self._loop)
        try:
            while True:
                item = items.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if isinstance(item, StreamEnd):
                    return
        finally:
            answering.cancel()

    async def _answer(
        self, request: abc.Mapping[str, Any], put: abc.Callable[[_Item], None]
    ) -> None:
        """Put the parts of an answer, and what ends it."""
        try:
            service = await self._model.load_service()
            fields = {**request, "model": service.name, "stop": self._stops or None}
            asked = ChatRequest.model_validate(fields)
            count, finish = 0, None
            async with aclosing(await service.respond(asked)) as stream:
                async for delta in stream.deltas:
                    count += delta.num_tokens
                    finish = delta.finish_reason or finish
                    if delta.text:
                        put(delta.text)
            put(StreamEnd(finish, stream.num_prompt_tokens, count))
        except EngineError as error:
            put(EndpointError(str(error)))
        except UserError as error:
            put(RequestRejectedError(str(error)))
        except BaseException as error:
            # Raised where the answer is awaited, which would wait forever.
            put(error)
            raise


def chat_with_model(config: GenerateConfig, source: TextIO, out: TextIO, notes: TextIO) -> int:
    """Chat until an empty line; see `serve.client.terminal.converse`.

    Args:
        config: config of the job.
        source: input with the messages.
        out: output of the answers.
        notes: output of errors and, if `source` is not a terminal, of everything else.

    Returns:
        Exit status: 0.

    Raises:
        ConfigError: the model can't be used.
    """
    # Ctrl-C stops an answer, every time, as in the chat with an endpoint.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config = resolve_paths(config)
    name = describe_model(config).name
    logger.info("chat: input, run_dir and scale.num_workers are not used; an empty line ends it")
    cpus = config.scale.cpus_per_worker or os.cpu_count() or 1
    sampling = config.resolved_sampling
    terminal = TerminalConfig(system=config.system, seed=sampling.seed)
    with waiting(logger, f"loading {config.model.path}", usually="1 to 60 s"):
        model = Generator(config, cpus=cpus)
    with closing(LocalAnswers(model, name, sampling.stop)) as answers:
        return converse(answers, terminal, source, out, notes)
