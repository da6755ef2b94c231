"""Evaluations: what is done is kept, what has changed is done again, and reports are complete."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import ConfigError, from_dict
from raytune_llama.evaluate.config import EvaluateConfig
from raytune_llama.evaluate.evaluation import PARTS, evaluate
from raytune_llama.storage.files import read_json, write_json_atomic
from raytune_llama.tokenizer.loader import load_tokenizer

ROOT = Path(__file__).parents[2]
WORDS = ["the", "quick", "brown", "fox", "我们", "喜欢", "学习", "17", "A", "B"]


def write_questions(file: Path, number: int, *, seed: int = 0) -> Path:
    generator = random.Random(seed)
    rows = [
        {
            "id": f"q{count}",
            "question": " ".join(generator.choices(WORDS, k=8)),
            "choices": [f"{WORDS[count % 8]} {option}" for option in "xyz"],
            "answer": count % 3,
        }
        for count in range(number)
    ]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    file.write_text("".join(lines), encoding="utf-8")
    return file


@pytest.fixture
def values(tmp_path: Path, model_dir: Path, adapter_dir: Path) -> dict[str, Any]:
    """Return an evaluation of a base and its adapter on two files of questions, and on prompts."""
    for name in ("one", "two"):
        write_questions(tmp_path / f"{name}.jsonl", 6, seed=len(name))
    (tmp_path / "prompts.txt").write_text("the quick\n\n我们 喜欢\n", encoding="utf-8")
    return {
        "run_dir": str(tmp_path / "evaluation"),
        "models": [
            {"path": str(model_dir)},
            {"path": str(model_dir), "adapters": [str(adapter_dir)]},
        ],
        "tasks": [
            {"path": str(tmp_path / f"{name}.jsonl"), "format": "choices"}
            for name in ("one", "two")
        ],
        "answers": {"prompts": str(tmp_path / "prompts.txt"), "max_tokens": 8},
    }


def run(values: dict[str, Any]) -> dict[str, Any]:
    """Evaluate; return results.json."""
    evaluate(from_dict(EvaluateConfig, values))
    return read_json(Path(values["run_dir"], "results.json"))


def parts(values: dict[str, Any]) -> dict[str, int]:
    """Return when each part was written."""
    files = Path(values["run_dir"], PARTS).glob("*.json")
    return {file.name: file.stat().st_mtime_ns for file in files}


def test_only_what_has_changed_is_evaluated_again(values: dict[str, Any]) -> None:
    run(values)
    before = parts(values)
    assert len(before) == 2 * (2 + 1), "of each model two tasks, and the answers"
    run(values)
    assert parts(values) == before
    write_questions(Path(values["tasks"][0]["path"]), 7)
    run(values)
    after = parts(values)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 2


def test_changed_settings_of_the_model_are_evaluated_again(
    values: dict[str, Any], tmp_path: Path
) -> None:
    folder = shutil.copytree(values["models"][0]["path"], tmp_path / "copy")
    values |= {"models": [{"path": str(folder)}], "answers": None}
    run(values)
    before = parts(values)
    settings = read_json(folder / "config.json")
    write_json_atomic(folder / "config.json", {**settings, "rms_norm_eps": 1e-3})
    run(values)
    assert len(parts(values)) == 2 * len(before)


def test_changed_chat_template_of_the_model_is_evaluated_again_and_leftovers_are_deleted(
    values: dict[str, Any], tmp_path: Path
) -> None:
    folder = shutil.copytree(values["models"][0]["path"], tmp_path / "copy")
    values |= {"models": [{"path": str(folder)}], "tasks": []}
    run(values)
    before = parts(values)
    template = load_tokenizer(folder).chat_template
    (folder / "chat_template.jinja").write_text(f"{template}{{# another #}}")
    # Of an evaluation that was killed while it merged adapters.
    left = Path(values["run_dir"], "merged-abc", "model")
    left.mkdir(parents=True)
    run(values)
    assert len(parts(values)) == 2 * len(before)
    assert not left.parent.exists()


def test_samples_have_every_question_of_every_model(values: dict[str, Any]) -> None:
    run(values)
    lines = Path(values["run_dir"], "samples.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    assert len(samples) == 2 * 2 * 6
    assert len({json.dumps(sample, sort_keys=True) for sample in samples}) == len(samples)
    report = Path(values["run_dir"], "report.html").read_text(encoding="utf-8")
    assert "tiny + poet" in report
    assert "我们 喜欢" in report


def test_everything_that_is_wrong_is_listed_at_once(values: dict[str, Any], tmp_path: Path) -> None:
    values["models"][0]["path"] = str(tmp_path / "nowhere")
    values["models"][1]["adapters"] = [str(tmp_path)]
    values["tasks"][0]["path"] = str(tmp_path / "missing.jsonl")
    values["answers"]["prompts"] = str(tmp_path / "missing.txt")
    with pytest.raises(ConfigError) as caught:
        run(values)
    fields = sorted(problem.partition(":")[0] for problem in caught.value.problems)
    assert fields == [
        "answers.prompts",
        "models.0.path",
        "models.1.adapters.0",
        "tasks.0.path",
    ]
    assert not Path(values["run_dir"]).exists()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"models": [{}]}, "models.0.path"),
        ({"models": [{"base_url": "http://127.0.0.1:1/v1"}]}, "models.0.model"),
        (
            {"models": [{"base_url": "http://127.0.0.1:1/v1", "model": "x", "adapters": ["a"]}]},
            "models.0.adapters",
        ),
        ({"models": [{"base_url": "http://127.0.0.1:1/v1", "model": "x"}]}, "models.0.tokenizer"),
        ({"models": [{"path": "a/b"}, {"path": "c/b"}]}, "models.1.name"),
        ({"tasks": [], "answers": None}, "tasks"),
        ({"texts": {"sources": [{"path": "x", "weight": 2}]}}, "texts.sources.0.weight"),
    ],
)
def test_contradictory_config_is_refused_by_field(
    values: dict[str, Any], change: dict[str, Any], field: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(EvaluateConfig, {**values, **change})
    assert field in [problem.partition(":")[0] for problem in caught.value.problems]


def job(values: dict[str, Any], folder: Path) -> list[str]:
    file = folder / "evaluate.yaml"
    file.write_text(json.dumps(values), encoding="utf-8")
    return [sys.executable, str(ROOT / "jobs" / "evaluate.py"), str(file)]


@pytest.mark.slow
def test_killed_evaluation_resumes_where_it_was(values: dict[str, Any], tmp_path: Path) -> None:
    for count in range(12):
        write_questions(tmp_path / f"more-{count}.jsonl", 20, seed=count)
    values["tasks"] = [{"path": str(tmp_path / "more-*.jsonl"), "format": "choices"}]
    wanted = run({**values, "run_dir": str(tmp_path / "whole")})
    process = subprocess.Popen(job(values, tmp_path), start_new_session=True)
    deadline = time.monotonic() + 120
    while len(parts(values)) < 3:
        assert time.monotonic() < deadline, "no part was written"
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = parts(values)
    assert not Path(values["run_dir"], "results.json").exists(), "killed after the end"
    subprocess.run(job(values, tmp_path), check=True)
    after = parts(values)
    assert {name: after[name] for name in before} == before
    found = read_json(Path(values["run_dir"], "results.json"))
    assert scores(found) == scores(wanted)


def scores(results: dict[str, Any]) -> Any:  # noqa: ANN401  # JSON
    """Return the results without what depends on the time and place of the evaluation."""
    return without(results, {"seconds", "date", "created", "run_dir", "settings", "command"})


def without(value: Any, names: set[str]) -> Any:  # noqa: ANN401  # JSON
    if isinstance(value, dict):
        return {k: without(v, names) for k, v in value.items() if k not in names}
    return [without(one, names) for one in value] if isinstance(value, list) else value


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_mistake_that_a_worker_finds_is_said_as_without_workers(values: dict[str, Any]) -> None:
    Path(values["answers"]["prompts"]).write_text("the quick " * 200, encoding="utf-8")
    values |= {"models": values["models"][:1], "tasks": []}
    values["answers"]["truncate"] = "refuse"
    messages: list[str] = []
    for num_workers in (0, 1):
        with pytest.raises(UserError) as raised:
            run({**values, "scale": {"num_workers": num_workers}})
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_give_the_same_results(values: dict[str, Any], tmp_path: Path) -> None:
    values["texts"] = {
        "sources": [{"path": str(tmp_path / "prompts.txt"), "name": "text"}],
        "sequence_tokens": 32,
    }
    wanted = run({**values, "run_dir": str(tmp_path / "alone")})
    found = run({**values, "scale": {"num_workers": 2}})
    assert scores(found) == scores(wanted)
