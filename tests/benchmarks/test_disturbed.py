"""What measures goodput: steps are seen through restarts, and each kill has its recovery."""

import os
import sys
from pathlib import Path

from benchmarks.harness.disturbed import (
    Kill,
    MeasuredJob,
    ObservedStep,
    RunRecord,
    run_job_under_kills,
)
from benchmarks.harness.nodes import LocalNodes

# Ends badly at its first call, in the middle of a line, and goes on at the second.
PROGRAM = """
import json, os, pathlib, sys, time
file = pathlib.Path(sys.argv[1])
done = [] if not file.exists() else file.read_text().splitlines(keepends=True)[:2]
temporary = file.with_suffix(".tmp")
temporary.write_text("".join(done))
temporary.replace(file)
lines = file.open("a", buffering=1)
time.sleep(0.5)
for step in range(len(done) + 1, 5):
    lines.write(json.dumps({"step": step, "train/loss": 1.0}) + chr(10))
    time.sleep(0.1)
    if step == 3 and not done:
        lines.write('{"st')
        sys.exit(1)
"""


class NoNodes(LocalNodes):
    """The environment alone: what is run here needs no cluster."""

    def __init__(self) -> None:
        self.environment = dict(os.environ)


def test_run_side_sees_steps_through_restarts(tmp_path: Path) -> None:
    steps_file = tmp_path / "steps.jsonl"
    command = [sys.executable, "-c", PROGRAM, str(steps_file)]
    side = MeasuredJob("side", command, steps_file, 4)
    record = run_job_under_kills(side, NoNodes(), limit_seconds=60, log=tmp_path / "log")
    assert record.is_finished
    assert (record.num_interventions, record.num_starts) == (1, 2)
    assert [(step.number, step.start) for step in record.steps] == [
        *((1, 1), (2, 1), (3, 1)),
        *((3, 2), (4, 2)),
    ]


def test_record_counts_from_each_kill_to_the_first_step_of_later_workers() -> None:
    record = RunRecord(
        steps=[
            ObservedStep(1, 10.0, 1),
            ObservedStep(2, 11.5, 1),
            ObservedStep(2, 20.0, 2),
            ObservedStep(3, 40.0, 3),
        ],
        # Two kills before the workers were back, and one behind which they never were.
        kills=[
            Kill("worker", 11.0, 1),
            Kill("node", 15.0, 1),
            Kill("driver", 30.0, 2),
            Kill("driver", 41.0, 3),
        ],
    )
    assert record.recoveries() == [9.0, 5.0, 10.0]
    assert record.recoveries("node") == [5.0]
    assert record.recoveries("driver") == [10.0]
