"""A servable model directory: checked and loaded with the chat template it was tuned with."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import GENERATION_CONFIG_NAME

from raytune_llama.chat.config import ChatConfig, TemplateName
from raytune_llama.chat.encoding import ChatEncoder, build_chat_encoder
from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import ConfigError
from raytune_llama.model.lineage import (
    TEMPLATE_KEY,
    check_tokenizer_hash,
    find_chat_template,
    find_leading_ids,
)
from raytune_llama.model.llama import DTYPES, check_model_directory
from raytune_llama.model.vocab import num_embedding_rows
from raytune_llama.serve.config import ServedModelConfig
from raytune_llama.serve.errors import ContextLengthError
from raytune_llama.storage.directories import fetched
from raytune_llama.storage.files import OUTPUT_MANIFEST, read_json
from raytune_llama.storage.hashes import find_hash, hash_file, show_hash
from raytune_llama.tokenizer.loader import encode_text, leading_ids, load_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedModel:
    """A model in memory, with its tokenizer and chat template."""

    name: str
    """Name of the model in requests."""

    model: PreTrainedModel
    """The causal LM, in evaluation mode."""

    tokenizer: PreTrainedTokenizerFast
    """Tokenizer of the model."""

    chat: ChatEncoder | None
    """Encodes conversations as prompts; None if the model has no chat template."""

    max_context: int
    """Maximum tokens per request, prompt and answer."""

    leading_ids: tuple[int, ...]
    """Ids that the tokenizer puts before a text: BOS, or none."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer, from the template, the generation config and the tokenizer."""
        own = self.model.generation_config.eos_token_id if self.model.generation_config else None
        ends: set[int] = {own} if isinstance(own, int) else set(own or ())
        eos = self.tokenizer.eos_token_id
        if isinstance(eos, int):
            ends.add(eos)
        return frozenset(ends) | (self.chat.template.stop_ids if self.chat else frozenset())

    @cached_property
    def longest_token(self) -> int:
        """Number of characters of the longest token."""
        return max(map(len, self.tokenizer.get_vocab()), default=1)

    def check_size(self, texts: Sequence[str], param: str) -> None:
        """Reject texts that can't fit before they are tokenized, which takes a second per megabyte.

        Args:
            texts: texts of one prompt.
            param: request field with the texts.

        Raises:
            ContextLengthError: more characters than a full context of the longest token.
        """
        num_characters = sum(map(len, texts))
        if num_characters > self.max_context * self.longest_token:
            raise ContextLengthError(self.max_context, f"{num_characters} characters", param)

    def encode_texts(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of texts as starts of documents: `leading_ids`, then plain text."""
        return [[*self.leading_ids, *ids] for ids in encode_text(self.tokenizer, texts)]


def load_served_model(config: ServedModelConfig, device: torch.device) -> ServedModel:
    """Load a model for serving.

    Args:
        config: config of the model.
        device: device of the weights; `meta`: not read, for an engine that loads them itself.

    Raises:
        ConfigError: the directory is incomplete or differs from its manifest, or the template
            is not the one it was tuned with; lists every problem.
    """
    try:
        path = fetched(config.path, "path")
    except UserError as error:
        raise ConfigError([str(error)]) from error
    problems = [text.replace("model.path", "path", 1) for text in check_model_directory(path)]
    if not problems and config.verify:
        problems += check_files(path)
    if problems:
        raise ConfigError(problems)
    try:
        tokenizer = load_tokenizer(path)
    except (ValueError, OSError) as error:
        raise ConfigError([f"path: {error}"]) from error
    found = find_chat_template([path])
    chat = load_chat_encoder(
        tokenizer,
        path,
        found[1] if found else None,
        wanted=config.template,
        allow_other=config.allow_other_template,
    )
    dtype: torch.dtype | str = torch.float32 if device.type == "cpu" else "auto"
    if config.precision != "auto":
        dtype = DTYPES[config.precision]
    if device.type == "meta":
        model = _outline(path, dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, local_files_only=True, use_safetensors=True
        )
    _refuse_windows(model, path)
    if num_embedding_rows(model) < len(tokenizer):
        raise ConfigError([f"path: {path} has fewer embedding rows than its tokenizer has ids"])
    limit = context_tokens(config, model)
    logger.info("%s: %s, context length %d tokens", path, model.dtype, limit)
    nn.Module.to(model.eval(), device)
    begin = find_text_ids([path], tokenizer)
    return ServedModel(config.served_name, model, tokenizer, chat, limit, begin)


def find_text_ids(
    directories: Sequence[Path], tokenizer: PreTrainedTokenizerFast
) -> tuple[int, ...]:
    """Return the ids that the tokenizer puts before a text, as transformers and llama.cpp do.

    Logs a warning if the texts that the model was trained on began otherwise.

    Args:
        directories: the model and its adapters, in the order of their training.
        tokenizer: tokenizer of the last of them.
    """
    own, trained = leading_ids(tokenizer), find_leading_ids(directories, tokenizer)
    if own != trained:
        logger.warning(
            "%s was trained on texts that begin with the token ids %s, but its tokenizer puts %s "
            "before a text, which completions and embeddings do too; send token ids to choose "
            "otherwise, or train with data.bos=auto",
            directories[-1],
            list(trained),
            list(own),
        )
    return own


def _outline(path: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    """Return the model without weights, on the meta device."""
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    stored = getattr(config, "dtype", None) or torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=stored if dtype == "auto" else dtype)
    if (path / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return model


def context_tokens(config: ServedModelConfig, model: PreTrainedModel) -> int:
    """Return the maximum number of tokens per request.

    Raises:
        ConfigError: `max_context` exceeds the model's number of positions.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    limit = config.max_context or positions or getattr(model.config, "seq_length", None) or 2048
    if positions is not None and limit > positions:
        raise ConfigError([f"max_context: got {limit}, but the model has {positions} positions"])
    return limit


def check_files(path: Path) -> list[str]:
    """Return the problems of files that are missing or differ from the directory's manifest."""
    file = path / OUTPUT_MANIFEST
    if not file.is_file():
        logger.warning("%s has no %s: its files can't be verified", path, OUTPUT_MANIFEST)
        return []
    problems: list[str] = []
    for name, wanted in read_json(file).get("files", {}).items():
        found = hash_file(path / name, like=wanted) if (path / name).is_file() else None
        if found is None:
            problems.append(f"path: {path} lacks {name}, which its manifest lists")
        elif found != wanted:
            problems.append(
                f"path: {path / name} differs from its manifest ({show_hash(found)}, wanted "
                f"{show_hash(wanted)}); create the directory again"
            )
    # The files of the tokenizer may be the damaged ones.
    recorded = None if problems else check_tokenizer_hash(path)
    return problems + ([f"path: {recorded}"] if recorded else [])


def load_chat_encoder(
    tokenizer: PreTrainedTokenizerFast,
    where: Path,
    recorded: Mapping[str, Any] | None,
    *,
    wanted: TemplateName | None = None,
    allow_other: bool = False,
) -> ChatEncoder | None:
    """Return the encoder of conversations, or None if there is no chat template.

    Args:
        tokenizer: tokenizer of the model or adapter.
        where: directory of the model or adapter.
        recorded: template that `find_chat_template` found in that directory.
        wanted: template to use instead of the recorded one.
        allow_other: whether the template may differ from the recorded one.

    Raises:
        ConfigError: the template can't be used, or is not the recorded one.
    """
    name = wanted or (recorded["template"] if recorded else None)
    if name is None and not tokenizer.chat_template:
        logger.warning(
            "%s has no chat template: chat completions are not available, only completions", where
        )
        return None
    try:
        chat = build_chat_encoder(tokenizer, ChatConfig(template=name or "tokenizer"))
    except ValueError as error:
        raise ConfigError([f"template: {error}"]) from error
    wanted_hash = find_hash(recorded or {}, TEMPLATE_KEY)
    found = chat.template.hash(like=wanted_hash)
    if recorded and wanted_hash and found != wanted_hash and not allow_other:
        raise ConfigError(
            [
                f"template: {chat.template.name} ({show_hash(found)}) is not what {where} was "
                f"tuned with: {recorded['template']} ({show_hash(wanted_hash)}); omit "
                "the field, or set allow_other_template=true"
            ]
        )
    return chat


def _refuse_windows(model: PreTrainedModel, path: Path) -> None:
    """Reject layers with sliding-window attention, which the slotted KV cache does not support."""
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        others = ", ".join(sorted(kinds - {"full_attention"}))
        raise ConfigError(
            [f"path: {path} has layers of {others}; only full_attention is supported"]
        )
