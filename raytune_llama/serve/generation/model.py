"""A model directory that can be served: checked, loaded, with the template it was tuned with."""

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

from raytune_llama.chat.encoding import ChatConfig, ChatEncoder, build_chat_encoder
from raytune_llama.chat.templates.names import TemplateName
from raytune_llama.config.settings import ConfigError
from raytune_llama.model.lineage import check_tokenizer_hash, find_chat_template
from raytune_llama.model.llama import DTYPES, check_model_directory
from raytune_llama.model.vocab import num_embedding_rows
from raytune_llama.serve.config import ServedModelConfig
from raytune_llama.serve.errors import InvalidRequestError
from raytune_llama.storage.files import OUTPUT_MANIFEST, read_json, sha256_file
from raytune_llama.tokenizer.loader import encode_text, load_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedModel:
    """A model in memory."""

    name: str
    """What requests call it."""

    model: PreTrainedModel
    """In evaluation mode."""

    tokenizer: PreTrainedTokenizerFast
    """Its own."""

    chat: ChatEncoder | None
    """Makes prompts of conversations; None where the model has no template."""

    max_context: int
    """Tokens of a request, prompt and answer."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the template's and the model's own."""
        own = self.model.generation_config.eos_token_id if self.model.generation_config else None
        ends: set[int] = {own} if isinstance(own, int) else set(own or ())
        eos = self.tokenizer.eos_token_id
        if isinstance(eos, int):
            ends.add(eos)
        return frozenset(ends) | (self.chat.template.stop_ids if self.chat else frozenset())

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token."""
        return max(map(len, self.tokenizer.get_vocab()), default=1)

    def check_size(self, texts: Sequence[str], param: str) -> None:
        """Refuse texts that can't fit before they are encoded, which takes a second for a megabyte.

        Args:
            texts: of one prompt.
            param: the field that they stand in.

        Raises:
            RequestError: they have more characters than a whole context of the longest token.
        """
        num_characters = sum(map(len, texts))
        if num_characters > self.max_context * self.longest_token:
            raise InvalidRequestError(
                f"{param}: got {num_characters} characters, and {self.name} takes "
                f"{self.max_context} tokens",
                param,
            )

    def encode_texts(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of documents' beginnings: BOS where there is one, then plain text."""
        bos = self.tokenizer.bos_token_id
        begin = [bos] if isinstance(bos, int) else []
        return [begin + ids for ids in encode_text(self.tokenizer, texts)]


def load_served_model(config: ServedModelConfig, device: torch.device) -> ServedModel:
    """Load a model to serve it.

    Args:
        config: of the model.
        device: where its weights go; `meta`: they are not read, for an engine that has them itself.

    Raises:
        ConfigError: the directory is no whole model, not what its manifest says, or the template
            is another than it was tuned with; all that is wrong.
    """
    path = Path(config.path)
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
        raise ConfigError([f"path: {path} has fewer rows than its tokenizer has ids"])
    limit = context_tokens(config, model)
    logger.info("%s: %s, %d tokens of context", path, model.dtype, limit)
    nn.Module.to(model.eval(), device)
    return ServedModel(config.served_name, model, tokenizer, chat, limit)


def _outline(path: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    """Return a model without weights."""
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    stored = getattr(config, "dtype", None) or torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=stored if dtype == "auto" else dtype)
    if (path / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return model


def context_tokens(config: ServedModelConfig, model: PreTrainedModel) -> int:
    """Return how many tokens a request may have.

    Raises:
        ConfigError: the config wants more than the model has positions for.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    limit = config.max_context or positions or getattr(model.config, "seq_length", None) or 2048
    if positions is not None and limit > positions:
        raise ConfigError([f"max_context: got {limit}, but the model has {positions} positions"])
    return limit


def check_files(path: Path) -> list[str]:
    """Return which files of a model directory are not those that its manifest names."""
    file = path / OUTPUT_MANIFEST
    if not file.is_file():
        logger.warning("%s has no %s: its files can't be checked", path, OUTPUT_MANIFEST)
        return []
    problems: list[str] = []
    for name, wanted in read_json(file).get("files", {}).items():
        found = sha256_file(path / name) if (path / name).is_file() else None
        if found is None:
            problems.append(f"path: {path} lacks {name}, which its manifest names")
        elif found != wanted:
            problems.append(
                f"path: {path / name} is not what it was made as (SHA256 {found[:16]}, wanted "
                f"{wanted[:16]}); make the directory anew"
            )
    recorded = check_tokenizer_hash(path)
    return problems + ([f"path: {recorded}"] if recorded else [])


def load_chat_encoder(
    tokenizer: PreTrainedTokenizerFast,
    where: Path,
    recorded: Mapping[str, Any] | None,
    *,
    wanted: TemplateName | None = None,
    allow_other: bool = False,
) -> ChatEncoder | None:
    """Return what makes prompts of conversations, or None where there is no template.

    Args:
        tokenizer: of the model or adapter.
        where: its directory.
        recorded: what `find_chat_template` has found there.
        wanted: what is used instead of the recorded one.
        allow_other: whether it may be another than the recorded one.

    Raises:
        ConfigError: the template can't be used, or is not the recorded one.
    """
    name = wanted or (recorded["template"] if recorded else None)
    if name is None and not tokenizer.chat_template:
        logger.warning("%s has no chat template: it completes texts, and answers no chats", where)
        return None
    try:
        chat = build_chat_encoder(tokenizer, ChatConfig(template=name or "tokenizer"))
    except ValueError as error:
        raise ConfigError([f"template: {error}"]) from error
    sha256 = chat.template.sha256
    if recorded and sha256 != recorded["template_sha256"] and not allow_other:
        raise ConfigError(
            [
                f"template: {chat.template.name} (SHA256 {sha256[:16]}) is not what {where} was "
                f"tuned with: {recorded['template']} ({recorded['template_sha256'][:16]}); leave "
                "the field out, or set allow_other_template=true"
            ]
        )
    return chat


def _refuse_windows(model: PreTrainedModel, path: Path) -> None:
    """Refuse layers that see a sliding window: rows of a batch begin in one column each."""
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        others = ", ".join(sorted(kinds - {"full_attention"}))
        raise ConfigError([f"path: {path} has layers of {others}; only full attention is served"])
