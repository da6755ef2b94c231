"""The engine around a transformers model: the steps of all requests, in a thread of its own."""

import asyncio
import itertools
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import replace

from raytune_llama.serve.engine.embed import Embedder, EmbeddingOutput
from raytune_llama.serve.engine.lora import LoraLayerWeights
from raytune_llama.serve.engine.protocol import EngineRequest, TokenOutput, Vectors
from raytune_llama.serve.engine.scheduler import BatchScheduler
from raytune_llama.serve.errors import BusyError, EngineError

logger = logging.getLogger(__name__)

_EngineOutput = TokenOutput | EmbeddingOutput
"""What the thread tells of a request."""


class TransformersEngine:
    """Our own step loop around a transformers model, in a thread of its own."""

    def __init__(self, stepper: BatchScheduler, *, max_waiting: int) -> None:
        """Start the thread.

        Args:
            stepper: around the model; from here on the thread's alone.
            max_waiting: requests that may wait for a slot; as many may wait for vectors.
        """
        self._stepper, self._max_waiting = stepper, max_waiting
        # Adapters that are merged into a copy of the model.
        self._own: dict[Hashable, BatchScheduler] = {}
        self._attaching: set[Future[None]] = set()
        self._embedder = stepper.build_embedder()
        self._keys = itertools.count()
        self._wake = threading.Condition()
        self._todo: list[Callable[[], None]] = []
        self._listeners: dict[Hashable, Callable[[_EngineOutput | EngineError], object]] = {}
        self._failure: EngineError | None = None
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def generate(self, generation: EngineRequest) -> AsyncGenerator[TokenOutput, None]:
        """Yield a request's tokens; see `Engine`."""
        self.check_health()
        stepper = self._own.get(generation.adapter, self._stepper)
        if stepper is not self._stepper:
            generation = replace(generation, adapter=None)
        stepper.check(generation)
        if stepper.num_waiting + len(self._todo) >= self._max_waiting:
            raise BusyError(f"{self._max_waiting} requests are waiting already")
        key = next(self._keys)
        async with aclosing(
            self._follow(
                key,
                start=lambda: stepper.add(key, generation),
                stop=lambda: stepper.remove(key),
            )
        ) as items:
            async for item in items:
                assert isinstance(item, TokenOutput)
                yield item

    async def embed(self, texts: Sequence[tuple[int, ...]]) -> AsyncGenerator[Vectors, None]:
        """Yield texts' vectors; see `Engine`."""
        self.check_health()
        self._embedder.check(texts)
        if self._embedder.num_jobs + len(self._todo) >= self._max_waiting:
            raise BusyError(f"{self._max_waiting} requests are waiting already")
        key = next(self._keys)
        async with aclosing(
            self._follow(
                key,
                start=lambda: self._embedder.add(key, texts),
                stop=lambda: self._embedder.remove(key),
            )
        ) as items:
            async for item in items:
                assert isinstance(item, EmbeddingOutput)
                yield item.vectors

    async def _follow(
        self, key: Hashable, *, start: Callable[[], None], stop: Callable[[], None]
    ) -> AsyncGenerator[_EngineOutput, None]:
        """Yield what the thread tells of a request, from its start to its last item.

        `stop` is called in the thread where the caller goes away before.
        """
        loop = asyncio.get_running_loop()
        told: asyncio.Queue[_EngineOutput | EngineError] = asyncio.Queue()
        self._listeners[key] = lambda item: loop.call_soon_threadsafe(told.put_nowait, item)
        self._do(start)
        is_over = False
        try:
            while not is_over:
                item = await told.get()
                if isinstance(item, EngineError):
                    is_over = True
                    raise item
                is_over = item.is_last
                yield item
        finally:
            self._listeners.pop(key, None)
            if not is_over:
                # The caller has gone: what it held is free before the next pass.
                self._do(stop)

    async def attach(
        self, key: Hashable, adapter: Mapping[str, LoraLayerWeights] | BatchScheduler
    ) -> None:
        """Take an adapter in between two steps; requests may name it afterwards.

        Args:
            key: its own; never one that was there before.
            adapter: its updates of the model's layers, which run in one batch with the base; or
                steps of a model of its own, which run by turns with it.

        Raises:
            EngineError: there is no memory for it, which harms nothing else; or the engine has
                failed.
        """
        self.check_health()
        done: Future[None] = Future()
        self._attaching.add(done)

        def attach() -> None:
            try:
                if isinstance(adapter, BatchScheduler):
                    self._own[key] = adapter
                else:
                    self._stepper.attach(key, adapter)
            except RuntimeError as error:
                done.set_exception(EngineError(f"the adapter can't be attached: {error}"))
            else:
                done.set_result(None)

        self._do(attach)
        # The thread may have ended since, and told those that it knew of.
        if self._failure is not None and not done.done():
            raise self._failure
        try:
            await asyncio.shield(asyncio.wrap_future(done))
        finally:
            self._attaching.discard(done)

    def detach(self, key: Hashable) -> None:
        """Let an adapter go before the next step; no request has it any more."""

        def detach() -> None:
            if self._own.pop(key, None) is None:
                self._stepper.detach(key)

        self._do(detach)

    def check_health(self) -> None:
        """Raise EngineError where nothing can be generated any more."""
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """End the thread; what still runs ends with an EngineError."""
        with self._wake:
            self._is_closed = True
            self._wake.notify()
        self._thread.join()

    def _do(self, action: Callable[[], None]) -> None:
        """Let the thread do something between two passes."""
        with self._wake:
            self._todo.append(action)
            self._wake.notify()

    def _run(self) -> None:
        try:
            while self._work():
                pass
            failure = EngineError("the engine was closed")
        except BaseException as error:
            # Whoever waits must hear of it: a thread's error reaches nobody else.
            logger.exception("the engine has failed")
            failure = EngineError(f"the engine has failed: {error!r}")
            failure.__cause__ = error
        self._failure = failure
        for listener in list(self._listeners.values()):
            listener(failure)
        for done in list(self._attaching):
            if not done.done():
                done.set_exception(failure)

    def _work(self) -> bool:
        """Do what is asked, then a pass of each kind; wait where there is nothing. False: over."""
        with self._wake:
            while not (self._todo or self._is_closed or self._busy()):
                self._wake.wait()
            if self._is_closed:
                return False
            todo, self._todo = self._todo, []
        for action in todo:
            action()
        for worker in self._busy():
            for item in worker.step():
                listener = self._listeners.get(item.key)
                if listener is not None:
                    listener(item)
        return True

    def _busy(self) -> list[BatchScheduler | Embedder]:
        """Return those that have something to do."""
        steppers = (self._stepper, *self._own.values())
        busy: list[BatchScheduler | Embedder] = [
            s for s in steppers if s.num_running or s.num_waiting
        ]
        return [*busy, self._embedder] if self._embedder.num_jobs else busy
