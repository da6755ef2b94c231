"""Runs in a project of Weights & Biases, through its own client (the extra `wandb`).

The client writes what it is given to a file and uploads from there in a process of its own.
"""

import contextlib
import logging
import os
import shutil
import signal
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from raytune_llama.train.monitoring.config import WandbConfig
from raytune_llama.train.monitoring.trackers.description import TAG_PREFIX
from raytune_llama.train.monitoring.trackers.tracker import (
    EndState,
    MetricPoint,
    RefusedError,
    RunAddress,
    TrackedRun,
    UnreachableError,
)

logger = logging.getLogger(__name__)

CONTACT_SECONDS = 20
"""Seconds in which the server has to answer."""

_ENVIRONMENT = {"WANDB_ERROR_REPORTING": "false"}
"""Set before W&B is imported, unless the user has set them: it would report its own errors."""

_EXIT_STATUS: dict[EndState, int] = {
    "finished": 0,
    "stopped": 0,
    # Shown as killed.
    "interrupted": 255,
    "diverged": 1,
    "failed": 1,
}

_STEP = "step"

_TAGS = "raytune"
"""Key in the config of a run of what other trackers show as tags, which W&B's own can't hold."""


class WandbTracker:
    """A project of Weights & Biases."""

    key = "wandb"

    def __init__(self, config: WandbConfig) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import wandb

        self._config, self._wandb = config, wandb
        self._folders: set[Path] = set()
        """Folders of the open runs, with what is still to be uploaded."""

    @property
    def name(self) -> str:
        """Name of the service and its address, for messages."""
        return f"W&B project {self._config.project}"

    def is_own(self, address: RunAddress) -> bool:
        """Whether a recorded run is in the configured project."""
        return (address.server, address.project) == (self._server, self._config.project)

    @property
    def _server(self) -> str:
        return self._config.entity or ""

    def check(self) -> None:
        """Ask the server who the key belongs to; see `Tracker.check`."""
        if self._config.mode == "offline":
            return
        with _named_errors(self._wandb):
            if self._wandb.Api(timeout=CONTACT_SECONDS).viewer is None:
                raise RefusedError("the key is not valid")

    def open(self, run: TrackedRun, known: str | None, parent: str | None) -> "WandbRun":
        """Create a run, or continue one; see `Tracker.open`."""
        del parent  # a sweep is a group
        own_name = self._config.run_name
        is_trial = run.parent_dir is not None
        group = (own_name or run.group) if is_trial else None
        return self._init(
            id=known or uuid.uuid4().hex[:16],
            resume="allow",
            name=run.name if is_trial else own_name or run.name,
            group=group if is_trial else run.name if run.job == "sweep" else None,
            job_type="trial" if is_trial else run.job,
            dir=run.run_dir.path if run.run_dir.is_local else None,
            # At each start, as the files of one that is offline are uploaded one by one.
            config={**run.config, _TAGS: {"job": run.job, **_as_fields(run.tags)}},
        )

    def reopen(self, address: RunAddress) -> "WandbRun":
        """Open a run that has ended, to add to it; see `Tracker.reopen`."""
        return self._init(id=address.id, resume="must", dir=None)

    def abandon(self) -> None:
        """Kill the process that uploads: the client would wait for it when this process ends."""
        for file in Path("/proc/self/task").glob("*/children"):
            for pid in file.read_text().split():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    if Path("/proc", pid, "comm").read_text().startswith("wandb-core"):
                        os.kill(int(pid), signal.SIGKILL)
        # Its client takes all values at once, and does not say which of them were uploaded.
        for folder in sorted(self._folders):
            logger.warning(
                "%s: what was not uploaded is in %s; upload it by: wandb sync %s",
                *(self.name, folder / "wandb", folder / "wandb" / "run-*"),
            )

    def _init(self, *, dir: Path | None, **fields: Any) -> "WandbRun":  # noqa: A002, ANN401  # W&B's
        folder = dir or Path(tempfile.mkdtemp(prefix="raytune-wandb-"))
        self._folders.add(folder)
        with _named_errors(self._wandb):
            run = self._wandb.init(
                project=self._config.project,
                entity=self._config.entity,
                mode=self._config.mode,
                dir=str(folder),
                reinit="create_new",
                settings=self._wandb.Settings(
                    console="off",
                    silent=True,
                    init_timeout=CONTACT_SECONDS,
                    save_code=False,
                    # What the driver's machine does says nothing about the workers'.
                    x_disable_stats=True,
                    x_disable_meta=True,
                ),
                **fields,
            )
        run.define_metric(_STEP, hidden=True)
        # Not W&B's own step, which may not decrease and which each call increases.
        run.define_metric("*", step_metric=_STEP)
        url = None if self._config.mode == "offline" else run.url
        address = RunAddress(self._server, self._config.project, run.id, url)

        def clean_up() -> None:
            self._folders.discard(folder)
            # Of a run that is offline it has the only copy.
            if dir is None and self._config.mode == "online":
                shutil.rmtree(folder)

        return WandbRun(run, address, self._wandb, clean_up)


