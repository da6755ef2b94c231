"""Training only the embedding tables: stage 1 of pre-training with a grown vocabulary.

    train_embeddings(model, EmbeddingsConfig(new_rows_only=True), new_ids(base, tokenizer))

With `new_rows_only`, the rows of new ids are a separate parameter beside the frozen table, and the
layers that read the table look each row up in the right one. Gradient norms, weight decay, moments,
partitions and checkpoints never see an old row, so nothing has to be masked or restored after a
step.

Shapes: B sequences, T tokens, D hidden size, V rows of a table, R new rows.
"""

import logging
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from raytune_llama.config.errors import UserError
from raytune_llama.model.config import EmbeddingsConfig
from raytune_llama.model.vocab import is_tied

logger = logging.getLogger(__name__)

_WEIGHT, _NEW_ROWS = ".weight", ".new_rows"


class NewRowsEmbedding(nn.Module):
    """An embedding whose rows of new ids are a separate parameter."""

    def __init__(self, weight_VD: nn.Parameter, rows_RD: nn.Parameter, ids: range) -> None:
        super().__init__()
        self.weight = weight_VD
        self.new_rows = rows_RD
        self._ids = ids

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return the row of each id, (B, T, D)."""
        is_new_BT = (ids_BT >= self._ids.start) & (ids_BT < self._ids.stop)
        # Old ids also read new row 0 and discard it: its gradient from them is exactly zero.
        places_BT = torch.where(is_new_BT, ids_BT - self._ids.start, 0)
        new_BTD = functional.embedding(places_BT, self.new_rows)
        old_BTD = functional.embedding(ids_BT, self.weight)
        return torch.where(is_new_BT.unsqueeze(-1), new_BTD, old_BTD)


class NewRowsProjection(nn.Module):
    """An output projection whose rows of new ids are a separate parameter."""

    def __init__(self, weight_VD: nn.Parameter, rows_RD: nn.Parameter, ids: range) -> None:
        super().__init__()
        self.weight = weight_VD
        self.new_rows = rows_RD
        self._ids = ids

    def full_weight(self) -> Tensor:
        """Return a copy of the table with its new rows in place, (V, D)."""
        ids = self._ids
        return torch.cat([self.weight[: ids.start], self.new_rows, self.weight[ids.stop :]])

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Return the logits, (B, T, V)."""
        return functional.linear(hidden_BTD, self.full_weight())


def new_rows_name(table: str) -> str:
    """Return the name of the parameter that holds the new rows of the table with this name."""
    return table.removesuffix(_WEIGHT) + _NEW_ROWS


def is_new_rows(name: str) -> bool:
    """Whether the parameter with this name holds the new rows of a table."""
    return name.endswith(_NEW_ROWS)


def projection_weight(model: PreTrainedModel) -> Tensor:
    """Return the full weight of the output projection, (V, D), new rows included."""
    head = cast("nn.Module", model.get_output_embeddings())
    if isinstance(head, NewRowsProjection):
        return head.full_weight()
    return cast("Tensor", head.weight)


def embedding_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the input embedding and the output projection by module name."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    return {
        name: module
        for name, module in model.named_modules()
        if any(module is layer for layer in layers)
    }


def trained_layers(model: PreTrainedModel, config: EmbeddingsConfig) -> dict[str, nn.Module]:
    """Return the layers whose table the config trains, by module name."""
    layers = embedding_layers(model)
    if config.lm_head or is_tied(model):
        return layers
    head = model.get_output_embeddings()
    return {name: layer for name, layer in layers.items() if layer is not head}


def check_embeddings(model: PreTrainedModel, config: EmbeddingsConfig, ids: range) -> list[str]:
    """Return why the model can't be trained as configured; empty if it can.

    Args:
        model: the model, with or without its weights; it is not modified.
        config: the tables to train.
        ids: the ids new to the model; see `vocab.new_ids`.
    """
    if not config.new_rows_only:
        return []
    if not ids:
        return [
            "embeddings.new_rows_only: got true, but the tokenizer adds no ids to the model's own; "
            "name a grown tokenizer in model.tokenizer, or set it to false to train full tables"
        ]
    return [
        f"embeddings.new_rows_only: got true, but {name} is a {type(layer).__name__}, not a plain "
        "nn.Embedding or nn.Linear; set it to false to train full tables"
        for name, layer in trained_layers(model, config).items()
        if type(layer) not in {nn.Embedding, nn.Linear}
    ]


def train_embeddings(model: PreTrainedModel, config: EmbeddingsConfig, ids: range) -> None:
    """Freeze a model except for its embedding tables, or for their rows of new ids.

    Args:
        model: the model, whose tables have a row for each id.
        config: the tables to train.
        ids: the ids new to the model; see `vocab.new_ids`.

    Raises:
        ValueError: the model can't be trained as configured; see `check_embeddings`.
    """
    problems = check_embeddings(model, config, ids)
    if problems:
        raise UserError("\n".join(problems))
    num_all = sum(parameter.numel() for parameter in model.parameters())
    tied = is_tied(model)
    layers = trained_layers(model, config)
    model.requires_grad_(False)
    if config.new_rows_only:
        _separate_new_rows(model, ids, with_head=len(layers) > 1)
    else:
        for layer in layers.values():
            cast("nn.Parameter", layer.weight).requires_grad_(True)
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info(
        "trainable: %s%s%s, %d of %d parameters (%.2f %%)",
        f"the rows {ids.start} to {ids.stop - 1} of " if config.new_rows_only else "",
        " and ".join(layers),
        " (one table, since they are tied)" if tied else "",
        num_trained,
        num_all,
        100 * num_trained / num_all,
    )


def _separate_new_rows(model: PreTrainedModel, ids: range, *, with_head: bool) -> None:
    """Replace the embedding layers by ones with separate new rows; tied tables share theirs."""
    weight = cast("nn.Parameter", model.get_input_embeddings().weight)
    rows = _copy_rows(weight, ids)
    head = cast("nn.Linear", model.get_output_embeddings())
    model.set_input_embeddings(NewRowsEmbedding(weight, rows, ids))
    if with_head:
        if not is_tied(model):
            weight = cast("nn.Parameter", head.weight)
            rows = _copy_rows(weight, ids)
        model.set_output_embeddings(NewRowsProjection(weight, rows, ids))


def _copy_rows(weight_VD: Tensor, ids: range) -> nn.Parameter:
    return nn.Parameter(weight_VD[ids.start : ids.stop].detach().clone())
