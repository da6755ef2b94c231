"""Which text a step sees: from its positions back to sources, documents and places in files."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raytune_llama.data.batches.mixture import TrainingSource
from raytune_llama.data.batches.step_batches import BatchPlan
from raytune_llama.data.store.token_store import TokenSplit, TokenStore


@dataclass(frozen=True)
class Provenance:
    """Answers for a run which text stood where; reads what it is asked for, and nothing before."""

    store: TokenStore
    """What the run trains on."""
    split: TokenSplit
    """The side of it that the sources are cut from."""
    sources: Sequence[TrainingSource]
    """All with sequences, as the plan counts them."""
    plan: BatchPlan
    """The order of the run."""

    def of_step(self, step: int) -> list[dict[str, Any]]:
        """Return the samples of a whole step, of all workers, as JSON data.

        Each has its `position`, the name of its `source`, its `index` there and the source's
        `epoch`, and the `documents` that it has tokens of: the `number` of each in the split, its
        `file` (its number where the store names none) and its `offset` there, in bytes where text
        is concerned, in rows of a Parquet file.

        Args:
            step: From 0.
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
