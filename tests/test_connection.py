"""How a job connects to Ray."""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from raytune_llama.connection import is_on_cluster, quoted_python


def test_workers_start_from_a_python_whose_path_has_a_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "new comer" / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(python))
    environment = quoted_python()
    assert environment is not None
    # As Ray does; see RuntimeEnvContext.exec_worker.
    command = f"exec {environment['py_executable']} -c 'print(6 * 7)'"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "42\n"


def test_cluster_is_found_by_its_address_in_the_environment_or_as_started_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert not is_on_cluster()
    started_here = tmp_path / "ray" / "ray_current_cluster"
    started_here.parent.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        started_here.write_text(f"127.0.0.1:{server.getsockname()[1]}")
        assert is_on_cluster()
        monkeypatch.setenv("RAY_ADDRESS", "local")
        assert not is_on_cluster()
        monkeypatch.delenv("RAY_ADDRESS")
    assert not is_on_cluster()
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert is_on_cluster()


@pytest.mark.ray
def test_address_of_a_killed_cluster_is_named_and_a_local_one_is_started() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    code = (
        "import logging, ray; logging.basicConfig()\n"
        "from raytune_llama.connection import connect_to_ray\n"
        "with connect_to_ray(): print(len(ray.nodes()), 'node')"
    )
    # Not in pytest's folder, whose path is too long for Ray's sockets.
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "ray").mkdir()
        (Path(folder) / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{port}")
        environment = {**os.environ, "RAY_TMPDIR": folder}
        environment.pop("RAY_ADDRESS", None)
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env=environment,
            timeout=120,
            check=False,
        )
    assert "1 node" in done.stdout, done.stderr
    assert f"the cluster at 127.0.0.1:{port} that was started here does not answer" in done.stderr
