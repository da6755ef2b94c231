"""Lengths of a store's documents in bins of powers of two, and how many were cut or left out.

    table = LengthTable.from_manifest(store.manifest)
    for row in table.bins: print(row.label, row.documents)

A sample of the sources is counted in the same table, before there is a store.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Self

from raytune_llama.data.store.manifest import Manifest

CUT_FROM, LEFT_OUT = "cut from ", "left out with "
"""Beginnings of the events that count conversations by length; see `length_event`."""

_LENGTH_EVENT = re.compile(rf"({CUT_FROM}|{LEFT_OUT})(\d+) to \d+ tokens")

CUT_EVENTS = ("truncated", "cut_tokens", "answers_without_prompt")
"""Events that count cut conversations, the tokens cut, and answers that lost their question."""


def length_event(what: str, num_tokens: int) -> str:
    """Return the name of the event that counts a conversation that was cut or left out.

    Args:
        what: `CUT_FROM` or `LEFT_OUT`.
        num_tokens: Length of the conversation before.
    """
    low = 1 << _power(num_tokens)
    return f"{what}{low} to {2 * low - 1} tokens"


def is_length_event(name: str) -> bool:
    """Whether an event of a manifest counts conversations by length, or what was cut of them."""
    return name in CUT_EVENTS or _LENGTH_EVENT.fullmatch(name) is not None


class LengthBin(NamedTuple):
    """Documents of 2**power to 2**(power + 1) - 1 tokens."""

    power: int
    documents: int
    """Number of documents in the store, of this length after they were cut."""
    cut: int
    """Number of documents that had this length before they were cut."""
    left_out: int
    """Number of conversations that were left out for their length or for want of an answer."""

    @property
    def label(self) -> str:
        """The lengths of the bin, for people."""
        first = 1 << self.power
        return "1" if first == 1 else f"{first:,} to {2 * first - 1:,}"


@dataclass
class LengthTable:
    """Counts of documents by length, from a store's manifest or from a sample of its sources."""

    is_sample: bool = False
    """Whether it counts a sample of the sources instead of a store."""
    documents: Counter[int] = field(default_factory=Counter)
    """Number of documents in the store by the power of two of their length."""
    cut: Counter[int] = field(default_factory=Counter)
    """Number of cut documents by the power of two of their length before."""
    left_out: Counter[int] = field(default_factory=Counter)
    """Number of conversations left out, by the power of two of their length."""
    num_tokens: int = 0
    """Number of tokens of all documents."""
    num_targets: int | None = None
    """Number of tokens that the loss covers; None: all of them, as the documents are text."""
    num_cut_tokens: int = 0
    """Number of tokens that were cut."""
    num_without_prompt: int = 0
    """Number of cut conversations of which an answer lost its question."""

    @classmethod
    def from_manifest(cls, manifest: Manifest) -> Self:
        """Return the lengths that a store's manifest records, of both splits together."""
        table = cls(documents=+Counter(dict(enumerate(manifest.lengths))))
        for name, count in manifest.rows.events.items():
            if found := _LENGTH_EVENT.fullmatch(name):
                counter = table.cut if found[1] == CUT_FROM else table.left_out
                counter[_power(int(found[2]))] += count
        table.num_tokens = sum(split.tokens for split in manifest.splits.values())
        shards = [shard for split in manifest.splits.values() for shard in split.shards]
        targets = [shard.targets for shard in shards if shard.targets is not None]
        table.num_targets = sum(targets) if targets or "chat" in manifest.inputs else None
        table.num_cut_tokens = manifest.rows.events.get("cut_tokens", 0)
        table.num_without_prompt = manifest.rows.events.get("answers_without_prompt", 0)
        return table

    def add(
        self,
        num_tokens: int,
        *,
        num_targets: int | None = None,
        num_cut: int = 0,
        lost_prompt: bool = False,
    ) -> None:
        """Count a document.

        Args:
            num_tokens: Its length, after it was cut.
            num_targets: Number of its tokens that the loss covers; None: all.
            num_cut: Number of tokens that were cut.
            lost_prompt: Whether an answer lost its question.
        """
        self.documents[_power(num_tokens)] += 1
        self.num_tokens += num_tokens
        if num_targets is not None:
            self.num_targets = (self.num_targets or 0) + num_targets
        if num_cut:
            self.cut[_power(num_tokens + num_cut)] += 1
            self.num_cut_tokens += num_cut
            self.num_without_prompt += lost_prompt

    def add_left_out(self, num_tokens: int) -> None:
        """Count a conversation that was left out."""
        self.left_out[_power(num_tokens)] += 1

    @property
    def num_documents(self) -> int:
        """Number of documents in the store."""
        return self.documents.total()

    @property
    def num_rows(self) -> int:
        """Number of usable rows: documents, and conversations that were left out."""
        return self.num_documents + self.left_out.total()

    @property
    def bins(self) -> list[LengthBin]:
        """The bins from the shortest document to the longest, empty ones between them included."""
        powers = {**self.documents, **self.cut, **self.left_out}
        return [
            LengthBin(power, self.documents[power], self.cut[power], self.left_out[power])
            for power in (range(min(powers), max(powers) + 1) if powers else ())
        ]

    def count_from(self, num_tokens: int) -> tuple[int, int]:
        """Return the fewest and the most documents that can have at least so many tokens.

        They are equal if the number is a power of two, where a bin begins.
        """
        bins = range(_power(num_tokens), 1 + max(self.documents, default=0))
        counts = [self.documents[power] for power in bins]
        is_exact = num_tokens == 1 << _power(num_tokens)
        return sum(counts[0 if is_exact else 1 :]), sum(counts)

    def describe_limit(self, num_tokens: int) -> str:
        """Return the share of documents with at least so many tokens, as a percentage."""
        low, high = (share(count, self.num_documents) for count in self.count_from(num_tokens))
        return low if low == high else f"{low} to {high}"

    def facts(self) -> Iterator[tuple[str, str]]:
        """Yield what was learned, cut and left out of conversations, each with a name."""
        if self.num_targets is None:
            return
        learned = share(self.num_targets, self.num_tokens)
        yield "learned", f"{learned} of {self.num_tokens:,} tokens: {self.num_targets:,}"
        count = self.cut.total()
        lost = f": {self.num_cut_tokens:,} tokens lost" if count else ""
        if self.num_without_prompt:
            lost += f"; {self.num_without_prompt:,} answers are learned without their question"
        yield "cut", f"{count:,} of {self.num_rows:,} ({share(count, self.num_rows)}){lost}"
        count = self.left_out.total()
        why = ": too long, or no answer is left to train on" if count else ""
        yield "left out", f"{count:,} of {self.num_rows:,} ({share(count, self.num_rows)}){why}"


def _power(num_tokens: int) -> int:
    return max(num_tokens, 1).bit_length() - 1


def share(part: int, total: int) -> str:
    """Return a part of a total as a percentage; a dash if there is nothing."""
    return f"{part / total:.1%}" if total else "-"
