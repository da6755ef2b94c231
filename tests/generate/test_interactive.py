"""The chat with a model in the same process, in a terminal and through a pipe."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raytune_llama.config.settings import to_yaml
from raytune_llama.generate.config import GenerateConfig
from tests.generate.conftest import MakeConfig, answer
from tests.terminal import ROOT, Terminal


@pytest.fixture
def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "TERM": "dumb", "PYTHONIOENCODING": "utf-8"}


def command_of(config: GenerateConfig, folder: Path) -> list[str]:
    file = folder / "chat.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    return [sys.executable, str(ROOT / "jobs" / "generate.py"), str(file)]


def next_answer(make_config: MakeConfig, messages: list[dict[str, str]]) -> str:
    """Return what batch inference answers to a conversation."""
    (record,) = answer(make_config(json.dumps({"messages": messages}) + "\n", suffix="jsonl"))
    return record["output"]


def chat_config(make_config: MakeConfig, **fields: Any) -> GenerateConfig:  # noqa: ANN401
    return make_config("unused\n", interactive=True, **fields)


def test_pipe_is_a_conversation_of_its_lines_up_to_an_empty_one(
    make_config: MakeConfig, tmp_path: Path, environment: dict[str, str]
) -> None:
    command = command_of(chat_config(make_config, system="Be brief."), tmp_path)
    done = subprocess.run(
        command,
        input=b"the fox\nthe lazy dog\n\nnot answered\n",
        capture_output=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr.decode()
    messages = [{"role": "system", "content": "Be brief."}]
    answers: list[str] = []
    for question in ("the fox", "the lazy dog"):
        messages.append({"role": "user", "content": question})
        answers.append(next_answer(make_config, messages))
        messages.append({"role": "assistant", "content": answers[-1]})
    assert done.stdout.decode() == "".join(f"{text}\n" for text in answers)


def test_ctrl_c_stops_an_answer_and_an_empty_line_ends_the_chat(
    make_config: MakeConfig, endless_dir: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    endless = {"path": str(endless_dir)}
    config = chat_config(make_config, model=endless, sampling={"max_new_tokens": 4000})
    with Terminal(command_of(config, tmp_path), environment=environment) as terminal:
        terminal.wait_until(lambda: "> " in terminal.printed)
        for number in (1, 2):
            before = len(terminal.printed)
            terminal.type("the quick brown fox\n")
            terminal.wait_until(lambda: len(terminal.printed) > before + 200)  # noqa: B023
            terminal.press_ctrl_c()
            terminal.wait_until(lambda: terminal.printed.count("(stopped)\n> ") == number)  # noqa: B023
        terminal.type("/usage\n")
        terminal.wait_until(lambda: "interrupted" in terminal.printed)
        terminal.type("\n")
        assert terminal.wait() == 0
    assert "Traceback" not in terminal.printed


def test_conversation_longer_than_the_context_is_refused_and_the_chat_continues(
    make_config: MakeConfig, tmp_path: Path, environment: dict[str, str]
) -> None:
    config = chat_config(make_config, model={"max_context": 64})
    done = subprocess.run(
        command_of(config, tmp_path),
        input=b"the lazy dog " * 40 + b"\nthe fox\n",
        capture_output=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0
    assert "maximum context length is 64 tokens" in done.stderr.decode()
    wanted = next_answer(make_config, [{"role": "user", "content": "the fox"}])
    assert done.stdout.decode() == f"{wanted}\n"


def test_model_that_does_not_exist_exits_2_and_names_the_field(
    make_config: MakeConfig, tmp_path: Path, environment: dict[str, str]
) -> None:
    config = chat_config(make_config, model={"path": str(tmp_path / "none")})
    done = subprocess.run(
        command_of(config, tmp_path), input=b"", capture_output=True, check=False, env=environment
    )
    assert done.returncode == 2
    assert "model.path: " in done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()
