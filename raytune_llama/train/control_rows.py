"""Tokens of a run that its model does not know and will not learn: control tokens, new tokens.

A base model with a chat template put beside it has often never read the template's control tokens:
their rows of the embedding tables are zeros, or what they were initialized to. Under an adapter
that trains no table they stay so, and the model can neither read nor write them. And a new token
that the training text never gives keeps the row that it was initialized with.
"""

import contextlib
import re
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from raytune_llama.chat.conversations import Conversation, Turn
from raytune_llama.chat.templates.choice import build_template
from raytune_llama.chat.templates.segments import UnrenderableError
from raytune_llama.config.errors import UserError
from raytune_llama.data.build.text_corpus import document_ends
from raytune_llama.data.store.token_store import TokenSplit, TokenStore
from raytune_llama.model.directory import stored_tables
from raytune_llama.model.llama import has_weights
from raytune_llama.model.table_rows import (
    describe_rows,
    find_untrained_rows,
    read_rows,
    read_table_sample,
)
from raytune_llama.model.vocab import VocabularyFit, is_tied
from raytune_llama.storage.directories import fetched
from raytune_llama.tokenizer.loader import control_token_ids
from raytune_llama.train.config import AnyTrainConfig, PretrainConfig, SftConfig
from raytune_llama.train.untrained_rows import frozen_tables, modules_to_save

_RESERVED = re.compile(r"reserved|unused", re.IGNORECASE)
_MAX_UNUSED_ROWS = 256
_CHUNK_TOKENS = 1 << 22
_SHOWN = 8


def control_tokens(config: AnyTrainConfig, tokenizer: PreTrainedTokenizerFast) -> dict[int, str]:
    """Return the control tokens that the run's texts contain, spelled, by id.

    These are the ends of documents, or what the chat template writes around the messages of a user
    and an assistant.
    """
    if isinstance(config, SftConfig):
        ids = _template_ids(config, tokenizer)
    else:
        ids = document_ends(config.data, tokenizer)
    return {id_: str(tokenizer.convert_ids_to_tokens(id_)) for id_ in ids if id_ is not None}


def _template_ids(config: SftConfig, tokenizer: PreTrainedTokenizerFast) -> list[int | None]:
    template = build_template(config.data.chat.template, tokenizer)
    turns = (Turn("user", "A"), Turn("assistant", "B"), Turn("user", "C"), Turn("assistant", "D"))
    found: dict[int | None, None] = {}
    for count in (2, 4):
        for system in ("S", None):
            # What a template cannot render, no text of the run contains.
            with contextlib.suppress(UnrenderableError):
                segments = template.render(Conversation(turns[:count], system))
                found |= dict.fromkeys(segment.token_id for segment in segments)
    return list(found)


def find_untrained_control_rows(
    config: AnyTrainConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    fit: VocabularyFit,
) -> list[str]:
    """Return a warning for each frozen table in which rows of control tokens look untrained.

    Rows of ids that are new to the model are not judged: `check_untrained_rows` refuses them.

    Args:
        config: config of the run.
        model: the model of `model.path`, with or without its weights.
        tokenizer: tokenizer of the run.
        fit: the tokenizer against the model's rows.
    """
    path = fetched(config.model.path)
    frozen = frozen_tables(config, model)
    if not frozen or not has_weights(path):
        return []
    known = min(fit.num_base_ids, fit.num_rows)
    tokens = {id_: t for id_, t in control_tokens(config, tokenizer).items() if id_ < known}
    names = [f"{token} (id {id_})" for id_, token in tokens.items()]
    # Untrained rows are often copies of those of control tokens that no text has.
    every = sorted(control_token_ids(tokenizer))
    others = [id_ for id_ in every if id_ < known and id_ not in tokens][:_MAX_UNUSED_ROWS]
    found: dict[str, str] = {}
    for stored, parameter in _stored_tables(model, path).items() if tokens else ():
        table = parameter.removesuffix(".weight").rpartition(".")[2]
        if table in frozen:
            unused = [id_ for id_ in _unused_ids(tokenizer, fit) if id_ not in tokens]
            sample = read_table_sample(path, stored, num_ids=known, excluded=every, unused=unused)
            judged = [*tokens, *others]
            untrained = find_untrained_rows(sample, read_rows(path, stored, judged))
            kinds = {n: kind for n, kind in untrained.items() if n < len(tokens)}
            if kinds:
                found[table] = describe_rows(kinds, names)
    if not found:
        return []
    listed = "; ".join(f"{table}: {rows}" for table, rows in found.items())
    return [
        f"model.path: rows of control tokens that the texts contain look untrained in {path} "
        f"({listed}), and this run trains no such row: the model would neither understand nor "
        f"write these tokens; {_remedy(config, model, list(found))}"
    ]


