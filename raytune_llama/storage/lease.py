"""Lease on a run directory: at most one driver writes to it, with heartbeats and fencing.

A driver acquires the directory by writing a claim, `.lease/00000007-<owner>.json`, with a number
one higher than any existing claim; the highest number holds the lease. Object storage can't create
a file only if it does not exist, so two drivers that start together may take the same number: both
wait until every concurrent claim is visible, read the claims again, and the owner that sorts first
wins. A claim that took longer to write than this wait is withdrawn.

The holder rewrites its claim every few seconds as a heartbeat. Other drivers refuse to start while
heartbeats continue. A holder whose process has exited on this machine is dead at once; one on
another machine is dead if its claim stays unchanged for some time by the observer's clock: no two
clocks are compared. A holder that was only paused is fenced: its successor's number is higher, so
`check_lease` raises and it publishes nothing.
"""

import logging
import threading
import time
import uuid
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import ConfigError
from raytune_llama.storage.place import Place
from raytune_llama.storage.process import ProcessIdentity

logger = logging.getLogger(__name__)

LEASE_FOLDER = ".lease"
_ATTEMPTS = 8
_CAUSE_CHARACTERS = 2000


class LeaseError(UserError):
    """Another driver has taken over the run directory."""


@dataclass(frozen=True)
class LeaseTimes:
    """Durations of the lease protocol; must be the same for all drivers of a run directory."""

    settle_seconds: float = 2.0
    """Time limit for writing a claim, and wait for concurrent claims; in seconds."""

    heartbeat_seconds: float = 5.0
    """Heartbeat interval, in seconds."""

    stale_seconds: float = 60.0
    """Time without a heartbeat after which a holder is considered dead, in seconds."""


@dataclass(frozen=True)
class Fence:
    """Fencing token that a worker checks before it publishes; small enough for every message."""

    run_dir: Place
    """The run directory."""

    number: int
    """Number of the lease that permits writing."""

    def check(self) -> None:
        """Raise if another driver has taken over the directory; see `check_lease`."""
        check_lease(self.run_dir, self.number)


def check_lease(run_dir: Place, number: int) -> None:
    """Check that a lease is still held, before publishing under it; costs one listing.

    Raises:
        LeaseError: A driver with a higher number holds the directory.
        OSError: The directory cannot be reached.
    """
    newer = [claim for claim in _claims(run_dir) if _number(claim) > number]
    if newer:
        raise LeaseError(
            f"run_dir: {run_dir} was taken over by another driver (lease {_number(newer[-1])}, "
            f"this driver's is {number}) because this driver's heartbeat stopped; this driver "
            "saves nothing more"
        )


@dataclass(frozen=True)
class LeaseState:
    """The newest claim on a run directory, as its files show it."""

    process: ProcessIdentity
    """The driver that made the claim."""

    released: bool
    """Whether the driver has released the directory; a killed one has not."""

    cause: str | None
    """Error that the driver failed with; None: none, or it has not released the directory."""

    @property
    def is_held(self) -> bool | None:
        """Whether the driver holds the directory; None: it is not visible from this machine."""
        if self.released:
            return False
        has_exited = self.process.has_exited
        return None if has_exited is None else not has_exited


def read_lease(run_dir: Place) -> LeaseState | None:
    """Return the newest claim on a run directory, without waiting for a heartbeat.

    For people who look at a directory: whoever writes to it takes a `Lease`.

    Args:
        run_dir: directory of a run, a sweep or any other job.

    Returns:
        The claim; of several with the same number, one that may be held. None without a claim.

    Raises:
        UserError: a claim is not of the form that this release writes.
        OSError: the directory cannot be reached.
    """
    found: list[LeaseState] = []
    for claim, says in _top_claims(run_dir).items():
        if says is None:
            continue
        try:
            process = ProcessIdentity.from_json(says["process"])
            found.append(LeaseState(process, bool(says["released"]), says.get("cause")))
        except (KeyError, TypeError) as error:
            raise UserError(f"{claim}: not a claim of a driver ({error!r})") from error
    return min(found, key=lambda state: state.is_held is False, default=None)


