"""The part of MLflow's REST API that a tracker needs, in memory: what the real client talks to."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

API = "/api/2.0/mlflow/"
ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts/"


class FakeMlflow:
    """A server; `refusal` may be set to the status and body of every answer."""

    def __init__(self) -> None:
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.files: dict[str, bytes] = {}
        self.refusal: tuple[int, Any] | None = None
        self.headers: list[dict[str, str]] = []
        self.url = ""

    def answer(self, endpoint: str, asked: dict[str, Any]) -> tuple[int, Any]:
        """Return status and body of an endpoint's answer."""
        if endpoint == "experiments/get-by-name":
            return self._experiment(asked["experiment_name"])
        if endpoint == "experiments/create":
            self.experiments[asked["name"]] = str(len(self.experiments))
            return 200, {"experiment_id": self.experiments[asked["name"]]}
        if endpoint == "runs/create":
            return 200, {"run": self._create(asked)}
        return self._answer_run(endpoint, asked)

    def _answer_run(self, endpoint: str, asked: dict[str, Any]) -> tuple[int, Any]:
        run = self.runs.get(asked.get("run_id", ""))
        if run is None:
            return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such run"}
        if endpoint == "runs/get":
            return 200, {"run": run}
        if endpoint == "runs/update":
            run["info"]["status"] = asked.get("status", run["info"]["status"])
            return 200, {"run_info": run["info"]}
        if endpoint == "runs/log-batch":
            for kind in ("metrics", "params", "tags"):
                run["data"][kind] += asked.get(kind, [])
            return 200, {}
        return 404, {"error_code": "ENDPOINT_NOT_FOUND", "message": endpoint}

    def _experiment(self, name: str) -> tuple[int, Any]:
        if name not in self.experiments:
            return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no experiment"}
        found = {"experiment_id": self.experiments[name], "name": name}
        return 200, {"experiment": {**found, "lifecycle_stage": "active"}}

    def _create(self, asked: dict[str, Any]) -> dict[str, Any]:
        run_id = f"run{len(self.runs)}"
        info = {
            "run_id": run_id,
            "run_uuid": run_id,
            "run_name": asked["run_name"],
            "experiment_id": asked["experiment_id"],
            "status": "RUNNING",
            "lifecycle_stage": "active",
            "start_time": asked.get("start_time", 0),
            "artifact_uri": f"mlflow-artifacts:/{asked['experiment_id']}/{run_id}/artifacts",
        }
        data = {"metrics": [], "params": [], "tags": list(asked.get("tags", []))}
        self.runs[run_id] = {"info": info, "data": data}
        return self.runs[run_id]

    def values(self, run_id: str, kind: str) -> dict[str, str]:
        """Return params or tags of a run; the last value of a key."""
        return {each["key"]: each["value"] for each in self.runs[run_id]["data"][kind]}


@contextmanager
def serve_fake_mlflow() -> Iterator[FakeMlflow]:
    """Serve it on loopback."""
    fake = FakeMlflow()

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            fake.headers.append(dict(self.headers))
            parts = urlsplit(self.path)
            if fake.refusal is not None:
                status, answer = fake.refusal
            elif parts.path.startswith(ARTIFACTS):
                fake.files[unquote(parts.path.removeprefix(ARTIFACTS))] = body
                status, answer = 200, {}
            else:
                asked = json.loads(body) if body else {}
                asked |= {key: value[0] for key, value in parse_qs(parts.query).items()}
                status, answer = fake.answer(parts.path.removeprefix(API), asked)
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_PATCH = handle_any

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # its name
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield fake
    server.shutdown()
    server.server_close()
    thread.join()
