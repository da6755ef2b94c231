"""Packs in this process, from a list of runs that join and leave at given rounds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from raytune_llama.model.llama import load_model
from raytune_llama.train.checkpoint.layout import list_checkpoints
from raytune_llama.train.config import AnyTrainConfig
from raytune_llama.train.pack.pack import Changes, SlotRun, run_pack
from raytune_llama.train.pack.shared_model import SharedModel
from raytune_llama.train.process_group import ProcessGroup
from raytune_llama.train.result import RunResult

ALONE = ProcessGroup.single_process()


def never() -> bool:
    return False


@dataclass
class Listed:
    """Runs that join and leave at given rounds, and how they ended."""

    runs: Sequence[AnyTrainConfig]
    joining: Mapping[int, int] = field(default_factory=dict)
    leaving: Mapping[int, int] = field(default_factory=dict)
    stops: Mapping[int, Callable[[], bool]] = field(default_factory=dict)
    outcomes: dict[int, RunResult | BaseException] = field(default_factory=dict)
    round: int = -1
    max_failures: int = 3
    num_failures: int = 0

    def changes(self, *, is_idle: bool) -> Changes:  # noqa: ARG002
        self.round += 1
        due = [n for n in range(len(self.runs)) if self.joining.get(n, 0) == self.round]
        runs = [SlotRun(n, self.runs[n], self.stops.get(n, never)) for n in due]
        left = [n for n, at in self.leaving.items() if at == self.round]
        return Changes(runs, left, is_last=self.round >= max(self.joining.values(), default=0))

    def gives_up(self, number: int, error: Exception) -> bool:
        del number, error
        self.num_failures += 1
        return self.num_failures >= self.max_failures

    def ended(self, number: int, outcome: RunResult | BaseException) -> None:
        self.outcomes[number] = outcome


def share(
    config: AnyTrainConfig, workers: ProcessGroup = ALONE, *, joint: bool | None = None
) -> SharedModel:
    """Load the base of a run for a pack."""
    return SharedModel(
        load_model(config.model, config.engine.precision, workers.device),
        config.engine.precision,
        workers.device,
        gradient_checkpointing=config.engine.gradient_checkpointing,
        joint=joint,
    )


def pack_here(source: Listed) -> dict[int, RunResult | BaseException]:
    """Train the runs in one pack, in this process; return how they ended."""
    run_pack(share(source.runs[0]), source, ALONE)
    return source.outcomes


def weights_of(config: AnyTrainConfig) -> dict[str, Tensor]:
    """Return all tensors of a run's newest checkpoint: weights and moments."""
    found: dict[str, Tensor] = {}
    newest = Path(str(list_checkpoints(config.run_place)[-1]))
    for file in sorted(newest.glob("*.safetensors")):
        found |= load_file(file)
    return found


def largest_difference(ours: AnyTrainConfig, wanted: AnyTrainConfig) -> float:
    """Return the largest difference between two runs' newest checkpoints."""
    left, right = weights_of(ours), weights_of(wanted)
    assert left.keys() == right.keys()
    return max(float((left[key] - right[key]).abs().max()) for key in right)


def is_equal(ours: AnyTrainConfig, wanted: AnyTrainConfig) -> bool:
    """Whether two runs' newest checkpoints are equal bit for bit."""
    left, right = weights_of(ours), weights_of(wanted)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in right)
