"""A job that is killed or stopped at any moment loses no row, doubles none, and resumes."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from raytune_llama.generate.make_data.job import make_data
from tests.generate.make_data.conftest import config_of, fast, read_journal, read_rows
from tests.generate.make_data.fake_endpoint import Answer, Call, FakeEndpoint, answer_rows

NUM_REQUESTS = 60


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.generate.make_data.conftest"])
    return context


def _run(url: str, run_dir: Path) -> None:
    make_data(config_of(url, run_dir, max_requests=NUM_REQUESTS, concurrency=3), None, **fast())


class _Reader(threading.Thread):
    """Parses the rows again and again while other processes write them."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        self.run_dir, self.done = run_dir, threading.Event()
        self.num_parsed, self.problems = 0, list[str]()

    def run(self) -> None:
        while not self.done.wait(0.001):
            try:
                rows = json.loads((self.run_dir / "alpaca.json").read_bytes())
            except FileNotFoundError:
                continue
            except ValueError as error:
                self.problems.append(str(error))
            else:
                self.num_parsed += len(rows) > 0


def _complete_rows(run_dir: Path) -> list[str]:
    """Instructions in the complete lines of the journal, as a killed process left it."""
    journal = run_dir / "requests.jsonl"
    lines = journal.read_bytes().split(b"\n")[1:-1] if journal.exists() else []
    return [row["instruction"] for line in lines for row in json.loads(line)["rows"]]


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_job_loses_and_doubles_no_row(
    seed: int, processes: ForkServerContext, run_dir: Path
) -> None:
    draws = random.Random(seed)
    is_due = threading.Event()
    next_kill = [draws.randint(1, 12)]

    def answer(call: Call) -> Answer:
        if call.number >= next_kill[0]:
            is_due.set()
        return answer_rows(call)

    with FakeEndpoint(answer) as endpoint:
        reader = _Reader(run_dir)
        reader.start()
        kept: list[str] = []
        num_kills = 0
        while True:
            is_due.clear()
            process = processes.Process(target=_run, args=(endpoint.url, run_dir))
            process.start()
            # Within a request, or up to some milliseconds after one: while files are written.
            while process.is_alive() and not is_due.wait(0.02):
                pass
            process.join(draws.choice([0.0, 0.002, 0.01, 0.03]))
            process.kill()
            process.join()
            now = _complete_rows(run_dir)
            assert now[: len(kept)] == kept
            kept = now
            if process.exitcode == 0:
                break
            num_kills += 1
            next_kill[0] = len(endpoint.calls) + draws.randint(1, 12)
        reader.done.set()
        reader.join()
    assert num_kills >= 4
    assert reader.problems == []
    assert reader.num_parsed > 0
    numbers = [record["number"] for record in read_journal(run_dir)]
    assert sorted(numbers) == list(range(1, NUM_REQUESTS + 1))
    instructions = [row["instruction"] for row in read_rows(run_dir)]
    assert instructions == kept
    assert len(set(instructions)) == 3 * NUM_REQUESTS


def test_interrupted_command_says_how_to_resume_and_does(run_dir: Path) -> None:
    started: list[subprocess.Popen[str]] = []

    def answer(call: Call) -> Answer:
        if call.number == 4:
            started[0].send_signal(signal.SIGINT)
            return Answer(fault="hang")
        return answer_rows(call)

    with FakeEndpoint(answer) as endpoint:
        command = [
            *(sys.executable, "-c", "from raytune_llama.cli import main; main()", "make-data"),
            *(f"run_dir={run_dir}", f"base_url={endpoint.url}", "max_requests=5", "concurrency=1"),
            *("num_rows=null", "prompt.num_items=3"),
        ]
        environment = {name: text for name, text in os.environ.items() if name != "OPENAI_API_KEY"}
        started.append(
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
        )
        out, errors = started[0].communicate(timeout=120)
        assert started[0].returncode == 75, errors
        assert "to resume: " in errors
        assert "Traceback" not in errors
        assert "rows kept" in out
        assert len(read_rows(run_dir)) == 9
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert endpoint.calls[4].prompt == endpoint.calls[3].prompt
    assert len(read_rows(run_dir)) == 15
    assert [record["number"] for record in read_journal(run_dir)] == [1, 2, 3, 4, 5]
