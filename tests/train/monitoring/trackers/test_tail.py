"""Promise: every record of a growing metrics.jsonl is returned, also after it was written anew."""

from pathlib import Path

import pytest

from raytune_llama.storage.place import Place
from raytune_llama.train.monitoring.metrics import LOSS, MetricsLog
from raytune_llama.train.monitoring.trackers.tail import MetricsTail


def append(run_dir: Place, resumed_step: int, steps: range, factor: float = 1.0) -> None:
    with MetricsLog(run_dir, resumed_step=resumed_step, tensorboard=False) as log:
        for step in steps:
            log.write(step, {LOSS: step * factor})


def read_steps(tail: MetricsTail) -> list[int]:
    return [record["step"] for record in tail.read()]


def test_tail_of_a_file_that_is_not_there_yet_is_empty(run_dir: Place) -> None:
    assert MetricsTail(run_dir).read() == []


def test_tail_returns_what_was_appended_since(run_dir: Place) -> None:
    tail = MetricsTail(run_dir)
    append(run_dir, 0, range(1, 4))
    assert read_steps(tail) == [1, 2, 3]
    assert tail.read() == []
    append(run_dir, 3, range(4, 6))
    assert read_steps(tail) == [4, 5]


@pytest.mark.parametrize("steps", [range(3, 4), range(3, 20)])
def test_tail_of_a_file_whose_end_was_written_anew_starts_over(
    run_dir: Place, steps: range
) -> None:
    tail = MetricsTail(run_dir)
    append(run_dir, 0, range(1, 6))
    assert read_steps(tail) == [1, 2, 3, 4, 5]
    append(run_dir, 2, steps, factor=0.5)
    assert read_steps(tail) == [1, 2, *steps]


def test_tail_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
    place = Place.local(tmp_path)
    file = place / "metrics.jsonl"
    file.path.write_text('{"step": 1}\n{"step": 2')
    tail = MetricsTail(place)
    assert read_steps(tail) == [1]
    with file.path.open("a") as end:
        end.write("3}\n")
    assert read_steps(tail) == [23]


def test_tail_of_a_large_file_is_read_in_parts(tmp_path: Path) -> None:
    place = Place.local(tmp_path)
    lines = [f'{{"step": {step}, "text": "{"x" * 1000}"}}\n' for step in range(3000)]
    (place / "metrics.jsonl").path.write_text("".join(lines))
    tail = MetricsTail(place)
    steps: list[int] = []
    num_parts = 0
    while found := read_steps(tail):
        steps += found
        num_parts += 1
    assert steps == list(range(3000))
    assert num_parts >= 3
