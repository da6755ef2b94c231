"""Which adapters are in memory, who uses them, and which version a request gets.

A request keeps the version that it starts with. When the registry has a new one, requests that
come then wait until it is loaded and get it. If that takes longer than `NEW_VERSION_SECONDS`, or
fails, they get the old one meanwhile, which is dropped after its last request. Everything here runs
on one event loop; only reading files runs in threads.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from raytune_llama.config.errors import UserError
from raytune_llama.serve.adapters.registry import AdapterRegistry, RegisteredAdapter, RegistryError
from raytune_llama.serve.engine.protocol import AdapterEngine
from raytune_llama.serve.errors import (
    BusyError,
    EngineError,
    InvalidRequestError,
    UnknownModelError,
)
from raytune_llama.serve.generation.completion import CompletionService
from raytune_llama.serve.generation.model import ServedModel
from raytune_llama.serve.generation.output import OutputDelta, Stream
from raytune_llama.serve.protocol.chat import ChatRequest
from raytune_llama.serve.protocol.completions import CompletionRequest

if TYPE_CHECKING:  # it imports PEFT, which takes seconds
    from raytune_llama.serve.adapters.loading import AdapterLoader, LoadedAdapter

logger = logging.getLogger(__name__)

NEW_VERSION_SECONDS = 10.0
"""Maximum wait for a new version of an adapter while the old one can answer."""

_NUM_ATTEMPTS = 3
"""Maximum reads of an adapter that is being written meanwhile."""


@dataclass(eq=False)
class _Version:
    """A version of an adapter, loaded or being loaded."""

    listed: RegisteredAdapter
    key: int
    """Key of the adapter in the engine."""

    loading: "asyncio.Task[CompletionService]" = field(init=False)
    started: float = field(default_factory=time.monotonic)
    num_users: int = 0
    last_use: int = 0
    is_retired: bool = False
    """Whether no further request gets this version."""

    @property
    def problem(self) -> BaseException | None:
        """Why loading failed; None if it succeeded or is still running."""
        if not self.loading.done():
            return None
        with suppress(asyncio.CancelledError):
            return self.loading.exception()
        return EngineError("loading was canceled")


@dataclass(eq=False)
class _Slot:
    """An adapter in memory."""

    current: _Version
    newer: _Version | None = None
    """Version that is being loaded to replace the current one."""


class AdapterPool:
    """Answers requests for a base model and its adapters."""

    def __init__(
        self,
        base: CompletionService,
        registry: AdapterRegistry,
        loader: "AdapterLoader",
        engine: AdapterEngine,
        *,
        make_answerer: Callable[[ServedModel, Hashable | None], CompletionService],
        attach_copy: Callable[[Hashable, ServedModel], Awaitable[None]] | None,
        max_adapters: int,
    ) -> None:
        """Start without adapters in memory.

        Args:
            base: answers requests without an adapter.
            registry: lists and fetches the adapters.
            loader: loads adapters.
            engine: engine of the base model.
            make_answerer: creates the service for an attached adapter, by its key.
            attach_copy: attaches a copy of the base with a merged adapter to the engine; None: the
                loader makes no copies.
            max_adapters: maximum adapters in memory; old versions in use come on top.
        """
        self._base, self._registry, self._loader, self._engine = base, registry, loader, engine
        self._make_answerer, self._attach_copy = make_answerer, attach_copy
        self._max_adapters = max_adapters
        self._slots: dict[str, _Slot] = {}
        # Version and error of the last failure, so that it is not read again for every request.
        self._failed: dict[str, tuple[str, str]] = {}
        # Versions whose settings were checked, by name.
        self._checked: dict[str, str] = {}
        self._keys, self._uses = itertools.count(), itertools.count()

    @property
    def loaded_names(self) -> frozenset[str]:
        """Names of the adapters in memory or being loaded."""
        return frozenset(self._slots)

    async def respond(self, request: ChatRequest | CompletionRequest) -> Stream[OutputDelta]:
        """Return what `CompletionService.respond` returns, with the adapter that a request names.

        Raises:
            UnknownModelError: the adapter does not exist.
            InvalidRequestError: the adapter can't be used, or the request can't be answered.
            BusyError: all adapters in memory are in use.
            EngineError: the registry can't be read.
        """
        _, colon, name = request.model.partition(":")
        if not colon:
            return await self._base.respond(request)
        version = await self._find(name)
        # Held until the stream is closed.
        version.num_users += 1
        version.last_use = next(self._uses)

        def release() -> None:
            version.num_users -= 1
            self._drop_unused(version)

        try:
            # Other requests wait for it too: one that is canceled must not cancel the loading.
            answerer = await asyncio.shield(version.loading)
            stream = await answerer.respond(request)
        except BaseException:
            release()
            raise
        return replace(stream, release=release)

    async def _find(self, name: str) -> _Version:
        """Return the version of an adapter that a request gets, which may still be loading."""
        names = await asyncio.to_thread(self._registry.list)
        listed = names.get(name)
        if listed is None:
            self._forget(name)
            base = self._base.name
            known = [base, *(f"{base}:{one}" for one in self._usable(names))]
            raise UnknownModelError(f"{base}:{name}", known)
        slot = self._choose(listed)
        if slot.newer is None:
            return slot.current
        left = slot.newer.started + NEW_VERSION_SECONDS - time.monotonic()
        await asyncio.wait([slot.newer.loading], timeout=max(0.0, left))
        # It may have been removed meanwhile.
        return slot.current if self._slots.get(name) is slot else await self._find(name)

    async def names(self) -> list[str]:
        """Return the names of the adapters in the registry that can be used, sorted.

        Raises:
            EngineError: the registry can't be read.
        """
        listed = await asyncio.to_thread(self._registry.list)
        new = [
            one
            for name, one in listed.items()
            if name not in self._slots and self._checked.get(name) != one.version
        ]
        for one, problem in await asyncio.to_thread(self._find_problems, new):
            self._checked[one.name] = one.version
            if problem is not None and one.name not in self._slots:
                self._failed[one.name] = one.version, f"adapter {one.name}: {problem}"
                logger.error("adapter %s, version %s: %s", one.name, one.version, problem)
        return self._usable(listed)

    def _find_problems(
        self, listed: Sequence[RegisteredAdapter]
    ) -> list[tuple[RegisteredAdapter, str | None]]:
        """Return why adapters can't be used, as far as their settings show; those on this disk."""
        local = [one for one in listed if one.place.is_local]
        return [(one, self._loader.find_problem(one.place.path)) for one in local]

    def _usable(self, listed: Mapping[str, RegisteredAdapter]) -> list[str]:
        """Return the sorted names without those whose current version is known to be unusable."""
        return sorted(
            name
            for name, one in listed.items()
            if name in self._slots or self._failed.get(name, ("",))[0] != one.version
        )

    def _choose(self, listed: RegisteredAdapter) -> _Slot:
        """Return the versions of an adapter in memory, after starting to load the listed one."""
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
        return slot

    def _start(self, listed: RegisteredAdapter) -> _Version:
        version = _Version(listed, next(self._keys))
        version.loading = asyncio.create_task(self._load(version))
        version.loading.add_done_callback(lambda _: self._settle(version))
        return version

    def _settle(self, version: _Version) -> None:
        """Handle the end of a version's loading."""
        name, problem = version.listed.name, version.problem
        slot = self._slots.get(name)
        if slot is not None and slot.newer is version:
            slot.newer = None
            if problem is None:
                old, slot.current = slot.current, version
                self._retire(old)
            else:
                logger.error(
                    "adapter %s: its new version can't be loaded, so the old one stays in use: %s",
                    name,
                    problem,
                )
        elif slot is not None and slot.current is version and problem is not None:
            del self._slots[name]
        # It may have been retired while it was loading.
        self._drop_unused(version)

    async def _load(self, version: _Version) -> CompletionService:
        """Load an adapter and attach it to the engine."""
        name = version.listed.name
        try:
            # The version that is read may be newer than the one listed.
            version.listed, loaded = await asyncio.to_thread(self._read, version.listed)
            await self._attach(version, loaded)
        except _UnfitError as error:
            self._failed[name] = error.version, f"adapter {name}: {error}"
            logger.error("adapter %s, version %s: %s", name, error.version, error)  # noqa: TRY400
            raise InvalidRequestError(f"adapter {name}: {error}", "model") from error
        self._failed.pop(name, None)
        logger.info("adapter %s, version %s: loaded", name, version.listed.version)
        return self._make_answerer(loaded.served, version.key)

    async def _attach(self, version: _Version, loaded: "LoadedAdapter") -> None:
        if loaded.updates is None:
            assert self._attach_copy is not None, "the loader makes no copies"
            await self._attach_copy(version.key, loaded.served)
            return
        try:
            await self._engine.attach(version.key, loaded.updates)
        except UserError as error:
            raise _UnfitError(str(error), version.listed.version) from error

    def _read(self, listed: RegisteredAdapter) -> "tuple[RegisteredAdapter, LoadedAdapter]":
        """Read an adapter; retry if it is written meanwhile."""
        for _ in range(_NUM_ATTEMPTS):
            loaded, problem = None, ""
            try:
                with self._registry.fetch(listed) as folder:
                    try:
                        loaded = self._loader.load(folder, f"{self._base.name}:{listed.name}")
                    except ValueError as error:
                        # Clients see names of adapters, not directories.
                        problem = str(error).replace(str(folder), listed.name)
            except OSError as error:
                logger.warning("%s can't be read: %s", listed.place, error)
                raise RegistryError(
                    f"the adapter {listed.name} can't be read; retry later"
                ) from error
            found = self._registry.list(refresh=True).get(listed.name)
            if found is None:
                raise RegistryError(f"the adapter {listed.name} was removed")
            if found.version == listed.version:
                if loaded is None:
                    raise _UnfitError(problem, listed.version)
                return listed, loaded
            listed = found
        raise RegistryError(f"the adapter {listed.name} is being written; retry later")

    def _make_room(self) -> None:
        """Evict the least recently used idle adapter if the memory limit is reached."""
        if len(self._slots) < self._max_adapters:
            return
        idle = [
            (slot.current.last_use, name)
            for name, slot in self._slots.items()
            if not slot.current.num_users and slot.newer is None and slot.current.loading.done()
        ]
        if not idle:
            raise BusyError(f"all {self._max_adapters} adapters in memory are in use; retry later")
        _, name = min(idle)
        logger.info("adapter %s: evicted to make room for another", name)
        self._forget(name)

    def _forget(self, name: str) -> None:
        """Retire an adapter: no further request gets it."""
        slot = self._slots.pop(name, None)
        for version in (slot.current, slot.newer) if slot is not None else ():
            if version is not None:
                self._retire(version)

    def _retire(self, version: _Version) -> None:
        version.is_retired = True
        self._drop_unused(version)

    def _drop_unused(self, version: _Version) -> None:
        """Detach a retired version from the engine once no request uses it."""
        is_idle = version.is_retired and not version.num_users and version.loading.done()
        if is_idle and version.problem is None:
            version.is_retired = False
            logger.info(
                "adapter %s, version %s: dropped", version.listed.name, version.listed.version
            )
            self._engine.detach(version.key)


class _UnfitError(ValueError):
    """A version of an adapter can't be used."""

    def __init__(self, message: str, version: str) -> None:
        super().__init__(message, version)
        self.message, self.version = message, version

    def __str__(self) -> str:
        return self.message
