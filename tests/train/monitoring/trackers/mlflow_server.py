"""A real MLflow server on loopback, in an environment of its own (`make test-trackers`)."""

import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from raytune_llama.serve.proxy import find_free_ports

ROOT = next(path for path in Path(__file__).parents if (path / "pyproject.toml").is_file())
MLFLOW = Path(os.environ.get("RAYTUNE_TRACKERS_VENV", ROOT / ".trackers-venv")) / "bin" / "mlflow"
START_SECONDS = 180


class MlflowServer:
    """A server with its data in a folder; it may be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (self._port,) = find_free_ports(1)
        self.url = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and return once it answers."""
        command = [
            *(str(MLFLOW), "server", "--host", "127.0.0.1", "--port", str(self._port)),
            *("--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db", "--workers", "1"),
            *("--artifacts-destination", str(self._folder / "artifacts")),
        ]
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self._folder,
                env={**os.environ, **quiet, "PYTHONPATH": ""},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            assert self._process.poll() is None, (self._folder / "server.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5):  # noqa: S310  # our own
                return True
        except (urllib.error.URLError, OSError):
            return False

    def kill(self) -> None:
        """Kill it and its workers."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
