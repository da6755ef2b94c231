"""Small real run directories, as their drivers leave them, and a driver that is alive."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raytune_llama.config.settings import override
from raytune_llama.data.store.token_store import open_store
from raytune_llama.runs.entries import Entry
from raytune_llama.runs.survey import Survey, survey_places
from raytune_llama.storage.lease import Lease, LeaseTimes
from raytune_llama.storage.place import Place
from raytune_llama.train.config import PretrainConfig
from raytune_llama.train.identity import identify, write_identity
from tests.train.conftest import (
    MakeConfig,
    make_config,
    model_dir,
    run_here,
    store_dir,
)

__all__ = ["make_config", "model_dir", "store_dir"]

MakeRun = Callable[..., PretrainConfig]
HoldLease = Callable[[Place], subprocess.Popen[str]]

QUICK = LeaseTimes(settle_seconds=0.5, heartbeat_seconds=0.2, stale_seconds=5)

DRIVER = """
import sys
from raytune_llama.storage.lease import Lease, LeaseTimes
from raytune_llama.storage.place import Place
times = LeaseTimes(settle_seconds=0.5, heartbeat_seconds=0.2, stale_seconds=5)
with Lease(Place.parse(sys.argv[1], "run_dir"), times) as lease:
    print(lease.confirm().number, flush=True)
    sys.stdin.read()
"""


def drive(config: PretrainConfig, *, stop_after: int | None, fails: bool = False) -> None:
    """Train as a driver does, without Ray: lease, identity, then the loop in this process."""
    with Lease(config.run_place, QUICK) as lease:
        lease.confirm()
        write_identity(config, {**identify(config), "store": open_store(config.data).fingerprint})
        run_here(config, stop_after=stop_after)
        if fails:
            raise RuntimeError("the workers failed 3 times in a row")


@pytest.fixture
def make_run(make_config: MakeConfig, tmp_path: Path) -> MakeRun:
    """Train a run of six steps, or stop it after some, in `runs/NAME`; return its config."""

    def make(
        name: str = "run",
        *,
        place: Place | None = None,
        stop_after: int | None = None,
        fails: bool = False,
        **fields: Any,  # noqa: ANN401
    ) -> PretrainConfig:
        run_dir = str(place or tmp_path / "runs" / name)
        config = override(make_config(name, **fields), {"run_dir": run_dir})
        if fails:
            with pytest.raises(RuntimeError):
                drive(config, stop_after=stop_after, fails=True)
        else:
            drive(config, stop_after=stop_after)
        return config

    return make


@pytest.fixture
def hold_lease() -> Iterator[HoldLease]:
    """Start drivers in processes of their own that hold a directory until they are killed."""
    drivers: list[subprocess.Popen[str]] = []

    def hold(run_dir: Place) -> subprocess.Popen[str]:
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(run_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        drivers.append(driver)
        assert driver.stdout is not None
        assert driver.stdout.readline().strip().isdecimal()
        return driver

    yield hold
    for driver in drivers:
        driver.kill()
        driver.communicate()


def survey(*places: Path | Place) -> Survey:
    return survey_places([str(place) for place in places])


def entry_at(place: Path | Place, *roots: Path | Place) -> Entry:
    """Return the entry at a place, found below some folders; without any, below its own."""
    wanted = place if isinstance(place, Place) else Place.local(place)
    (found,) = [each for each in survey(*(roots or (wanted,))).entries if each.place == wanted]
    return found
