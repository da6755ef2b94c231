"""How a job connects to Ray."""

import subprocess
import sys
from pathlib import Path

import pytest

from raytune_llama.connection import quoted_python


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