class Lease:
    """A driver's claim on a run directory within a `with` block; held once `confirm` returns."""

    def __init__(self, run_dir: Place, times: LeaseTimes | None = None) -> None:
        self._run_dir = run_dir
        self._times = times or LeaseTimes()
        self._owner = uuid.uuid4().hex
        self._number = 0
        self._heartbeats = 0
        self._claimed = 0.0
        self._is_confirmed = False
        self._existed = True
        self._lost: str | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="lease", daemon=True)

    def __enter__(self) -> Self:
        """Claim the directory, once its holder is dead or has released it.

        Raises:
            ConfigError: Another driver holds it; the message names the driver.
            OSError: The directory cannot be written to, or writes are far too slow.
        """
        self._existed = self._run_dir.exists()
        for _ in range(_ATTEMPTS):
            dead = self._wait_for_holder()
            start = time.monotonic()
            top = _top_claims(self._run_dir)
            if any(_is_held(says) and dead.get(claim) != says for claim, says in top.items()):
                continue  # another driver was faster
            self._number = max((_number(claim) for claim in top), default=0) + 1
            try:
                self._write()
            except FileNotFoundError:
                continue  # another driver has just exited and deleted the folder
            self._claimed = time.monotonic()
            if self._claimed - start < self._times.settle_seconds:
                self._thread.start()
                return self
            self._place.delete()
        self._clear()
        raise OSError(
            f"run_dir: writing a small file to {self._run_dir} repeatedly took more than "
            f"{self._times.settle_seconds:g} s; check the storage"
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed.set()
        self._thread.join()
        if self._is_confirmed:
            if self._lost is None:
                # Kept, since the next holder's number must be higher.
                self._write(released=True, cause=_describe_failure(error))
        else:
            self._place.delete()
        self._clear()

    def _clear(self) -> None:
        """Remove the claim and empty folders, unless a run with workers has started here."""
        folders = [folder.name for folder in self._run_dir.folders()]
        if self._run_dir.files() or folders not in ([], [LEASE_FOLDER]):
            return
        self._place.delete()
        # The folder stays if another driver has written to it in the meantime.
        _folder(self._run_dir).delete_empty()
        if not self._existed:
            self._run_dir.delete_empty()

    def confirm(self) -> Fence:
        """Wait for concurrent claims to become visible, then hold the directory.

        Raises:
            ConfigError: Another driver holds it; the message names the driver.
        """
        time.sleep(max(0.0, self._claimed + self._times.settle_seconds - time.monotonic()))
        claims = _claims(self._run_dir)
        rivals = [claim for claim in claims if claim.name != self._place.name]
        later = [claim for claim in rivals if _number(claim) > self._number]
        same = [claim for claim in rivals if _number(claim) == self._number]
        first = [claim for claim in same if claim.name < self._place.name]
        if later or first:
            raise _lease_held_error(self._run_dir, _read([*later, *first][0]))
        self._is_confirmed = True
        for claim in claims:
            if _number(claim) < self._number:
                claim.delete()
        return Fence(self._run_dir, self._number)

    @property
    def lost_reason(self) -> str | None:
        """Why this driver lost the directory; None while it holds it."""
        return self._lost

    @property
    def _place(self) -> Place:
        return _folder(self._run_dir) / f"{self._number:08d}-{self._owner}.json"

    def _write(self, *, released: bool = False, cause: str | None = None) -> None:
        self._heartbeats += 1
        process = ProcessIdentity.current().to_json()
        claim = {"process": process, "beats": self._heartbeats, "released": released}
        self._place.write_json({**claim, "cause": cause})

    def _wait_for_holder(self) -> dict[Place, dict[str, Any] | None]:
        """Return the newest claims once none of them belongs to a live holder.

        Raises:
            ConfigError: The holder is alive.
        """
        then = _top_claims(self._run_dir)
        held = {claim: says for claim, says in then.items() if _is_held(says)}
        start = time.monotonic()
        if held:
            names = " and ".join(_name(says) for says in held.values())
            logger.info(
                "run_dir: %s is locked by %s; waiting up to %g s for its heartbeat",
                *(self._run_dir, names, self._times.stale_seconds),
            )
        while held and time.monotonic() - start <= self._times.stale_seconds:
            time.sleep(min(1.0, self._times.heartbeat_seconds / 4))
            for claim, says in list(held.items()):
                now = _read(claim)
                if not _is_held(now):
                    del held[claim]
                elif now != says:
                    raise _lease_held_error(self._run_dir, now)
        return then

    def _keep_alive(self) -> None:
        while not self._closed.wait(self._times.heartbeat_seconds):
            try:
                check_lease(self._run_dir, self._number)
                self._write()
            except LeaseError as error:
                self._lost = str(error)
                return
            except OSError as error:
                logger.warning("run_dir: could not write the heartbeat: %s", error)


def _folder(run_dir: Place) -> Place:
    return run_dir / LEASE_FOLDER


def _claims(run_dir: Place) -> list[Place]:
    """Return all claims, lowest number first."""
    return [file for file in _folder(run_dir).files() if _number(file)]


def _top_claims(run_dir: Place) -> dict[Place, dict[str, Any] | None]:
    """Return the claims with the highest number and their contents; one, except in a race."""
    claims = _claims(run_dir)
    return {c: _read(c) for c in claims if _number(c) == _number(claims[-1])}


def _number(claim: Place) -> int:
    digits = claim.name.partition("-")[0]
    return int(digits) if digits.isdecimal() else 0  # a temporary file


def _read(claim: Place) -> dict[str, Any] | None:
    """Return the content of a claim; None if it was withdrawn."""
    try:
        content = claim.read_json()
    except FileNotFoundError:
        return None
    return content if isinstance(content, dict) else None


def _is_held(claim: dict[str, Any] | None) -> bool:
    """Whether the owner of a claim may still be alive."""
    if claim is None or claim["released"]:
        return False
    return ProcessIdentity.from_json(claim["process"]).has_exited is not True


def _describe_failure(error: BaseException | None) -> str | None:
    """Return the error that ends a driver, for people; None if it was only interrupted."""
    if error is None or not isinstance(error, Exception):
        return None
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return text[:_CAUSE_CHARACTERS]


def _name(claim: dict[str, Any] | None) -> str:
    return (
        str(ProcessIdentity.from_json(claim["process"]))
        if claim
        else "a driver that has just exited"
    )


def _lease_held_error(run_dir: Place, claim: dict[str, Any] | None) -> ConfigError:
    return ConfigError(
        [
            f"run_dir: {run_dir} is locked by another driver, {_name(claim)}; wait until it exits, "
            "stop it, or set another run_dir"
        ]
    )
