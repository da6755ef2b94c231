"""Promise: a run directory has one writer at a time, and needs no human after a crash."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import ConfigError
from raytune_llama.storage.lease import (
    LEASE_FOLDER,
    Lease,
    LeaseError,
    LeaseTimes,
    check_lease,
    read_lease,
)
from raytune_llama.storage.place import Place

QUICK = LeaseTimes(settle_seconds=0.3, heartbeat_seconds=0.1, stale_seconds=1.5)
QUIET = LeaseTimes(settle_seconds=0.3, heartbeat_seconds=600, stale_seconds=600)
SLOW_DISK = LeaseTimes(settle_seconds=0.0, heartbeat_seconds=0.1, stale_seconds=1.5)

HOLDER = """
import sys, time
from pathlib import Path
from raytune_llama.storage.place import Place
from raytune_llama.storage.lease import Lease, LeaseTimes
times = LeaseTimes(settle_seconds=0.3, heartbeat_seconds=0.1, stale_seconds=1.5)
with Lease(Place.parse(sys.argv[1], "run_dir"), times) as lease:
    print(lease.confirm().number, flush=True)
    time.sleep(600)
"""


def claims(run_dir: Place) -> list[Place]:
    return list((run_dir / LEASE_FOLDER).files())


def rewrite(claim: Place, change: Callable[[dict[str, Any]], None]) -> None:
    content = claim.read_json()
    change(content)
    claim.write_json(content)


def on_another_machine(content: dict[str, Any]) -> None:
    content["released"] = False
    content["process"] |= {"boot": "another", "host": "elsewhere"}


def test_second_driver_is_refused_with_who_holds_it(run_dir: Place) -> None:
    with Lease(run_dir, QUICK) as first:
        fence = first.confirm()
        with pytest.raises(ConfigError, match=r"run_dir: .* locked by .*process \d+ on "):
            Lease(run_dir, QUICK).__enter__()
        fence.check()


def test_number_grows_with_every_owner_and_fences_those_before(run_dir: Place) -> None:
    fences = []
    for _ in range(3):
        with Lease(run_dir, QUICK) as lease:
            fences.append(lease.confirm())
            # A run that has begun leaves something behind.
            (run_dir / "identity.json").write_json({})
    numbers = [fence.number for fence in fences]
    assert numbers == sorted(set(numbers))
    fences[-1].check()
    for fence in fences[:-1]:
        with pytest.raises(LeaseError, match="another driver"):
            fence.check()
    assert len(claims(run_dir)) == 1


def test_driver_that_was_killed_is_succeeded_at_once(tmp_path: Path) -> None:
    run_dir = Place.local(tmp_path / "run")
    command = [sys.executable, "-c", HOLDER, str(run_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        number = int(holder.stdout.readline())
        holder.kill()
    start = time.monotonic()
    # Its claim would otherwise be waited for as long as this.
    with Lease(
        run_dir, LeaseTimes(settle_seconds=0.3, heartbeat_seconds=0.1, stale_seconds=90)
    ) as lease:
        assert lease.confirm().number > number
    assert time.monotonic() - start < 80


def test_driver_of_another_machine_is_succeeded_when_it_shows_no_life(run_dir: Place) -> None:
    with Lease(run_dir, QUICK) as dead:
        number = dead.confirm().number
        (run_dir / "identity.json").write_json({})
    (claim,) = claims(run_dir)
    rewrite(claim, on_another_machine)
    start = time.monotonic()
    with Lease(run_dir, QUICK) as lease:
        assert time.monotonic() - start > QUICK.stale_seconds
        assert lease.confirm().number > number


def test_driver_of_another_machine_that_lives_is_not_succeeded(run_dir: Place) -> None:
    with Lease(run_dir, QUICK) as far:
        far.confirm()
        (run_dir / "identity.json").write_json({})
    (claim,) = claims(run_dir)
    rewrite(claim, on_another_machine)
    done = threading.Event()

    def beat() -> None:
        while not done.wait(0.1):
            rewrite(claim, lambda content: content.update(beats=content["beats"] + 1))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ConfigError, match="elsewhere"):
            Lease(run_dir, QUICK).__enter__()
    finally:
        done.set()
        thread.join()


def test_driver_that_slept_while_it_was_succeeded_publishes_nothing(run_dir: Place) -> None:
    with Lease(run_dir, QUIET) as asleep:
        fence = asleep.confirm()
        (claim,) = claims(run_dir)
        rewrite(claim, on_another_machine)
        with Lease(run_dir, QUICK) as lease:
            successor = lease.confirm()
            with pytest.raises(LeaseError):
                fence.check()
            # It wakes up, and tells that it lives: too late.
            claim.write_bytes(json.dumps({"process": {}, "beats": 9, "released": False}).encode())
            with pytest.raises(LeaseError):
                check_lease(run_dir, fence.number)
            successor.check()


def test_drivers_that_start_together_are_one_in_the_end(run_dir: Place) -> None:
    holding: list[int] = []
    refused: list[ConfigError] = []
    start, tried = threading.Barrier(6), threading.Barrier(6)

    def drive() -> None:
        start.wait()
        try:
            with Lease(
                run_dir, LeaseTimes(settle_seconds=2.0, heartbeat_seconds=0.1, stale_seconds=600)
            ) as lease:
                holding.append(lease.confirm().number)
                tried.wait(30)
        except ConfigError as error:
            refused.append(error)
            tried.wait(30)

    threads = [threading.Thread(target=drive) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(holding), len(refused)) == (1, 5)


@pytest.mark.parametrize("owner", ["0", "z"])
def test_claim_of_a_rival_that_comes_while_others_settle_is_seen(
    run_dir: Place, monkeypatch: pytest.MonkeyPatch, owner: str
) -> None:
    with Lease(run_dir, QUIET) as lease:
        (claim,) = claims(run_dir)
        sleep = time.sleep

        def write_late(seconds: float) -> None:
            # It looked before there was any claim, and the storage was slow.
            sleep(seconds)
            claim.with_name(f"00000001-{owner}.json").write_bytes(claim.read_bytes())

        monkeypatch.setattr(time, "sleep", write_late)
        if owner == "0":  # the first in the order of names
            with pytest.raises(ConfigError):
                lease.confirm()
        else:
            lease.confirm().check()


def test_driver_that_never_confirmed_leaves_nothing_behind(run_dir: Place) -> None:
    with Lease(run_dir, QUICK):
        assert claims(run_dir)
    assert not run_dir.exists()


def test_claim_that_takes_too_long_to_write_is_withdrawn(tmp_path: Path) -> None:
    run_dir = Place.local(tmp_path / "run")
    with pytest.raises(OSError, match="took more than"):
        Lease(run_dir, SLOW_DISK).__enter__()
    assert not run_dir.exists()


def test_lease_is_checked_while_its_holder_writes(tmp_path: Path) -> None:
    run_dir = Place.local(tmp_path / "run")
    done = threading.Event()

    def write() -> None:
        # Each sign of life is a file of another name for a moment, and listed as such.
        temporary = tmp_path / "run" / LEASE_FOLDER / ".claim.tmp"
        while not done.is_set():
            temporary.write_bytes(b"")
            temporary.unlink()

    with Lease(run_dir, QUICK) as lease:
        fence = lease.confirm()
        thread = threading.Thread(target=write)
        thread.start()
        try:
            for _ in range(5000):
                fence.check()
        finally:
            done.set()
            thread.join()


def test_claim_says_who_holds_the_directory_and_with_what_error_it_was_released(
    run_dir: Place,
) -> None:
    assert read_lease(run_dir) is None

    def drive(error: BaseException) -> None:
        with Lease(run_dir, QUICK) as lease:
            lease.confirm()
            held = read_lease(run_dir)
            assert held is not None
            assert held.is_held
            assert not held.process.has_exited
            # A directory in which nothing was written keeps no claim.
            (run_dir / "run.yaml").write_bytes(b"{}")
            raise error

    for error, cause in ((RuntimeError("no room"), "RuntimeError: no room"), (SystemExit(), None)):
        with pytest.raises(type(error)):
            drive(error)
        state = read_lease(run_dir)
        assert state is not None
        assert (state.is_held, state.released, state.cause) == (False, True, cause)


def test_claim_of_another_form_is_named(tmp_path: Path) -> None:
    run_dir = Place.local(tmp_path / "run")
    claim = run_dir / LEASE_FOLDER / "00000001-a.json"
    claim.write_json({"released": False})
    with pytest.raises(UserError, match=r"00000001-a\.json"):
        read_lease(run_dir)
