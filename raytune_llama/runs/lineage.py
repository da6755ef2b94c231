"""What an entry was made from, and what was made from it: by hash, else by the place it names."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from raytune_llama.config.errors import UserError
from raytune_llama.runs.entries import Entry
from raytune_llama.runs.text import show_place
from raytune_llama.storage.hashes import show_hash
from raytune_llama.storage.place import Place


@dataclass(frozen=True)
class Relative:
    """Something that an entry was made from, or that was made from it."""

    role: str
    """What the older one is to the newer one, such as `adapter` or `store`."""

    place: Place | None
    """Where it is; None: it is known by its hash only."""

    entry: Entry | None
    """The entry that was found there; None: it is not among the surveyed ones."""

    hash: str | None
    """Hash by which they are linked; None: by the place that a config names."""

    def __str__(self) -> str:
        where = "not found here" if self.place is None else show_place(self.place)
        kind = "" if self.entry is None else f" ({self.entry.kind}, {self.entry.state})"
        return f"{self.role}: {where}{kind}, {self._proof}"

    @property
    def _proof(self) -> str:
        if self.hash is None:
            return "named by path"
        try:
            return show_hash(self.hash)
        except UserError:
            return self.hash  # of an algorithm that a later release writes

    def to_json(self) -> dict[str, Any]:
        """Return the link as plain data."""
        place = None if self.place is None else str(self.place)
        return {"role": self.role, "place": place, "hash": self.hash}


def find_sources(entry: Entry, entries: Sequence[Entry]) -> list[Relative]:
    """Return what an entry was made from.

    Args:
        entry: any entry.
        entries: entries among which it is looked for.
    """
    found: list[Relative] = []
    seen: set[tuple[str, Place]] = set()
    others = [other for other in entries if other.place != entry.place]
    named = {role: place for place, role in entry.links.places.items()}
    for digest, role in entry.links.uses.items():
        source = next((other for other in others if digest in other.links.offers), None)
        place = named.get(role) if source is None else source.place
        if place is not None and (role, place) in seen:
            continue  # another file of the same weights
        found.append(Relative(role, place, source, digest))
        seen |= set() if place is None else {(role, place)}
    known = {relative.role for relative in found}
    found += [
        Relative(role, place, _at(place, others), None)
        for place, role in entry.links.places.items()
        if role not in known
    ]
    return found


def find_results(entry: Entry, entries: Sequence[Entry]) -> list[Relative]:
    """Return what was made from an entry, or is being made.

    Args:
        entry: any entry.
        entries: entries among which it is looked for.
    """
    return list(_find_results(entry, entries))


def _find_results(entry: Entry, entries: Sequence[Entry]) -> Iterator[Relative]:
    for other in entries:
        if other.place == entry.place or other.place.is_below(entry.place):
            continue
        shared = [digest for digest in other.links.uses if digest in entry.links.offers]
        if shared:
            yield Relative(other.links.uses[shared[0]], other.place, other, shared[0])
            continue
        roles = [role for place, role in other.links.places.items() if place.is_below(entry.place)]
        hashed = set(other.links.uses.values())
        # What is linked by its hash is another one now, if that hash is not here.
        role = next((role for role in roles if not (entry.links.offers and role in hashed)), None)
        if role is not None:
            yield Relative(role, other.place, other, None)


def _at(place: Place, entries: Sequence[Entry]) -> Entry | None:
    """Return the innermost entry at a place or around it."""
    around = [entry for entry in entries if place.is_below(entry.place)]
    return max(around, key=lambda entry: len(entry.place.key), default=None)
