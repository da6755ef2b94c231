"""JSON objects that remember which keys stand in them twice."""

import json
from typing import Any


class RepeatedKeys(dict[str, Any]):
    """An object with keys that stand in it twice, of which the last value counts."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.repeated = frozenset(name for name in names if names.count(name) > 1)


def build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its pairs, as `object_pairs_hook` of `json` gives them."""
    row = dict(pairs)
    return row if len(row) == len(pairs) else RepeatedKeys(pairs)


KEY_DECODER = json.JSONDecoder(object_pairs_hook=build_object)
"""Decodes JSON; an object with a key that stands in it twice is `RepeatedKeys`."""
