"""Multiple-choice questions with five examples each: ours against lm-eval's own `hf` model.

    python benchmarks/evaluate_vs_lm_eval.py [--questions 1000] [--subjects 10]
                                              [--rounds 2] [--threads N]

The demo's model in fp32 on the CPU. The questions are made from the demo's news: how a sentence
goes on, with four choices; subjects in C-Eval's files, whose examples are the same for all
questions of a subject. Both sides run the same tasks through lm-evaluation-harness with the same
number of threads, ours behind its interface, the peer as it comes, with the fastest of several
batch sizes. The sides take turns with the subjects. Loading the model is not timed.

Exit status 1: an option's log-likelihood differs by more than 1e-4.
"""

import argparse
import csv
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import torch
from harness.endpoint import DEMO_MODEL
from lm_eval.models.huggingface import HFLM

from raytune_llama.evaluate.config import EvaluatedModelConfig
from raytune_llama.evaluate.language_model import ServedLanguageModel
from raytune_llama.evaluate.models import load_model
from raytune_llama.evaluate.tasks.config import TaskConfig
from raytune_llama.evaluate.tasks.harness import run_task
from raytune_llama.evaluate.tasks.loading import load_tasks
from raytune_llama.evaluate.tasks.outcome import TaskOutcome
from raytune_llama.evaluate.tasks.task import EvaluationTask
from raytune_llama.logs import setup_logging

SHOTS = 5
BATCH_SIZES = (1, 4, 16)
TARGET, TOLERANCE = 2.0, 1e-4
NEWS = DEMO_MODEL.parent / "corpus" / "peoples_daily.txt"
NEEDS = """needs: the demo's material (`make demo`) and the extra `eval`; 3 GB of memory.
takes: about two hours on two cores with the default sizes, nearly all of it the peer."""


def write_questions(folder: Path, num_questions: int, num_subjects: int) -> None:
    """Write C-Eval's files: how sentences of the news go on, with four choices."""
    generator = random.Random(1)
    lines = NEWS.read_text(encoding="utf-8").splitlines()
    sentences = [s for line in lines for s in line.split("。") if 16 <= len(s) <= 28]
    generator.shuffle(sentences)
    source = iter(sentences)
    per_subject = num_questions // num_subjects
    for subject in range(num_subjects):
        for split, count in (("dev", SHOTS), ("val", per_subject)):
            (folder / split).mkdir(exist_ok=True)
            with (folder / split / f"news_{subject}_{split}.csv").open(
                "w", encoding="utf-8", newline=""
            ) as file:
                writer = csv.writer(file)
                writer.writerow(["id", "question", "A", "B", "C", "D", "answer"])
                for number in range(count):
                    texts = [next(source) for _ in range(4)]
                    gold = generator.randrange(4)
                    beginning = texts[gold][: len(texts[gold]) // 2]
                    options = [text[len(text) // 2 :] for text in texts]
                    question = f"下面这句话的后半句是什么?{beginning}……"
                    writer.writerow([number, question, *options, "ABCD"[gold]])


def find_batch_size(task: EvaluationTask, model: Any) -> int:  # noqa: ANN401  # HFLM
    """Return the fastest batch size of the peer on some questions, and print all."""
    seconds: dict[int, float] = {}
    for size in BATCH_SIZES:
        model.batch_size_per_gpu = size
        start = time.perf_counter()
        run_task(task, model)
        seconds[size] = time.perf_counter() - start
        print(f"hf, batch size {size}: {task.num_questions / seconds[size]:.2f} questions/s")
    return min(seconds, key=seconds.__getitem__)


def difference(ours: TaskOutcome, theirs: TaskOutcome) -> float:
    """Return the largest difference of two options' log-likelihoods."""
    pairs = zip(ours.samples, theirs.samples, strict=True)
    return max(
        abs(one - other)
        for sample, peer in pairs
        for one, other in zip(sample.scores, peer.scores, strict=True)
    )


def measure(
    tasks: Sequence[EvaluationTask],
    ours: ServedLanguageModel,
    peer: Any,  # noqa: ANN401  # HFLM
    num_rounds: int,
) -> float:
    """Run both sides on every subject, in turn; print the figures; return the worst difference."""
    worst = 0.0
    ratios: list[float] = []
    for number in range(num_rounds):
        seconds = {"ours": 0.0, "hf": 0.0}
        correct = 0
        for place, task in enumerate(tasks):
            sides = [("ours", ours), ("hf", peer)]
            outcomes: dict[str, TaskOutcome] = {}
            for name, model in sides if (number + place) % 2 == 0 else reversed(sides):
                start = time.perf_counter()
                outcomes[name] = run_task(task, model)
                seconds[name] += time.perf_counter() - start
            worst = max(worst, difference(outcomes["ours"], outcomes["hf"]))
            correct += sum(bool(sample.correct) for sample in outcomes["ours"].samples)
        total = sum(task.num_questions for task in tasks)
        ratios.append(seconds["hf"] / seconds["ours"])
        speeds = ", ".join(f"{name} {total / value:.2f}" for name, value in seconds.items())
        print(
            f"round {number + 1}: questions/s: {speeds}; ratio {ratios[-1]:.2f}; "
            f"accuracy {correct / total:.3f}; largest difference {worst:.1e}",
            flush=True,
        )
    median = statistics.median(ratios)
    verdict = "met" if median >= TARGET else "missed"
    print(f"ours {median:.2f} times as fast as lm-eval's hf; target {TARGET:g}: {verdict}")
    return worst


def main() -> None:
    """Compare both sides."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=NEEDS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--subjects", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--tiny", action="store_true", help="20 questions, one round")
    given = parser.parse_args()
    if given.tiny:
        given.questions, given.rounds = 20, 1
    setup_logging("warning")
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        write_questions(Path(folder), given.questions, given.subjects)
        config = TaskConfig(path=folder, format="ceval", shots=SHOTS, name="news")
        tasks = load_tasks([config])
        sample = load_tasks(
            [TaskConfig(path=folder, format="ceval", shots=SHOTS, name="few", limit=8)]
        )[0]
        model = EvaluatedModelConfig(path=str(DEMO_MODEL))
        ours = ServedLanguageModel(
            load_model(model, field="models.0", scratch=Path(folder), use_gpu=False)
        )
        make_peer: Any = HFLM  # a decorator hides its arguments
        peer = make_peer(pretrained=str(DEMO_MODEL), dtype="float32", device="cpu")
        peer.batch_size_per_gpu = find_batch_size(sample, peer)
        print(f"{given.threads} threads; {len(tasks)} subjects; hf with the best batch size")
        worst = measure(tasks, ours, peer, given.rounds)
    if worst > TOLERANCE:
        sys.exit(f"an option's log-likelihood differs by {worst:.1e}")


if __name__ == "__main__":
    main()
