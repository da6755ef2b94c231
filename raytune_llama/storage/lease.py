"""One writer in a run directory: who holds it, and whether that holder still lives.

A driver that wants the directory writes a claim, `.lease/00000007-<owner>.json`, with a number one
higher than any there; the highest number holds. Object storage has no way to write a file only
where none is, so two that start together may take the same number: both wait until any claim that
did not see theirs is there, look again, and the one whose owner sorts first has it. A claim that
took too long to write to keep to that is withdrawn.

The holder writes its claim anew every few seconds. Another driver refuses to start while that goes
on. A holder whose process is gone from this machine is dead at once; one elsewhere is dead when its
claim stays as it is for some time by the clock of who looks: no two clocks are compared. A holder
that was only asleep is fenced: the number of its successor is higher, so that `check_lease` raises
and it publishes nothing.
"""

import logging
import threading
import time
import uuid
from dataclasses import dataclass
from typing import Any, Self

from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import ConfigError
from raytune_llama.storage.place import Place
from raytune_llama.storage.process import ProcessIdentity

logger = logging.getLogger(__name__)

LEASE_FOLDER = ".lease"
_ATTEMPTS = 8


class LeaseError(UserError):
    """The run directory is another driver's now."""


@dataclass(frozen=True)
class LeaseTimes:
    """Durations of the protocol, in seconds; the same for all drivers of a run directory."""

    settle_seconds: float = 2.0
    """A claim may take so long to write, and others wait for it so long."""

    heartbeat_seconds: float = 5.0
    """Between two signs of life."""

    stale_seconds: float = 60.0
    """Without a sign of life, after which a holder counts as dead."""


@dataclass(frozen=True)
class Fence:
    """What a worker shows to publish: plain, and small enough for every message."""

    run_dir: Place
    """The directory."""

    number: int
    """The number under which it may be written to."""

    def check(self) -> None:
        """Raise where the directory has gone to another driver; see `check_lease`."""
        check_lease(self.run_dir, self.number)


def check_lease(run_dir: Place, number: int) -> None:
    """Refuse to publish under a lease that is another's; costs one listing.

    Raises:
        LeaseError: a driver with a higher number holds the directory.
        OSError: the directory cannot be reached.
    """
    newer = [claim for claim in _claims(run_dir) if _number(claim) > number]
    if newer:
        raise LeaseError(
            f"run_dir: {run_dir} was taken by another driver (lease {_number(newer[-1])}, this "
            f"run's is {number}), after this one had given no sign of life; nothing more of this "
            "one is saved"
        )


class Lease:
    """A driver's claim on a run directory, from `with` on; it holds once `confirm` has returned."""

    def __init__(self, run_dir: Place, times: LeaseTimes | None = None) -> None:
        self._run_dir = run_dir
        self._times = times or LeaseTimes()
        self._owner = uuid.uuid4().hex
        self._number = 0
        self._beats = 0
        self._claimed = 0.0
        self._is_confirmed = False
        self._existed = True
        self._lost: str | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="lease", daemon=True)

    def __enter__(self) -> Self:
        """Claim the directory, once its holder is dead or has released it.

        Raises:
            ConfigError: another driver holds it; says who.
            OSError: the directory cannot be written to, or far too slowly.
        """
        self._existed = self._run_dir.exists()
        for _ in range(_ATTEMPTS):
            dead = self._wait_for_holder()
            start = time.monotonic()
            top = _top_claims(self._run_dir)
            if any(_is_held(says) and dead.get(claim) != says for claim, says in top.items()):
                continue  # by one that was quicker
            self._number = max((_number(claim) for claim in top), default=0) + 1
            try:
                self._write()
            except FileNotFoundError:
                continue  # another driver has just left, and taken the folder along
            self._claimed = time.monotonic()
            if self._claimed - start < self._times.settle_seconds:
                self._thread.start()
                return self
            self._place.delete()
        self._clear()
        raise OSError(
            f"run_dir: a small file in {self._run_dir} takes more than "
            f"{self._times.settle_seconds:g} s to "
            "write, time after time; check the storage"
        )

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self._thread.join()
        if self._is_confirmed:
            if self._lost is None:
                # Kept, as the next holder's number has to be higher.
                self._write(released=True)
        else:
            self._place.delete()
        self._clear()

    def _clear(self) -> None:
        """Leave nothing behind where no run has begun, whose workers could know a number."""
        folders = [folder.name for folder in self._run_dir.folders()]
        if self._run_dir.files() or folders not in ([], [LEASE_FOLDER]):
            return
        self._place.delete()
        # What another driver has written there meanwhile stays, and so does the folder.
        _folder(self._run_dir).delete_empty()
        if not self._existed:
            self._run_dir.delete_empty()

    def confirm(self) -> Fence:
        """Wait out the claims of others that started together; then hold the directory.

        Raises:
            ConfigError: one of them has it; says who.
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
        """Why the directory is this driver's no more; None while it is."""
        return self._lost

    @property
    def _place(self) -> Place:
        return _folder(self._run_dir) / f"{self._number:08d}-{self._owner}.json"

    def _write(self, *, released: bool = False) -> None:
        self._beats += 1
        process = ProcessIdentity.current().to_json()
        self._place.write_json({"process": process, "beats": self._beats, "released": released})

    def _wait_for_holder(self) -> dict[Place, dict[str, Any] | None]:
        """Return the newest claims once none of them is a living holder's.

        Raises:
            ConfigError: the holder lives.
        """
        then = _top_claims(self._run_dir)
        held = {claim: says for claim, says in then.items() if _is_held(says)}
        start = time.monotonic()
        if held:
            names = " and ".join(_name(says) for says in held.values())
            logger.info("run_dir: %s is held by %s; is there a sign of life?", self._run_dir, names)
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
                logger.warning("run_dir: no sign of life could be written: %s", error)


def _folder(run_dir: Place) -> Place:
    return run_dir / LEASE_FOLDER


def _claims(run_dir: Place) -> list[Place]:
    """Return all claims, the lowest first."""
    return [file for file in _folder(run_dir).files() if _number(file)]


def _top_claims(run_dir: Place) -> dict[Place, dict[str, Any] | None]:
    """Return the claims of the highest number, one but for a race, and what they say."""
    claims = _claims(run_dir)
    return {c: _read(c) for c in claims if _number(c) == _number(claims[-1])}


def _number(claim: Place) -> int:
    digits = claim.name.partition("-")[0]
    return int(digits) if digits.isdecimal() else 0  # a temporary name


def _read(claim: Place) -> dict[str, Any] | None:
    """Return what a claim says; None where it was withdrawn."""
    try:
        content = claim.read_json()
    except FileNotFoundError:
        return None
    return content if isinstance(content, dict) else None


def _is_held(claim: dict[str, Any] | None) -> bool:
    """Whether a claim's owner may be alive."""
    if claim is None or claim["released"]:
        return False
    return ProcessIdentity.from_json(claim["process"]).has_exited is not True


def _name(claim: dict[str, Any] | None) -> str:
    return (
        str(ProcessIdentity.from_json(claim["process"]))
        if claim
        else "a driver that has just ended"
    )


def _lease_held_error(run_dir: Place, claim: dict[str, Any] | None) -> ConfigError:
    return ConfigError(
        [
            f"run_dir: {run_dir} is held by another driver, {_name(claim)}; wait until it has "
            "ended, stop it, or name another run_dir"
        ]
    )
