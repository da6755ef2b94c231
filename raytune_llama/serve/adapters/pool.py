"""Which adapters are in memory, who uses them, and which version a request gets.

A request keeps the version that it begins with. When another lies in the registry, requests get
the old one until the new one is loaded, then the new one; the old one goes with its last request.
Everything here runs on one event loop; only reading runs in threads.
"""

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Hashable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field

from raytune_llama.serve.adapters.loading import AdapterLoader, LoadedAdapter
from raytune_llama.serve.adapters.registry import AdapterRegistry, RegisteredAdapter, RegistryError
from raytune_llama.serve.engine.loop import TransformersEngine
from raytune_llama.serve.engine.scheduler import BatchScheduler
from raytune_llama.serve.errors import (
    BusyError,
    EngineError,
    InvalidRequestError,
    UnknownModelError,
)
from raytune_llama.serve.generation.completion import CompletionService
from raytune_llama.serve.generation.model import ServedModel
from raytune_llama.serve.generation.output import OutputDelta
from raytune_llama.serve.protocol.chat import ChatRequest, CompletionRequest

logger = logging.getLogger(__name__)

_SHOWN_NAMES = 20
_NUM_ATTEMPTS = 3
"""Times that an adapter is read which is written meanwhile."""


@dataclass(eq=False)
class _Version:
    """A version of an adapter, loaded or being loaded."""

    listed: RegisteredAdapter
    key: int
    """The engine's."""

    loading: "asyncio.Task[CompletionService]" = field(init=False)
    num_users: int = 0
    last_use: int = 0
    is_retired: bool = False
    """No further request gets it."""

    @property
    def problem(self) -> BaseException | None:
        """Why it could not be loaded."""
        if not self.loading.done():
            return None
        with suppress(asyncio.CancelledError):
            return self.loading.exception()
        return EngineError("loading was ended")


@dataclass(eq=False)
class _Slot:
    """An adapter in memory."""

    current: _Version
    newer: _Version | None = None
    """Being loaded, to take its place."""


