"""The engine around a transformers model: the steps of all requests, in a thread of its own."""

import asyncio
import itertools
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Hashable, Mapping
from concurrent.futures import Future
from dataclasses import replace

from raytune_llama.serve.engine.base import Generation, Step
from raytune_llama.serve.engine.lora import LowRank
from raytune_llama.serve.engine.stepper import Stepper
from raytune_llama.serve.errors import BusyError, EngineError

logger = logging.getLogger(__name__)


class TransformersEngine:
    """Our own step loop around a transformers model, in a thread of its own."""

    def __init__(self, stepper: Stepper, *, max_waiting: int) -> None:
        """Start the thread.

        Args:
            stepper: around the model; from here on the thread's alone.
            max_waiting: requests that may wait for a slot.
        """
        self._stepper, self._max_waiting = stepper, max_waiting
        # Adapters that are merged into a copy of the model.
        self._own: dict[Hashable, Stepper] = {}
        self._attaching: set[Future[None]] = set()
        self._keys = itertools.count()
        self._wake = threading.Condition()
        self._todo: list[Callable[[], None]] = []
        self._listeners: dict[Hashable, Callable[[Step | EngineError], object]] = {}
        self._failure: EngineError | None = None
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def generate(self, generation: Generation) -> AsyncGenerator[Step, None]:
        """Yield a request's tokens; see `Engine`."""
        self.check()
        stepper = self._own.get(generation.adapter, self._stepper)
        if stepper is not self._stepper:
            generation = replace(generation, adapter=None)
        stepper.check(generation)
        if stepper.num_waiting + len(self._todo) >= self._max_waiting:
            raise BusyError(f"{self._max_waiting} requests are waiting already")
        key, loop = next(self._keys), asyncio.get_running_loop()
        told: asyncio.Queue[Step | EngineError] = asyncio.Queue()
        self._listeners[key] = lambda item: loop.call_soon_threadsafe(told.put_nowait, item)
        self._do(lambda: stepper.add(key, generation))
        is_over = False
        try:
            while not is_over:
                item = await told.get()
                if isinstance(item, EngineError):
                    is_over = True
                    raise item
                is_over = item.finish is not None
                yield item
        finally:
            self._listeners.pop(key, None)
            if not is_over:
                # The caller has gone: the slot is free before the next pass.
                self._do(lambda: stepper.remove(key))

    async def attach(self, key: Hashable, adapter: Mapping[str, LowRank] | Stepper) -> None:
        """Take an adapter in between two steps; requests may name it afterwards.

        Args:
            key: its own; never one that was there before.
            adapter: its updates of the model's layers, which run in one batch with the base; or
                steps of a model of its own, which run by turns with it.

        Raises:
            EngineError: there is no memory for it, which harms nothing else; or the engine has
                failed.
        """
        self.check()
        done: Future[None] = Future()
        self._attaching.add(done)

        def attach() -> None:
            try:
                if isinstance(adapter, Stepper):
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

    def check(self) -> None:
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
        """Do what is asked, then one step; wait where there is nothing. False: it is over."""
        with self._wake:
            while not (self._todo or self._is_closed or self._busy()):
                self._wake.wait()
            if self._is_closed:
                return False
            todo, self._todo = self._todo, []
        for action in todo:
            action()
        for stepper in self._busy():
            for step in stepper.step():
                listener = self._listeners.get(step.key)
                if listener is not None:
                    listener(step)
        return True

    def _busy(self) -> list[Stepper]:
        """Return those that have something to do."""
        steppers = (self._stepper, *self._own.values())
        return [stepper for stepper in steppers if stepper.num_running or stepper.num_waiting]
