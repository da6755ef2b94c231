"""Log of steps that a person should look at, with the samples they read: one JSON line each.

`bad_steps.jsonl` has the steps with a non-finite loss or gradient, `loss_spikes.jsonl` those with
a loss far above the usual. A run without any has no such file.
"""

import math
import os
from collections.abc import Collection, Mapping
from typing import Any, Literal

from raytune_llama.data.batches.provenance import Provenance
from raytune_llama.storage.place import Place
from raytune_llama.storage.transfers import Mirror
from raytune_llama.train.monitoring.metrics import read_records, record_line

BAD_STEPS_FILE = "bad_steps.jsonl"
SPIKES_FILE = "loss_spikes.jsonl"

IncidentFile = Literal["bad_steps.jsonl", "loss_spikes.jsonl"]


class IncidentLog:
    """Appends to a run's incident files; each line is in the run directory once it is written."""

    def __init__(self, run_dir: Place, origins: Provenance, *, resumed_step: int) -> None:
        """Open a run's incident files, and drop records of steps that run again.

        Args:
            run_dir: directory of the run.
            origins: provenance of the samples of each step.
            resumed_step: steps done; those after it run again.
        """
        self._mirror = Mirror(run_dir)
        self._origins = origins
        for name in (BAD_STEPS_FILE, SPIKES_FILE):
            if (run_dir / name).exists():
                kept = [r for r in read_records(run_dir / name) if r["step"] <= resumed_step]
                file = Place.local(self._mirror.folder / name)
                file.write_bytes("".join(map(record_line, kept)).encode())

    def write(
        self,
        name: IncidentFile,
        step: int,
        facts: Mapping[str, float | str | None],
        suspects: Collection[int] = (),
    ) -> None:
        """Append one step.

        Args:
            name: name of the file.
            step: step number from 1, as in the metrics.
            facts: what happened; a non-finite number is written as a string.
            suspects: positions of the samples that are the likely cause.
        """
        samples = [
            {**sample, "suspect": True} if sample["position"] in suspects else sample
            for sample in self._origins.of_step(step - 1)
        ]
        legal = {key: _legal(fact) for key, fact in facts.items()}
        with (self._mirror.folder / name).open("a") as file:
            file.write(record_line({"step": step, **legal, "samples": samples}))
            file.flush()
            os.fsync(file.fileno())
        # Now, not with the next checkpoint: there may be none.
        self._mirror.push()

    def close(self) -> None:
        """Flush everything to the run directory and close."""
        self._mirror.close()


def _legal(fact: float | str | None) -> Any:  # noqa: ANN401  # any JSON value
    return str(fact) if isinstance(fact, float) and not math.isfinite(fact) else fact
