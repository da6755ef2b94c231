"""A KV cache whose rows belong to different sequences.

Shapes: S slots, N rows per pass, Q new tokens per row, L columns that a pass sees, H key heads, D
head size.

`transformers`' own caches grow all rows together. Here a row is a slot: sequences of any length
lie side by side, each starts in column 0, and one that ends frees its row for another. A pass
works on adjacent rows, so that it copies nothing.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin


@dataclass
class CacheView:
    """The part of the cache that a forward pass sees."""

    first: int = 0
    """Index of the pass's first row."""

    positions_NQ: Tensor | None = None
    """Column in which each new token's key and value are stored: its position."""

    num_columns: int = 0
    """L: number of columns that the pass sees, up to the last position of any row."""


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, (S, H, columns, D)."""

    def __init__(self, window: CacheView, num_slots: int) -> None:
        super().__init__()
        self._window, self._num_slots = window, num_slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate, once the first pass has shown the number of heads, sizes, dtype and device."""
        shape = (self._num_slots, key_states.shape[1], 0)
        self.keys = key_states.new_zeros((*shape, key_states.shape[3]))
        self.values = value_states.new_zeros((*shape, value_states.shape[3]))
        self.is_initialized = True

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: object,  # noqa: ARG002
        **kwargs: object,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values, (N, H, Q, D); return all that the pass sees, (N, H, L, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        window, num_rows = self._window, len(key_states)
        assert window.positions_NQ is not None
        self._reserve(window.num_columns)
        rows = slice(window.first, window.first + num_rows)
        row_N1 = torch.arange(num_rows, device=key_states.device).unsqueeze(1)
        keys, values = (stored[rows] for stored in self._stored())
        keys[row_N1, :, window.positions_NQ] = key_states.transpose(1, 2)
        values[row_N1, :, window.positions_NQ] = value_states.transpose(1, 2)
        return keys[:, :, : window.num_columns], values[:, :, : window.num_columns]

    def move(self, source: int, target: int, num_columns: int) -> None:
        """Copy a slot's first columns to another slot."""
        for stored in self._stored():
            stored[target, :, :num_columns] = stored[source, :, :num_columns]

    def _stored(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def _reserve(self, num_columns: int) -> None:
        have = self._stored()[0].shape[2]
        if num_columns <= have:
            return
        # Zeros, since masked values are still multiplied. Doubling keeps the copies few.
        wanted = max(num_columns, 2 * have)
        self.keys, self.values = (
            torch.cat([old, old.new_zeros((*old.shape[:2], wanted - have, old.shape[3]))], dim=2)
            for old in self._stored()
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002
        """Return the number of columns of a mask, and the index of the first."""
        return self._window.num_columns, 0

    def get_seq_length(self) -> int:
        """Return the number of cached tokens of the longest row, without the new ones."""
        positions_NQ = self._window.positions_NQ
        return 0 if positions_NQ is None else self._window.num_columns - positions_NQ.shape[1]

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1


class SlotCache(Cache):
    """The KV cache of a model's layers, which all see the same window."""

    def __init__(self, config: PreTrainedConfig, num_slots: int) -> None:
        """Create an empty cache.

        Args:
            config: config of the model.
            num_slots: S, the maximum number of sequences in the cache.
        """
        self.window = CacheView()
        num_layers = config.get_text_config(decoder=True).num_hidden_layers
        layers: list[Any] = [SlotLayer(self.window, num_slots) for _ in range(num_layers)]
        super().__init__(layers=layers)

    def set_view(self, first: int, positions_NQ: Tensor, num_columns: int) -> None:
        """Set what the next pass sees: rows starting at `first`, and `num_columns` columns."""
        window = self.window
        window.first, window.positions_NQ, window.num_columns = first, positions_NQ, num_columns

    def move(self, source: int, target: int, num_columns: int) -> None:
        """Copy a slot's first columns to another slot, in every layer."""
        for layer in self.layers:
            assert isinstance(layer, SlotLayer)
            layer.move(source, target, num_columns)