class WandbRun:
    """A run that is open in W&B."""

    def __init__(
        self,
        run: Any,  # noqa: ANN401  # W&B's
        address: RunAddress,
        wandb: Any,  # noqa: ANN401  # the module
        clean_up: Callable[[], None],
    ) -> None:
        self._run, self._address, self._wandb, self._clean_up = run, address, wandb, clean_up

    @property
    def address(self) -> RunAddress:
        """Where the run is."""
        return self._address

    def configure(self, config: Mapping[str, Any]) -> None:
        """Log a config; see `OpenRun.configure`."""
        with _named_errors(self._wandb):
            self._run.config.update(dict(config), allow_val_change=True)

    def log(self, points: Sequence[MetricPoint]) -> None:
        """Log values of metrics; see `OpenRun.log`."""
        with _named_errors(self._wandb):
            for step, values in groupby(points, key=lambda point: point.step):
                self._run.log({_STEP: step, **{point.name: point.value for point in values}})

    def tag(self, tags: Mapping[str, str]) -> None:
        """Add to `raytune` in the config of the run, as W&B's own tags have no values."""
        with _named_errors(self._wandb):
            known = dict(self._run.config.get(_TAGS, {}))
            fields = {**known, **_as_fields(tags)}
            self._run.config.update({_TAGS: fields}, allow_val_change=True)

    def upload(self, name: str, data: bytes) -> None:
        """Upload a file of the run, a picture also as a panel; see `OpenRun.upload`."""
        file = Path(self._run.dir, "raytune", name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        with _named_errors(self._wandb):
            self._run.save(str(file), base_path=self._run.dir, policy="now")
            if file.suffix == ".png":
                self._run.log({f"plots/{file.stem}": self._wandb.Image(str(file))})

    def end(self, state: EndState | None) -> None:
        """Finish the run, which waits until it is uploaded; see `OpenRun.end`."""
        with _named_errors(self._wandb):
            self._run.finish(exit_code=0 if state is None else _EXIT_STATUS[state])
        self._clean_up()


def _as_fields(tags: Mapping[str, str]) -> dict[str, str]:
    return {name.removeprefix(TAG_PREFIX): value for name, value in tags.items()}


@contextlib.contextmanager
def _named_errors(wandb: Any) -> Iterator[None]:  # noqa: ANN401  # the module
    """Raise the errors of the client as those of a tracker."""
    try:
        yield
    except (wandb.errors.AuthenticationError, wandb.errors.UsageError) as error:
        raise RefusedError(str(error)) from error
    except (wandb.errors.Error, OSError, ValueError) as error:
        raise UnreachableError(f"{type(error).__name__}: {error}") from error
