"""Trackers of a run or sweep: check them before workers start, then send what is written.

problems = find_problems(config.logging, config.run_place)      # without the network
check_trackers(config.logging)                                  # asks the servers
with track_run(config, identity) as tracked:
    ...                                                         # train
    tracked.end("finished", result)
"""

import contextlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from raytune_llama.config.settings import ConfigError
from raytune_llama.storage.place import Place
from raytune_llama.train.config import AnyTrainConfig
from raytune_llama.train.monitoring.config import LoggingConfig
from raytune_llama.train.monitoring.trackers.description import describe_run
from raytune_llama.train.monitoring.trackers.feed import Feed, RunProgress, Source
from raytune_llama.train.monitoring.trackers.state import TRACKER_KEYS, SentState
from raytune_llama.train.monitoring.trackers.tracker import (
    EndState,
    RefusedError,
    Tracker,
    UnreachableError,
)

CONTACT_SECONDS = 45.0
"""Seconds in which each tracker has to answer before a run starts."""


def find_problems(config: LoggingConfig, run_dir: Place) -> list[str]:
    """Return what keeps the configured trackers from being used, without the network.

    Args:
        config: logging settings of a run.
        run_dir: directory of the run or sweep.
    """
    problems = [
        f"logging.{key}: the package {key} is not installed; run: pip install "
        f"'raytune_llama[{key}]', or set logging.{key}=null"
        for key in TRACKER_KEYS
        if getattr(config, key) is not None and importlib.util.find_spec(key) is None
    ]
    if config.wandb is None or any(problem.startswith("logging.wandb") for problem in problems):
        return problems
    if config.wandb.mode == "offline" and not run_dir.is_local:
        problems.append(
            f"logging.wandb.mode: got offline, which writes to the run directory, but {run_dir} is "
            "not on a disk; use online, or a local run_dir"
        )
    if config.wandb.mode == "online" and not _has_wandb_key():
        problems.append(
            "logging.wandb: no API key; set WANDB_API_KEY in the environment of the driver, run "
            "`wandb login`, or set logging.wandb.mode=offline"
        )
    return problems


def _has_wandb_key() -> bool:
    """Whether W&B finds a key in the environment or in the file that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    from requests.utils import get_netrc_auth

    base_url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return get_netrc_auth(base_url) is not None


def check_trackers(config: LoggingConfig) -> None:
    """Ask the configured trackers whether they accept a run, each with a time limit.

    Raises:
        ConfigError: one does not answer, or refuses.
    """
    problems = [
        f"logging.{tracker.key}: {tracker.name}: {problem}; correct it, or set "
        f"logging.{tracker.key}=null to run without it"
        for tracker in build_trackers(config)
        if (problem := _contact(tracker)) is not None
    ]
    if problems:
        raise ConfigError(problems)


def _contact(tracker: Tracker) -> str | None:
    """Return why a tracker can't be used now; None if it can."""
    found: list[str | None] = []

    def ask() -> None:
        try:
            tracker.check()
        except (UnreachableError, RefusedError) as error:
            found.append(str(error))
        else:
            found.append(None)

    # In a thread, as no limit of a client covers a server that answers byte by byte.
    thread = threading.Thread(target=ask, name=f"check {tracker.key}", daemon=True)
    thread.start()
    thread.join(CONTACT_SECONDS)
    return found[0] if found else f"it does not answer within {CONTACT_SECONDS:.0f} s"


def build_trackers(config: LoggingConfig) -> list[Tracker]:
    """Return the configured trackers; nothing is sent."""
    trackers: list[Tracker] = []
    if config.mlflow is not None:
        from raytune_llama.train.monitoring.trackers.mlflow import MlflowTracker

        trackers.append(MlflowTracker(config.mlflow))
    if config.wandb is not None:
        from raytune_llama.train.monitoring.trackers.wandb import WandbTracker

        trackers.append(WandbTracker(config.wandb))
    return trackers


@contextlib.contextmanager
def track(config: LoggingConfig, source: Source) -> Iterator[None]:
    """Send the runs of a source to the configured trackers during the block.

    Args:
        config: logging settings.
        source: returns the runs; see `Source`.
    """
    with contextlib.ExitStack() as stack:
        for tracker in build_trackers(config):
            stack.enter_context(Feed(tracker, source))
        yield


class RunEnd:
    """Takes how a tracked run has ended."""

    def __init__(self, progress: RunProgress) -> None:
        self.progress = progress
        """The run, and how it has ended."""

    def end(self, state: EndState, result: Place | None = None) -> None:
        """Set how the run has ended, and the directory of its result; the first call counts."""
        if self.progress.ended is None:
            self.progress = replace(self.progress, ended=state, result=result)


@contextlib.contextmanager
def ended_by(end: Callable[[EndState], None]) -> Iterator[None]:
    """Set how a run has ended if the block raises."""
    try:
        yield
    except FloatingPointError:
        end("diverged")
        raise
    except (KeyboardInterrupt, SystemExit):
        end("interrupted")
        raise
    except BaseException:
        end("failed")
        raise


@contextlib.contextmanager
def track_run(config: AnyTrainConfig, identity: Mapping[str, Any]) -> Iterator[RunEnd]:
    """Send a run to the trackers of its config during the block, and its end after it.

    Args:
        config: config of the run, with absolute paths.
        identity: recorded identity of the run.
    """
    run = RunEnd(RunProgress(describe_run(config, identity)))
    with track(config.logging, lambda: [run.progress]), ended_by(run.end):
        yield run


def is_sent(config: LoggingConfig, run_dir: Place) -> bool:
    """Whether the configured trackers have everything of a run that has ended."""
    keys = [key for key in TRACKER_KEYS if getattr(config, key) is not None]
    return all(SentState.read(run_dir, key).ended == "finished" for key in keys)
