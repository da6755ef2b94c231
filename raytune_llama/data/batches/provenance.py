"""Trace the data of a training step back to its sources, documents and file offsets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raytune_llama.data.batches.mixture import TrainingSource
from raytune_llama.data.batches.step_batches import BatchPlan
from raytune_llama.data.store.token_store import TokenSplit, TokenStore


@dataclass(frozen=True)
class Provenance:
    """Maps positions of a run to documents; computes only what is queried."""

    store: TokenStore
    """Token store that the run trains on."""
    split: TokenSplit
    """Split that the sources are cut from."""
    sources: Sequence[TrainingSource]
    """All sources with sequences, in the plan's order."""
    plan: BatchPlan
    """Batch plan of the run."""

    def of_step(self, step: int) -> list[dict[str, Any]]:
        """Return the samples of a step, over all workers, as JSON data.

        Each sample has its `position`, the name of its `source`, its `index` in the source, the
        source's `epoch`, and its `documents`: the `number` of each in the split, its `file` (name,
        or index if the store records no name) and its `offset` in the file, in bytes, or in rows
        for tables.

        Args:
            step: Optimizer step, from 0.
        """
        return [self._sample(position) for position in self.plan.positions(step, 0, 1)]

    def _sample(self, position: int) -> dict[str, Any]:
        sample = self.plan.sample(position, self.store.fingerprint)
        source = self.sources[sample.source]
        return {
            "position": position,
            "source": source.name,
            "index": sample.index,
            "epoch": sample.epoch,
            "documents": [self._document(n) for n in source.sequences.documents(sample)],
        }

    def _document(self, number: int) -> dict[str, Any]:
        file, offset = self.split.origin(number)
        return {"number": number, "file": self.store.file_name(file) or file, "offset": offset}
