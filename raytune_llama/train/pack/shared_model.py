"""One base model in memory for all slots: the micro-batches of all slots in one forward pass.

The tokens of all micro-batches are laid out in one row, so that slots may differ in sequence
length. What depends on a slot runs on its own tokens, exactly as it does in a solo run: embeddings,
attention with its mask, its own A and B, and the loss. Norms run once on all tokens, and on GPUs so
do the base's linear layers and activations.

On CPUs these run slot by slot, so that the results are those of solo runs bit for bit: a matrix
product of MKL rounds by its number of rows (AVX2: always; AVX-512: below 16 rows), and PyTorch
computes the last elements of a vectorized SiLU or tanh-GELU with another exponential. This is as
fast for the demo's shape, and up to a third slower for tiny models (benchmarks/RESULTS.md).

Shapes: B sequences and T tokens of one micro-batch, N tokens of all of them, D hidden size, H
attention heads, K features per head, I and O input and output features of a linear layer.
"""

import contextlib
import copy
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar, cast

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2CLS
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from raytune_llama.model.config import Precision
from raytune_llama.model.embeddings import projection_weight
from raytune_llama.model.llama import DTYPES, SummedLoss, causal_lm
from raytune_llama.model.loss import summed_cross_entropy
from raytune_llama.train.engines.protocol import keep_buffer_precision

M = TypeVar("M", bound=nn.Module)

_ACTIVATIONS = tuple(each[0] if isinstance(each, tuple) else each for each in ACT2CLS.values())

Scale = Callable[[Tensor], Tensor]
"""Given the summed loss of a micro-batch, returns what is differentiated."""

_names = (f"raytune_pack_{number}" for number in itertools.count())


class SlotRandom:
    """The device's default generator, as a solo run finds it after `torch.manual_seed`.

    Dropout and noise draw from the default generator. Each slot swaps in its own state for its
    own layers, so that it draws what it would draw alone.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        index = device.index or 0
        on_gpu = device.type == "cuda"
        self._generator = (
            torch.cuda.default_generators[index] if on_gpu else torch.default_generator
        )
        self.state = torch.Generator(device).manual_seed(seed).get_state()
        """State of the generator, between two blocks."""

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the default generator continue with this state during the block."""
        self._generator.set_state(self.state)
        yield
        self.state = self._generator.get_state()


@dataclass
class Part:
    """One slot's micro-batch in a pass over the shared model."""

    module: SummedLoss
    """Module of the slot: its adapter on the shared weights."""

    layers: Mapping[str, LoraLinear]
    """Adapted layers of `module`, by their names in the base model."""

    ids_BT: Tensor
    """Token ids."""

    positions_BT: Tensor
    """Position of each token in its document."""

    labels_BT: Tensor
    """The id that follows each token, or IGNORE."""

    random: SlotRandom
    """What the slot's dropout and noise draw from."""

    _masks: dict[bool, Tensor | None] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Number of tokens, padding included."""
        return self.ids_BT.numel()

    def embed(self) -> Tensor:
        """Return the token embeddings, (1, B x T, D)."""
        with self.random.in_place():
            embedded_BTD = self.module.embed(self.ids_BT, self.positions_BT)
        return embedded_BTD.reshape(1, self.num_tokens, -1)

    def run(self, module: nn.Module, input_1NI: Tensor) -> Tensor:
        """Call a layer on the part's tokens, in the shape that they have in a solo run."""
        return module(input_1NI.view(*self.ids_BT.shape, -1)).view(1, self.num_tokens, -1)

    def adapt(self, layer: LoraLinear, input_1NI: Tensor, output_1NO: Tensor) -> Tensor:
        """Add the slot's update to the base's output of a layer, as PEFT does."""
        input_BTI = input_1NI.view(*self.ids_BT.shape, -1)
        dropout, factor_a, factor_b = (
            cast("nn.ModuleDict", each)["default"]
            for each in (layer.lora_dropout, layer.lora_A, layer.lora_B)
        )
        is_drawn = self.module.training and not isinstance(dropout, nn.Identity)
        with self.random.in_place() if is_drawn else contextlib.nullcontext():
            dropped_BTI = dropout(input_BTI)
        update_BTO = factor_b(factor_a(dropped_BTI)) * layer.scaling["default"]
        return (output_1NO.view_as(update_BTO) + update_BTO).view_as(output_1NO)

    def mask(self, embedded_1ND: Tensor, *, is_sliding: bool) -> Tensor | None:
        """Return the attention mask that the model makes for this micro-batch alone.

        Args:
            embedded_1ND: the part's hidden states, of which only type and place are used.
            is_sliding: whether the layer attends only to a window before each token.
        """
        if is_sliding not in self._masks:
            create = create_sliding_window_causal_mask if is_sliding else create_causal_mask
            self._masks[is_sliding] = cast(
                "Tensor | None",
                create(
                    config=causal_lm(self.module.model).config,
                    inputs_embeds=embedded_1ND.view(*self.ids_BT.shape, -1),
                    attention_mask=None,
                    past_key_values=None,
                    position_ids=self.positions_BT,
                ),
            )
        return self._masks[is_sliding]

    def loss(self, hidden_1ND: Tensor) -> Tensor:
        """Return the summed loss of the part, in nats, from its last hidden states."""
        weight_VD = projection_weight(causal_lm(self.module.model))
        return summed_cross_entropy(hidden_1ND.squeeze(0), weight_VD, self.labels_BT.flatten())