class AdapterPool:
    """Answers for a base and its adapters."""

    def __init__(
        self,
        base: CompletionService,
        registry: AdapterRegistry,
        loader: AdapterLoader,
        engine: TransformersEngine,
        *,
        make_answerer: Callable[[ServedModel, Hashable | None], CompletionService],
        make_stepper: Callable[[ServedModel], BatchScheduler],
        max_adapters: int,
    ) -> None:
        """Begin with no adapter in memory.

        Args:
            base: answers where no adapter is asked for.
            registry: where adapters lie.
            loader: loads them.
            engine: of the base.
            make_answerer: answers with an adapter, by its key.
            make_stepper: steps a copy of the base that an adapter was merged into.
            max_adapters: in memory at a time; old versions in use come on top.
        """
        self._base, self._registry, self._loader, self._engine = base, registry, loader, engine
        self._make_answerer, self._make_stepper = make_answerer, make_stepper
        self._max_adapters = max_adapters
        self._slots: dict[str, _Slot] = {}
        # What was wrong with a version, so that it is not read again for every request.
        self._failed: dict[str, tuple[str, str]] = {}
        self._keys, self._uses = itertools.count(), itertools.count()

    @property
    def names(self) -> frozenset[str]:
        """The adapters that are in memory, or being loaded."""
        return frozenset(self._slots)

    async def respond(
        self, request: ChatRequest | CompletionRequest
    ) -> AsyncGenerator[int | OutputDelta, None]:
        """Yield what `CompletionService.respond` yields, by the adapter that a request names.

        Raises:
            UnknownModelError: there is no such adapter.
            RequestError: it can't be used, or the request can't be answered.
            BusyError: as many adapters are in use as may be in memory, or too much waits.
            EngineError: the registry can't be read, or the engine has failed.
        """
        _, colon, name = request.model.partition(":")
        if not colon:
            async with aclosing(self._base.respond(request)) as items:
                async for item in items:
                    yield item
            return
        async with self._use(name) as answerer, aclosing(answerer.respond(request)) as items:
            async for item in items:
                yield item

    @asynccontextmanager
    async def _use(self, name: str) -> AsyncIterator[CompletionService]:
        """Hold a version of an adapter in memory."""
        names = await asyncio.to_thread(self._registry.list)
        listed = names.get(name)
        if listed is None:
            self._forget(name)
            known = ", ".join(sorted(names)[:_SHOWN_NAMES]) or "none"
            more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
            raise UnknownModelError(f"no adapter {name!r}; there is {known}{more}", "model")
        version = self._choose(listed)
        version.num_users += 1
        version.last_use = next(self._uses)
        try:
            # Others wait for it too, so that one that goes away must not end it.
            yield await asyncio.shield(version.loading)
        finally:
            version.num_users -= 1
            self._drop_unused(version)

    def _choose(self, listed: RegisteredAdapter) -> _Version:
        """Return the version that a request gets, which may be still to come."""
        slot = self._slots.get(listed.name)
        version, problem = self._failed.get(listed.name, (None, ""))
        is_failed = version == listed.version
        if slot is None:
            if is_failed:
                raise InvalidRequestError(problem, "model")
            self._make_room()
            slot = self._slots[listed.name] = _Slot(self._start(listed))
        elif (
            slot.current.listed.version != listed.version
            and slot.newer is None
            and slot.current.loading.done()
            and not is_failed
        ):
            slot.newer = self._start(listed)
        return slot.current

    def _start(self, listed: RegisteredAdapter) -> _Version:
        version = _Version(listed, next(self._keys))
        version.loading = asyncio.create_task(self._load(version))
        version.loading.add_done_callback(lambda _: self._settle(version))
        return version

    def _settle(self, version: _Version) -> None:
        """Look at what loading has come to."""
        name, problem = version.listed.name, version.problem
        slot = self._slots.get(name)
        if slot is not None and slot.newer is version:
            slot.newer = None
            if problem is None:
                old, slot.current = slot.current, version
                self._retire(old)
            else:
                logger.error("%s stays as it was, for its new version fails: %s", name, problem)
        elif slot is not None and slot.current is version and problem is not None:
            del self._slots[name]
        # It may have been retired before it was there.
        self._drop_unused(version)

    async def _load(self, version: _Version) -> CompletionService:
        """Read an adapter and give it to the engine."""
        name = version.listed.name
        try:
            # What is read may be newer than what was listed.
            version.listed, loaded = await asyncio.to_thread(self._read, version.listed)
        except _UnfitError as error:
            self._failed[name] = error.version, f"adapter {name}: {error}"
            logger.error("adapter %s, version %s: %s", name, error.version, error)  # noqa: TRY400
            raise InvalidRequestError(f"adapter {name}: {error}", "model") from error
        self._failed.pop(name, None)
        if loaded.updates is None:
            await self._engine.attach(version.key, self._make_stepper(loaded.served))
        else:
            await self._engine.attach(version.key, loaded.updates)
        logger.info("adapter %s, version %s: loaded", name, version.listed.version)
        return self._make_answerer(loaded.served, version.key)

    def _read(self, listed: RegisteredAdapter) -> tuple[RegisteredAdapter, LoadedAdapter]:
        """Read an adapter; where it is written in the meantime, again."""
        for _ in range(_NUM_ATTEMPTS):
            loaded, problem = None, ""
            try:
                with self._registry.fetch(listed) as folder:
                    try:
                        loaded = self._loader.load(folder, f"{self._base.name}:{listed.name}")
                    except ValueError as error:
                        # Clients are told of adapters, and not of folders.
                        problem = str(error).replace(str(folder), listed.name)
            except OSError as error:
                logger.warning("%s can't be read: %s", listed.place, error)
                raise RegistryError(f"the adapter {listed.name} can't be read now") from error
            found = self._registry.list(anew=True).get(listed.name)
            if found is None:
                raise RegistryError(f"the adapter {listed.name} is not there any more")
            if found.version == listed.version:
                if loaded is None:
                    raise _UnfitError(problem, listed.version)
                return listed, loaded
            listed = found
        raise RegistryError(f"the adapter {listed.name} is being written; try again")

    def _make_room(self) -> None:
        """Let the adapter go that was not used for longest, where as many are there as may be."""
        if len(self._slots) < self._max_adapters:
            return
        idle = [
            (slot.current.last_use, name)
            for name, slot in self._slots.items()
            if not slot.current.num_users and slot.newer is None and slot.current.loading.done()
        ]
        if not idle:
            raise BusyError(f"all {self._max_adapters} adapters that may be in memory are in use")
        _, name = min(idle)
        logger.info("%s leaves the memory for another adapter", name)
        self._forget(name)

    def _forget(self, name: str) -> None:
        """Give an adapter to no further request."""
        slot = self._slots.pop(name, None)
        for version in (slot.current, slot.newer) if slot is not None else ():
            if version is not None:
                self._retire(version)

    def _retire(self, version: _Version) -> None:
        version.is_retired = True
        self._drop_unused(version)

    def _drop_unused(self, version: _Version) -> None:
        """Take a retired version out of the engine, once nobody uses it."""
        is_idle = version.is_retired and not version.num_users and version.loading.done()
        if is_idle and version.problem is None:
            version.is_retired = False
            logger.info(
                "adapter %s, version %s: dropped", version.listed.name, version.listed.version
            )
            self._engine.detach(version.key)


class _UnfitError(ValueError):
    """A version that can't be used."""

    def __init__(self, message: str, version: str) -> None:
        super().__init__(message, version)
        self.message, self.version = message, version

    def __str__(self) -> str:
        return self.message
