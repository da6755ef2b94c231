"""Checks that the tokenizers of a base, its adapters and a run match, by hash and by vocabulary.

Comparing sizes is not enough: a foreign tokenizer of the same size gives every id another meaning.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from raytune_llama.model.vocab import describe_tokenizer_mismatch, has_tokenizer
from raytune_llama.storage.files import read_manifest
from raytune_llama.storage.hashes import find_hash, show_hash
from raytune_llama.tokenizer.loader import hash_tokenizer, leading_ids, load_tokenizer

CHAT_KEY = "chat"
"""Manifest key of the chat template that a model or adapter was tuned with, and its hash."""

TEMPLATE_KEY = "template_hash"
"""Key of the template's hash in what `CHAT_KEY` holds; read with `storage.hashes.find_hash`."""

TOKENIZER_KEY = "tokenizer_hash"
"""Manifest key of the tokenizer's hash; read with `storage.hashes.find_hash`."""

TEXT_KEY = "text"
"""Manifest key of how the texts began that a model or adapter was trained on: `bos_id`, or null."""


TRACKERS_KEY = "trackers"
"""Manifest key of the tracked run that a model or adapter comes from: addresses by tracker."""


def find_trackers(directories: Sequence[Path]) -> dict[str, Any]:
    """Return the addresses in trackers of the last run that has one, by tracker; empty: none has.

    Args:
        directories: A base and its adapters, in the order of their training.
    """
    manifests = [read_manifest(directory) for directory in reversed(directories)]
    found = next((one for each in manifests if (one := each.get(TRACKERS_KEY))), {})
    return found if isinstance(found, dict) else {}


def find_chat_template(directories: Sequence[Path]) -> tuple[Path, dict[str, Any]] | None:
    """Return the directory of the last recorded chat template, and the template; None if none is.

    Args:
        directories: A base and its adapters, in the order of their training.
    """
    for directory in reversed(directories):
        found = read_manifest(directory).get(CHAT_KEY)
        if found:
            return directory, dict(found)
    return None


def find_text_start(directories: Sequence[Path]) -> dict[str, Any] | None:
    """Return how the texts of the last training on text began, as `bos_id`; None if none is known.

    Args:
        directories: A base and its adapters, in the order of their training.
    """
    for directory in reversed(directories):
        manifest = read_manifest(directory)
        if manifest.get(TEXT_KEY):
            return dict(manifest[TEXT_KEY])
        # Written by a release that recorded the setting only.
        is_set = manifest.get("config", {}).get("data", {}).get("bos")
        if isinstance(is_set, bool) and has_tokenizer(directory):
            return {"bos_id": load_tokenizer(directory).bos_token_id if is_set else None}
    return None


def find_leading_ids(
    directories: Sequence[Path], tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """Return the ids that a text begins with: those of the training, else the tokenizer's own.

    Args:
        directories: A base and its adapters, in the order of their training.
        tokenizer: The tokenizer of the last of them.
    """
    found = find_text_start(directories)
    if found is None:
        return leading_ids(tokenizer)
    return () if found["bos_id"] is None else (found["bos_id"],)


def check_tokenizer_hash(directory: Path) -> str | None:
    """Return how a directory's tokenizer contradicts the hash in its manifest.

    None if the hash matches, or if there is no tokenizer or no recorded hash.
    """
    wanted = find_hash(read_manifest(directory), TOKENIZER_KEY)
    if not wanted or not has_tokenizer(directory):
        return None
    found = hash_tokenizer(directory, like=wanted)
    if found == wanted:
        return None
    return (
        f"the tokenizer in {directory} does not match its manifest ({show_hash(found)}, "
        f"wanted {show_hash(wanted)}); restore the original tokenizer"
    )


def check_adapter_tokenizer(adapter: Path, tokenizer: Path) -> list[str]:
    """Return why a tokenizer is not the one that an adapter was trained with; empty if it is.

    Args:
        adapter: An adapter directory; one with neither tokenizer nor manifest passes unchecked.
        tokenizer: Directory of the tokenizer to use.
    """
    wanted = find_hash(read_manifest(adapter), TOKENIZER_KEY)
    if wanted:
        found = hash_tokenizer(tokenizer, like=wanted)
        if found == wanted:
            return []
        return [
            f"model.tokenizer: {tokenizer} is not the tokenizer that the adapter {adapter} was "
            f"trained with ({show_hash(found)}, wanted {show_hash(wanted)}); set "
            f"model.tokenizer to {adapter}, which has its own"
        ]
    if not has_tokenizer(adapter):
        return []
    own, used = load_tokenizer(adapter).get_vocab(), load_tokenizer(tokenizer).get_vocab()
    if own == used:
        return []
    num_other = len(set(own.items()) - set(used.items()))
    return [
        f"model.tokenizer: {tokenizer} ({len(used)} tokens) lacks or renumbers {num_other} of the "
        f"{len(own)} tokens that the adapter {adapter} was trained with; set model.tokenizer to "
        f"{adapter}, which has its own"
    ]


def check_tokenizer_chain(directories: list[Path]) -> list[str]:
    """Return what is wrong with the tokenizers of a base and its adapters, in training order.

    Each must match its recorded hash, and be the previous tokenizer or grown from it.
    """
    having = [directory for directory in directories if has_tokenizer(directory)]
    problems = [f"adapters: {p}" for p in map(check_tokenizer_hash, having) if p is not None]
    for older, newer in pairwise(having):
        foreign = describe_tokenizer_mismatch(older, newer)
        if foreign is not None:
            problems.append(
                f"adapters: {foreign}; list base and adapters in the order of their training"
            )
    return problems