class SharedModel:
    """A frozen base model on which several slots train at once."""

    def __init__(
        self,
        model: PreTrainedModel,
        precision: Precision,
        device: torch.device,
        *,
        gradient_checkpointing: bool = False,
        joint: bool | None = None,
    ) -> None:
        """Move the base to the device, and prepare it for parts of several slots.

        Args:
            model: the base, as `load_model` returns it; its attention is `sdpa`.
            precision: precision of its weights and of compute.
            device: device that it computes on.
            gradient_checkpointing: recompute activations in the backward pass.
            joint: run the base's linear layers and activations once on all tokens, not slot by
                slot; None: on GPUs.
        """
        model.requires_grad_(False)
        with keep_buffer_precision(model, device):
            cast("nn.Module", model).to(device, DTYPES[precision])
        self._model = model
        self._joint = device.type != "cpu" if joint is None else joint
        self._parts: Sequence[Part] = ()
        self._decoder = self._build_decoder()
        if gradient_checkpointing:
            self._packed.gradient_checkpointing_enable(
                {"use_reentrant": False, "context_fn": self._replay_draws}
            )

    def new_copy(self) -> PreTrainedModel:
        """Return the base with modules of its own, whose weights are the shared ones."""
        return _share(self._model)

    def _build_decoder(self) -> nn.Module:
        self._packed = _share(self._model)
        decoder = self._packed.get_decoder()
        inside = set(decoder.modules())
        name = next(_names)
        # The table of functions is global, and must not keep this model in memory.
        ALL_ATTENTION_FUNCTIONS[name] = partial(_call, weakref.WeakMethod(self._attend))
        # Without a mask function of this name, the model makes no mask over all tokens.
        self._packed.config._attn_implementation = name
        for path, module in list(self._packed.named_modules()):
            if module in inside and isinstance(module, (nn.Linear, *_ACTIVATIONS)):
                parent, _, last = path.rpartition(".")
                layer = _SharedLayer(module, path, self)
                setattr(self._packed.get_submodule(parent), last, layer)
        return decoder

    def train(self, parts: Sequence[Part], scales: Sequence[Scale]) -> list[Tensor]:
        """Add each part's gradient to the weights of its slot; return the summed losses.

        Args:
            parts: micro-batches of different slots.
            scales: gives for each part what to differentiate, from its loss.
        """
        self._decoder.train()
        with self._running(parts):
            losses = self._losses(parts)
            torch.autograd.backward(
                [scale(loss) for scale, loss in zip(scales, losses, strict=True)]
            )
        return [loss.detach() for loss in losses]

    def evaluate(self, parts: Sequence[Part]) -> list[Tensor]:
        """Return the summed losses of the parts, whose modules are in evaluation mode."""
        self._decoder.eval()
        with self._running(parts), torch.no_grad():
            return self._losses(parts)

    @contextlib.contextmanager
    def _running(self, parts: Sequence[Part]) -> Iterator[None]:
        self._parts = parts
        try:
            yield
        finally:
            self._parts = ()

    def _losses(self, parts: Sequence[Part]) -> list[Tensor]:
        embedded_1ND = torch.cat([part.embed() for part in parts], dim=1)
        positions_1N = torch.cat([part.positions_BT.reshape(1, -1) for part in parts], dim=1)
        hidden_1ND = self._decoder(
            inputs_embeds=embedded_1ND, position_ids=positions_1N, use_cache=False
        ).last_hidden_state
        return [
            part.loss(own_1ND) for part, own_1ND in zip(parts, self._split(hidden_1ND), strict=True)
        ]

    def _split(self, packed_1N: Tensor) -> Sequence[Tensor]:
        """Split a tensor along dimension 1 into the parts; its gradients are joined in one copy."""
        return packed_1N.split([part.num_tokens for part in self._parts], dim=1)

    def run_layer(self, layer: nn.Module, name: str, input_1NI: Tensor) -> Tensor:
        """Call a layer of the base, and add each slot's update of it on the slot's own tokens.

        Args:
            layer: linear layer or activation function.
            name: its name in the base model.
            input_1NI: inputs of all tokens.

        Returns:
            The outputs of all tokens, (1, N, O).
        """
        if self._joint:
            output_1NO = layer(input_1NI)
        else:
            parts = zip(self._parts, self._split(input_1NI), strict=True)
            output_1NO = torch.cat([part.run(layer, own) for part, own in parts], dim=1)
        updates = [part.layers.get(name) for part in self._parts]
        if not any(update is not None for update in updates):
            return output_1NO
        # Inputs are split again: the backward pass adds their gradients up in a solo run's order.
        inputs, outputs = self._split(input_1NI), self._split(output_1NO)
        return torch.cat(
            [
                output if update is None else part.adapt(update, own, output)
                for part, update, own, output in zip(
                    self._parts, updates, inputs, outputs, strict=True
                )
            ],
            dim=1,
        )

    def _attend(
        self,
        module: nn.Module,
        query_1HNK: Tensor,
        key_1HNK: Tensor,
        value_1HNK: Tensor,
        attention_mask: Tensor | None,
        **options: Any,  # noqa: ANN401  # the model's own
    ) -> tuple[Tensor, None]:
        """Attend within each part, with PyTorch's SDPA and the part's own mask."""
        assert attention_mask is None, "the model makes no mask for this attention"
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        is_sliding = options.get("sliding_window") is not None
        split = [self._split(each.transpose(1, 2)) for each in (query_1HNK, key_1HNK, value_1HNK)]
        outputs: list[Tensor] = []
        for part, *own in zip(self._parts, *split, strict=True):
            shape = part.ids_BT.shape
            query, key, value = (each.view(*shape, *each.shape[2:]).transpose(1, 2) for each in own)
            mask = part.mask(own[0].flatten(2), is_sliding=is_sliding)
            with part.random.in_place() if options.get("dropout") else contextlib.nullcontext():
                output_BTHK, _ = attend(module, query, key, value, mask, **options)
            outputs.append(output_BTHK.reshape(1, part.num_tokens, *output_BTHK.shape[2:]))
        return torch.cat(outputs, dim=1), None

    def _replay_draws(self) -> tuple[contextlib.AbstractContextManager[None], ...]:
        """Return contexts for a layer's first pass, and for its recomputation with equal draws."""
        states = [part.random.state for part in self._parts]
        return contextlib.nullcontext(), self._with_states(states)

    @contextlib.contextmanager
    def _with_states(self, states: list[Tensor]) -> Iterator[None]:
        later = [part.random.state for part in self._parts]
        for part, state in zip(self._parts, states, strict=True):
            part.random.state = state
        yield
        for part, state in zip(self._parts, later, strict=True):
            part.random.state = state


class _SharedLayer(nn.Module):
    """A linear layer or an activation of the base, which the shared model runs."""

    def __init__(self, layer: nn.Module, name: str, shared: SharedModel) -> None:
        super().__init__()
        self._layer, self._name = layer, name
        self._shared = shared

    def forward(self, input_1NI: Tensor) -> Tensor:
        """Return the outputs of all tokens, (1, N, O)."""
        return self._shared.run_layer(self._layer, self._name, input_1NI)


def _call(
    method: "weakref.WeakMethod[Callable[..., tuple[Tensor, None]]]",
    *tensors: Tensor | nn.Module | None,
    **options: Any,  # noqa: ANN401  # the model's own
) -> tuple[Tensor, None]:
    """Call a method whose object is alive, since only its own model calls it."""
    found = method()
    assert found is not None
    return found(*tensors, **options)


def _share(model: M) -> M:
    """Copy a module and its submodules, but none of the tensors."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, memo={id(tensor): tensor for tensor in tensors})
