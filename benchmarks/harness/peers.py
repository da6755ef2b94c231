"""Programs of peers, and the packages that only they need.

These lie in a folder of their own, without dependencies: in one environment pip would search for
minutes for versions that suit all, and ours would no longer be those that users get. A peer that
does not run with ours has an environment of its own.
"""

import importlib.machinery
import os
import subprocess
import sys
from pathlib import Path

from .corpus import CACHE, ROOT

PACKAGES = CACHE / "peers"
PROGRAMS = ROOT / "benchmarks" / "peers"

_REQUIREMENTS = PROGRAMS / "requirements.txt"
_LLAMA_FACTORY = ["llamafactory==0.9.5", "torch<2.14"]
_TAIL_CHARACTERS = 4000


def install_packages() -> None:
    """Install what peers need, where it is not there yet; without a network they are left out."""
    stamp = PACKAGES / "requirements.txt"
    if stamp.exists() and stamp.read_bytes() == _REQUIREMENTS.read_bytes():
        return
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
    command += ["--target", str(PACKAGES), "-r", str(_REQUIREMENTS)]
    if subprocess.run(command, check=False).returncode == 0:
        stamp.write_bytes(_REQUIREMENTS.read_bytes())


def install_llama_factory() -> Path | None:
    """Give LLaMA-Factory an environment of its own, where it has none yet.

    Returns:
        Its interpreter, or None where it can't be installed.
    """
    folder = CACHE / "llama-factory"
    python, stamp = folder / "bin" / "python", folder / "packages.txt"
    if stamp.exists() and stamp.read_text() == " ".join(_LLAMA_FACTORY):
        return python
    commands = [
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", *_LLAMA_FACTORY],
        # Their builds for GPUs don't load beside PyTorch's for CPUs; texts don't need them.
        [str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision", "torchaudio"],
    ]
    if any(subprocess.run(command, check=False).returncode for command in commands):
        return None
    stamp.write_text(" ".join(_LLAMA_FACTORY))
    return python


def is_installed(module: str) -> bool:
    """Say whether a peer's program can import a module."""
    places = [str(PACKAGES), *sys.path]
    return importlib.machinery.PathFinder.find_spec(module, places) is not None


def run(command: list[str]) -> str:
    """Run a command where it can import the peers' packages; return what it printed.

    Raises:
        RuntimeError: It failed; the message has the end of its output.
    """
    paths = [str(ROOT), str(PACKAGES), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )
    if done.returncode:
        tails = [text[-_TAIL_CHARACTERS:] for text in (done.stdout, done.stderr)]
        raise RuntimeError("\n".join([" ".join(command), *tails]))
    return done.stdout


def run_program(name: str, *arguments: Path | str) -> str:
    """Run a program of `peers/`; return what it printed."""
    return run([sys.executable, str(PROGRAMS / name), *map(str, arguments)])