def _stored_tables(model: PreTrainedModel, path: Path) -> dict[str, str]:
    """Return `stored_tables`; empty if the files name them otherwise: none can be judged."""
    try:
        return stored_tables(model, path)
    except UserError:
        return {}


def _unused_ids(tokenizer: PreTrainedTokenizerFast, fit: VocabularyFit) -> list[int]:
    """Return ids that no text of the model's training had: beyond the tokenizer's, or reserved."""
    reserved = [
        id_
        for id_, token in sorted(tokenizer.added_tokens_decoder.items())
        if _RESERVED.search(token.content) and id_ < fit.num_rows
    ]
    return [*reserved, *range(fit.num_ids, fit.num_rows)][:_MAX_UNUSED_ROWS]


def _remedy(config: AnyTrainConfig, model: PreTrainedModel, tables: list[str]) -> str:
    wanted = tables[:1] if is_tied(model) else tables
    if isinstance(config, PretrainConfig) and config.train == "embeddings":
        both = "" if is_tied(model) else " embeddings.lm_head=true"
        return f"set embeddings.new_rows_only=false{both}, or train=full"
    saved = list(dict.fromkeys([*modules_to_save(config), *wanted]))
    fields = f"lora.modules_to_save=[{','.join(saved)}]"
    other = ", or name a template in data.chat.template" if isinstance(config, SftConfig) else ""
    if config.adapter is not None:
        return f"train a new adapter with {fields} instead of adapter, or use train=full{other}"
    return f"set {fields}, or train=full{other}"


def find_unseen_tokens(
    config: AnyTrainConfig,
    tokenizer: PreTrainedTokenizerFast,
    fit: VocabularyFit,
    store: TokenStore,
) -> list[str]:
    """Return a warning if added tokens that are new to the model never occur in the training text.

    The training text of a local store is searched. A store in object storage would have to be
    downloaded for that: of its tokens, only control tokens of plain text are known to be unseen,
    since they occur nowhere but at the ends of documents.
    """
    added = {id_: t for id_, t in tokenizer.added_tokens_decoder.items() if id_ in fit.new_ids}
    if store.place.is_local:
        seen = _find_seen(store.split("train"), set(added))
    elif isinstance(config, PretrainConfig):
        ends = document_ends(config.data, tokenizer)
        seen = {id_ for id_, token in added.items() if not token.special or id_ in ends}
    else:
        seen = set(added)
    unseen = [token.content for id_, token in sorted(added.items()) if id_ not in seen]
    if not unseen:
        return []
    more = f" and {len(unseen) - _SHOWN} more" if len(unseen) > _SHOWN else ""
    return [
        f"model.tokenizer: {len(unseen)} of {len(added)} added tokens that are new to the model "
        f"never occur in the training text ({', '.join(unseen[:_SHOWN])}{more}): their rows keep "
        "their initial values but for weight decay, so the model learns nothing of them; add text "
        "that has them, or leave them out of the tokenizer"
    ]


def _find_seen(split: TokenSplit, wanted: set[int]) -> set[int]:
    """Return which of the ids occur in a split; stops once all have."""
    seen: set[int] = set()
    for start in range(0, split.num_tokens, _CHUNK_TOKENS):
        if seen == wanted:
            break
        ids = split.tokens(start, min(start + _CHUNK_TOKENS, split.num_tokens))
        # New ids are the largest: most of the text is dropped by one comparison.
        seen |= wanted & set(np.unique(ids[ids >= min(wanted)]).tolist())
    return seen
