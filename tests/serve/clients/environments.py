"""The environments of the clients: one for each, in `.clients/`, with pinned packages.

    python -m tests.serve.clients.environments [CLIENT ...]

makes those that are missing or whose pinned packages have changed. What a client needs is in
`packages/CLIENT.txt`; what those on Node.js need in `packages/package.json` and its lock file, and
Node.js itself in `packages/node.txt`.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
PACKAGES, PROGRAMS = HERE / "packages", HERE / "programs"
ROOT = next(path for path in HERE.parents if (path / "pyproject.toml").is_file())
ENVIRONMENTS = ROOT / ".clients"


@dataclass(frozen=True)
class Client:
    """A client of OpenAI's API."""

    name: str
    package: str
    """What it is called on PyPI or npm."""

    program: str
    """Its program in `programs/`."""

    @property
    def is_node(self) -> bool:
        """Whether it runs on Node.js."""
        return self.program.endswith(".mjs")

    @property
    def folder(self) -> Path:
        """Its environment."""
        return ENVIRONMENTS / ("node" if self.is_node else self.name)

    @property
    def files(self) -> list[Path]:
        """The files that pin its packages; the first one names its own."""
        names = [f"{self.name}.txt"]
        if self.is_node:
            names = ["package.json", "package-lock.json", "node.txt"]
        return [PACKAGES / name for name in names]

    @property
    def version(self) -> str:
        """The pinned version of its package."""
        text = self.files[0].read_text(encoding="utf-8")
        if self.is_node:
            return json.loads(text)["dependencies"][self.package]
        (version,) = re.findall(rf"^{re.escape(self.package)}==(\S+)$", text, re.MULTILINE)
        return version

    @property
    def is_ready(self) -> bool:
        """Whether its environment is there, with the packages that are pinned now."""
        stamp = self.folder / "pinned"
        return stamp.is_file() and stamp.read_bytes() == self._pinned

    def install(self) -> None:
        """Make its environment anew."""
        shutil.rmtree(self.folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(self.folder)], check=True)
        pip = [str(self._bin / "python"), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "-r", str(self.files[-1])], check=True)
        if self.is_node:
            for file in self.files:
                shutil.copy(file, self.folder)
            npm = [str(self._bin / "npm"), "ci", "--no-audit", "--no-fund"]
            subprocess.run(npm, cwd=self.folder, check=True)
        (self.folder / "pinned").write_bytes(self._pinned)

    def command(self) -> list[str]:
        """Return the command that runs its program, without arguments."""
        if not self.is_node:
            return [str(self._bin / "python"), str(PROGRAMS / self.program)]
        # Node.js looks for packages in the program's folder and above it.
        for program in PROGRAMS.glob("*.mjs"):
            shutil.copy(program, self.folder)
        return [str(self._bin / "node"), str(self.folder / self.program)]

    @property
    def _bin(self) -> Path:
        return self.folder / "bin"

    @property
    def _pinned(self) -> bytes:
        return b"".join(file.read_bytes() for file in self.files)


CLIENTS = [
    Client("openai", "openai", "ask_openai.py"),
    Client("litellm", "litellm", "ask_litellm.py"),
    Client("langchain", "langchain-openai", "ask_langchain.py"),
    Client("llama_index", "llama-index-llms-openai-like", "ask_llama_index.py"),
    Client("instructor", "instructor", "ask_instructor.py"),
    Client("httpx", "httpx", "ask_httpx.py"),
    Client("lm_eval", "lm_eval", "run_lm_eval.py"),
    Client("openai_node", "openai", "ask_openai.mjs"),
    Client("ai_sdk", "ai", "ask_ai.mjs"),
]


def choose(names: list[str]) -> list[Client]:
    """Return the clients of these names; all if there are none."""
    unknown = set(names) - {client.name for client in CLIENTS}
    if unknown:
        sys.exit(f"no client {sorted(unknown)}; there are {[client.name for client in CLIENTS]}")
    return [client for client in CLIENTS if client.name in names or not names]


def install(clients: list[Client]) -> None:
    """Make the environments that are not ready."""
    for client in clients:
        if not client.is_ready:
            sys.stdout.write(f"installing {client.name} in {client.folder}\n")
            client.install()


def variables(key: str) -> dict[str, str]:
    """Return the environment variables of a client's program.

    Args:
        key: API key. What clients would read of this process's environment is left out.
    """
    prefixes = ("OPENAI_", "PYTHON", "RAY_", "RAYTUNE_", "HF_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    return {**kept, "ENDPOINT_KEY": key, "NO_PROXY": "127.0.0.1"}


if __name__ == "__main__":
    install(choose(sys.argv[1:]))
