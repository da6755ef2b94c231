"""Runs in an MLflow server, through MLflow's own client (the extra `mlflow`: mlflow-skinny)."""

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from raytune_llama.train.monitoring.config import MlflowConfig
from raytune_llama.train.monitoring.trackers.description import TAG_PREFIX, flatten
from raytune_llama.train.monitoring.trackers.tracker import (
    EndState,
    MetricPoint,
    MissingRunError,
    RefusedError,
    RunAddress,
    TrackedRun,
    UnreachableError,
)

_ENVIRONMENT = {
    # MLflow's own are 7 retries and 120 s, minutes for each call to a server that is down.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""Set before MLflow is imported, unless the user has set them."""

_REFUSED = {
    "BAD_REQUEST",
    "CUSTOMER_UNAUTHORIZED",
    "ENDPOINT_NOT_FOUND",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "MALFORMED_REQUEST",
    "NOT_FOUND",
    "PERMISSION_DENIED",
    "RESOURCE_DOES_NOT_EXIST",
    "UNAUTHENTICATED",
}
"""Error codes that the same request would get again."""

_MISSING = {"RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"}

_STATUS: dict[EndState, str] = {
    "finished": "FINISHED",
    "stopped": "FINISHED",
    "interrupted": "KILLED",
    "diverged": "FAILED",
    "failed": "FAILED",
}

_ILLEGAL = re.compile(r"[^/\w.\- ]")
"""Characters that names of metrics must not have."""

_MAX_PARAMS = 100
_MAX_PARAM_CHARACTERS = 500
_PARENT_TAG = "mlflow.parentRunId"


class MlflowTracker:
    """An MLflow server."""

    key = "mlflow"

    def __init__(self, config: MlflowConfig) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        self._config = config
        self._client: Any = MlflowClient(tracking_uri=config.uri)
        self._experiment_id: str | None = None

    @property
    def name(self) -> str:
        """Name of the service and its address, for messages."""
        return f"MLflow at {self._config.uri}"

    def is_own(self, address: RunAddress) -> bool:
        """Whether a recorded run is in the configured server and experiment."""
        return (address.server, address.project) == (self._config.uri, self._config.experiment)

    def check(self) -> None:
        """Ask the server for the experiment; raises as `Tracker.check` says."""
        with _named_errors():
            found = self._client.get_experiment_by_name(self._config.experiment)
        if found is not None and found.lifecycle_stage == "deleted":
            raise RefusedError(
                f"the experiment {self._config.experiment!r} was deleted; restore it with `mlflow "
                "experiments restore`, or set another name"
            )

    def open(self, run: TrackedRun, known: str | None, parent: str | None) -> "MlflowRun":
        """Create a run, or continue one; see `Tracker.open`."""
        if known is not None:
            with _named_errors(missing=f"the run {known} does not exist"):
                found = self._client.get_run(known)
            if found.info.lifecycle_stage == "deleted":
                raise MissingRunError(f"the run {known} was deleted")
            opened = MlflowRun(self._client, self._address(known))
            with _named_errors():
                self._client.update_run(known, status="RUNNING")
            opened.tag(run.tags)
            return opened
        tags = {**run.tags, f"{TAG_PREFIX}job": run.job}
        tags |= {_PARENT_TAG: parent} if parent else {}
        name = run.name if run.parent_dir else self._config.run_name or run.name
        with _named_errors():
            created = self._client.create_run(self._experiment(), tags=tags, run_name=name)
        return MlflowRun(self._client, self._address(created.info.run_id))

    def reopen(self, address: RunAddress) -> "MlflowRun":
        """Open a run that has ended, to add to it; see `Tracker.reopen`."""
        with _named_errors(missing=f"the run {address.id} does not exist"):
            self._client.get_run(address.id)
        return MlflowRun(self._client, address)

    def abandon(self) -> None:
        """Do nothing: the client has neither threads nor processes of its own."""

    def _experiment(self) -> str:
        """Return the id of the experiment; create it at the first call if it does not exist."""
        if self._experiment_id is None:
            name = self._config.experiment
            found = self._client.get_experiment_by_name(name)
            if found is None:
                self._experiment_id = str(self._client.create_experiment(name))
            else:
                self._experiment_id = str(found.experiment_id)
        return self._experiment_id

    def _address(self, run_id: str) -> RunAddress:
        with _named_errors():
            experiment = self._experiment()
        uri = self._config.uri.rstrip("/")
        url = f"{uri}/#/experiments/{experiment}/runs/{run_id}"
        return RunAddress(self._config.uri, self._config.experiment, run_id, url)


class MlflowRun:
    """A run that is open in an MLflow server."""

    def __init__(self, client: Any, address: RunAddress) -> None:  # noqa: ANN401  # MLflow's
        self._client, self._address = client, address

    @property
    def address(self) -> RunAddress:
        """Where the run is."""
        return self._address

    def log(self, points: Sequence[MetricPoint]) -> None:
        """Log values of metrics; see `OpenRun.log`."""
        from mlflow.entities import Metric

        metrics = [
            Metric(_ILLEGAL.sub("_", point.name), point.value, int(point.time * 1000), point.step)
            for point in points
        ]
        with _named_errors():
            self._client.log_batch(self._address.id, metrics=metrics)

    def configure(self, config: Mapping[str, Any]) -> None:
        """Log a config as parameters, by dotted path; long values are cut."""
        from mlflow.entities import Param

        params = [
            Param(_ILLEGAL.sub("_", name), _as_text(value)[:_MAX_PARAM_CHARACTERS])
            for name, value in flatten(config).items()
        ]
        for start in range(0, len(params), _MAX_PARAMS):
            with _named_errors():
                self._client.log_batch(self._address.id, params=params[start : start + _MAX_PARAMS])

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags; see `OpenRun.tag`."""
        from mlflow.entities import RunTag

        with _named_errors():
            self._client.log_batch(
                self._address.id, tags=[RunTag(name, value) for name, value in tags.items()]
            )

    def upload(self, name: str, data: bytes) -> None:
        """Upload a file as an artifact; see `OpenRun.upload`."""
        path = PurePosixPath(name)
        folder = None if str(path.parent) == "." else str(path.parent)
        with tempfile.TemporaryDirectory() as temporary:
            file = Path(temporary, path.name)
            file.write_bytes(data)
            try:
                with _named_errors():
                    self._client.log_artifact(self._address.id, str(file), folder)
            except UnreachableError as error:
                # Artifacts may be stored elsewhere than runs.
                with _named_errors():
                    self._client.get_run(self._address.id)
                raise RefusedError(f"its artifact store does not take it: {error}") from error

    def end(self, state: EndState | None) -> None:
        """Set the status of the run; see `OpenRun.end`."""
        if state is not None:
            with _named_errors():
                self._client.set_terminated(self._address.id, status=_STATUS[state])


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@contextlib.contextmanager
def _named_errors(missing: str | None = None) -> Iterator[None]:
    """Raise the errors of MLflow's client as those of a tracker.

    Args:
        missing: message for a run that does not exist; None: that is a refusal as others are.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        text = " ".join(str(error).split())
        if missing is not None and error.error_code in _MISSING:
            raise MissingRunError(missing) from error
        if error.error_code in _REFUSED:
            raise RefusedError(text) from error
        raise UnreachableError(text) from error
    except (OSError, ImportError) as error:
        # Of the artifact store, such as a client that is not installed.
        raise UnreachableError(f"{type(error).__name__}: {error}") from error
