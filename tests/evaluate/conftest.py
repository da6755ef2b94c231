"""A tiny model with an adapter; outcomes of two models on three subjects, a text and a prompt."""

# ruff: noqa: RUF001  # Chinese punctuation

import math
from pathlib import Path
from statistics import fmean, stdev

import pytest

from raytune_llama.evaluate.results import (
    EvaluatedModel,
    GeneratedAnswer,
    ModelOutcome,
    TextScore,
)
from raytune_llama.evaluate.tasks.outcome import Metric, Sample, TaskOutcome
from tests.serve.tiny_chat import ADAPTER, NAME, write_tiny_chat

SUBJECTS = {"law": "Humanities", "logic": "Humanities", "physician": "Other"}


def make_outcome(subject: str, rights: str, *, missing: int = 0) -> TaskOutcome:
    """Return the outcome of a subject; `rights` has `+` for a right answer and `-` for a wrong."""
    values = [float(mark == "+") for mark in rights]
    samples = tuple(
        Sample(
            id=str(number),
            question=f"{subject}的问题{number}？",
            options=("甲", "乙"),
            scores=(-1.0, -2.0),
            answer=None if number < missing else "A",
            gold="A" if value else "B",
            correct=bool(value),
        )
        for number, value in enumerate(values)
    )
    stderr = stdev(values) / math.sqrt(len(values))
    return TaskOutcome(
        task=f"ceval/{subject}",
        benchmark="ceval",
        subject=subject,
        group=SUBJECTS[subject],
        metrics={"acc": Metric(fmean(values), stderr)},
        num_questions=len(values),
        num_missing=missing,
        num_truncated=0,
        shots=5,
        method="likelihood",
        template_hash=None,
        file_hashes={f"val/{subject}_val.csv": "blake3:" + "ab" * 32},
        first_prompt=f"<b>{subject}</b> & 答案：",
        seconds=1.0,
        samples=samples,
    )


@pytest.fixture
def outcomes() -> list[ModelOutcome]:
    def model(name: str, rights: dict[str, str], bits: float, answer: str) -> ModelOutcome:
        return ModelOutcome(
            EvaluatedModel(name, f"/models/{name}", {"weights": "blake3:" + "cd" * 32}),
            tasks=tuple(make_outcome(subject, marks) for subject, marks in rights.items()),
            texts=(TextScore("people's daily", bits, 9.5, 1000, 3000, "blake3:" + "ef" * 32),),
            answers=(GeneratedAnswer("谁写了《红楼梦》？<script>", answer),),
        )

    base = {"law": "+-+-+-+-", "logic": "+-", "physician": "--+-"}
    tuned = {"law": "++++++--", "logic": "-+", "physician": "+-+-"}
    return [
        model("base", base, 0.872, "不知道 & <b>"),
        model("base + law", tuned, 1.543, "曹雪芹"),
    ]


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """Return a folder with `tiny`, a model directory, and `adapters/poet`."""
    folder = tmp_path_factory.mktemp("evaluated")
    write_tiny_chat(folder, tokenizer_dir)
    return folder


@pytest.fixture(scope="session")
def model_dir(tiny_dir: Path) -> Path:
    """Return the model directory."""
    return tiny_dir / NAME


@pytest.fixture(scope="session")
def adapter_dir(tiny_dir: Path) -> Path:
    """Return the adapter's directory."""
    return tiny_dir / "adapters" / ADAPTER
