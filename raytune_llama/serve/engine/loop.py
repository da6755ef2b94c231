"""The engine around a transformers model: one step loop for all requests, in its own thread."""

import asyncio
import itertools
import logging
import threading
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

from raytune_llama.serve.engine.embed import Embedder, EmbeddingOutput
from raytune_llama.serve.engine.lora import LoraLayerWeights
from raytune_llama.serve.engine.protocol import EngineRequest, TokenOutput, Vectors
from raytune_llama.serve.engine.scheduler import BatchScheduler
from raytune_llama.serve.errors import BusyError, EngineError

logger = logging.getLogger(__name__)

T = TypeVar("T", TokenOutput, EmbeddingOutput)
"""What the engine thread delivers to a request."""

_Inbox = asyncio.Queue[TokenOutput | EmbeddingOutput | EngineError]


class TransformersEngine:
    """Runs a step loop around a transformers model in its own thread."""

    def __init__(self, stepper: BatchScheduler, *, max_waiting: int) -> None:
        """Start the thread.

        Args:
            stepper: scheduler around the model; only the thread uses it from here on.
            max_waiting: maximum sequences waiting for a slot; also of jobs for embeddings.
        """
        self._stepper, self._max_waiting = stepper, max_waiting
        # Schedulers of adapters that are merged into a copy of the model.
        self._own: dict[Hashable, BatchScheduler] = {}
        self._attaching: set[Future[None]] = set()
        self._embedder = stepper.build_embedder()
        self._keys = itertools.count()
        # Sequences and jobs, running or waiting, by who works on them.
        self._num_open: Counter[BatchScheduler | Embedder] = Counter()
        self._wake = threading.Condition()
        self._todo: list[Callable[[], None]] = []
        self._inboxes: dict[Hashable, tuple[asyncio.AbstractEventLoop, _Inbox]] = {}
        self._failure: EngineError | None = None
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def capacity(self) -> int:
        """Maximum number of sequences, running and waiting."""
        return self._stepper.num_slots + self._max_waiting

    def generate(self, generation: EngineRequest) -> AsyncGenerator[TokenOutput, None]:
        """Yield a request's tokens; see `InferenceEngine`."""
        self.check_health()
        stepper = self._own.get(generation.adapter, self._stepper)
        if stepper is not self._stepper:
            generation = replace(generation, adapter=None)
        stepper.check(generation)
        key = next(self._keys)
        return self._follow(
            key,
            stepper,
            start=lambda: stepper.add(key, generation),
            is_last=lambda step: step.finish_reason is not None,
        )

    async def embed(self, texts: Sequence[tuple[int, ...]]) -> AsyncGenerator[Vectors, None]:
        """Yield the embeddings of texts; see `InferenceEngine`."""
        self.check_health()
        self._embedder.check(texts)
        key = next(self._keys)
        outputs: AsyncGenerator[EmbeddingOutput, None] = self._follow(
            key,
            self._embedder,
            start=lambda: self._embedder.add(key, texts),
            is_last=lambda output: output.is_last,
        )
        async with aclosing(outputs):
            async for output in outputs:
                yield output.vectors

    async def _follow(
        self,
        key: Hashable,
        worker: BatchScheduler | Embedder,
        *,
        start: Callable[[], None],
        is_last: Callable[[T], bool],
    ) -> AsyncGenerator[T, None]:
        """Yield the items that the thread delivers for a request, up to its last.

        If the caller leaves before the last item, the thread removes the request from its worker.
        """
        if self._num_open[worker] >= worker.num_slots + self._max_waiting:
            raise BusyError(
                f"queue full: {worker.num_slots} requests are running and {self._max_waiting} "
                "are waiting; retry later"
            )
        self._num_open[worker] += 1
        inbox: _Inbox = asyncio.Queue()
        self._inboxes[key] = asyncio.get_running_loop(), inbox
        self._do(start)
        is_over = False
        try:
            # The thread may have ended meanwhile, and notified only the inboxes that it knew of.
            self.check_health()
            while not is_over:
                item: Any = await inbox.get()
                if isinstance(item, EngineError):
                    is_over = True
                    raise item
                is_over = is_last(item)
                yield item
        finally:
            self._inboxes.pop(key, None)
            self._num_open[worker] -= 1
            if not self._num_open[worker]:
                del self._num_open[worker]  # a merged copy of the model must not be kept
            if not is_over:
                # The caller has left: free its slot before the next pass.
                self._do(lambda: worker.remove(key))

    async def attach(self, key: Hashable, updates: Mapping[str, LoraLayerWeights]) -> None:
        """Attach an adapter between two steps; see `AdapterEngine`."""
        await self._attach(lambda: self._stepper.attach(key, updates))

    async def attach_copy(self, key: Hashable, copy: BatchScheduler) -> None:
        """Attach an adapter that is merged into a copy of the model, which takes turns with it.

        Args:
            key: unique key of the adapter, never reused.
            copy: scheduler of the copy.

        Raises:
            EngineError: the engine has failed.
        """

        def attach() -> None:
            self._own[key] = copy

        await self._attach(attach)

    async def _attach(self, action: Callable[[], None]) -> None:
        """Run an action between two steps, and wait until it is done."""
        self.check_health()
        done: Future[None] = Future()
        self._attaching.add(done)

        def attach() -> None:
            try:
                action()
            except RuntimeError as error:
                done.set_exception(EngineError(f"the adapter can't be attached: {error}"))
            else:
                done.set_result(None)

        self._do(attach)
        # The thread may have ended meanwhile, and failed only the futures that it knew of.
        if self._failure is not None and not done.done():
            raise self._failure
        try:
            await asyncio.shield(asyncio.wrap_future(done))
        finally:
            self._attaching.discard(done)

    def detach(self, key: Hashable) -> None:
        """Detach an adapter before the next step; no request may use it any more."""

        def detach() -> None:
            if self._own.pop(key, None) is None:
                self._stepper.detach(key)

        self._do(detach)

    def check_health(self) -> None:
        """Raise EngineError if the engine can't generate any more."""
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Stop the thread; running requests end with an EngineError."""
        with self._wake:
            self._is_closed = True
            self._wake.notify()
        self._thread.join()

    def _do(self, action: Callable[[], None]) -> None:
        """Queue an action that the thread runs between two passes."""
        with self._wake:
            self._todo.append(action)
            self._wake.notify()

    def _run(self) -> None:
        try:
            while self._work():
                pass
            failure = EngineError("the engine was closed")
        except BaseException as error:
            # Passed on to all waiting requests, which would not see an exception in a thread.
            logger.exception("the engine thread has failed; all its requests end with an error")
            failure = EngineError(f"the engine has failed: {error!r}")
            failure.__cause__ = error
        self._failure = failure
        self._deliver((key, failure) for key in list(self._inboxes))
        for done in list(self._attaching):
            if not done.done():
                done.set_exception(failure)

    def _work(self) -> bool:
        """Run queued actions, then a pass per busy worker; wait if idle. Return False if closed."""
        with self._wake:
            while not (self._todo or self._is_closed or self._busy()):
                self._wake.wait()
            if self._is_closed:
                return False
            todo, self._todo = self._todo, []
        for action in todo:
            action()
        for worker in self._busy():
            self._deliver((item.key, item) for item in worker.step())
        return True

    def _deliver(
        self, items: Iterable[tuple[Hashable, TokenOutput | EmbeddingOutput | EngineError]]
    ) -> None:
        """Put items into the inboxes of their requests: one wake-up of an event loop per pass."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Inbox, Any]]] = defaultdict(list)
        for key, item in items:
            loop, inbox = self._inboxes.get(key, (None, None))
            if loop is not None and inbox is not None:
                by_loop[loop].append((inbox, item))
        for loop, pairs in by_loop.items():
            loop.call_soon_threadsafe(_put_all, pairs)

    def _busy(self) -> list[BatchScheduler | Embedder]:
        """Return the schedulers and the embedder that have work to do."""
        steppers = (self._stepper, *self._own.values())
        busy: list[BatchScheduler | Embedder] = [
            s for s in steppers if s.num_running or s.num_waiting
        ]
        return [*busy, self._embedder] if self._embedder.jobs else busy


def _put_all(pairs: Iterable[tuple[_Inbox, Any]]) -> None:
    for inbox, item in pairs:
        inbox.put_nowait(item)
