"""Fetch a directory in a process of its own, as another worker of the node would."""

import os
import subprocess
import sys
from collections.abc import Mapping

_PROGRAM = """
import sys
from raytune_llama.storage.directories import fetch_directory, pin_directory
print(fetch_directory(pin_directory(sys.argv[1], "model.path"), "model.path"))
"""


def start_fetch(path: str, environment: Mapping[str, str]) -> "subprocess.Popen[str]":
    """Start a process that fetches a directory and writes where it is."""
    return subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, path],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def fetch_elsewhere(path: str, environment: Mapping[str, str]) -> str:
    """Fetch a directory in another process, which has ended then; return where it is."""
    process = start_fetch(path, environment)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output.strip()
