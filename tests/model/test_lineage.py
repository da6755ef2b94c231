"""Promise: a model, an adapter and a tokenizer that don't belong together are told by name."""

import copy
import json
import shutil
from pathlib import Path

import pytest
from transformers import AddedToken

from raytune_llama.model.lineage import (
    check_adapter_tokenizer,
    check_tokenizer_chain,
    check_tokenizer_hash,
)
from raytune_llama.model.vocab import check_vocabulary
from raytune_llama.tokenizer.loader import hash_tokenizer, load_tokenizer
from tests.conftest import train_tokenizer

ROWS = {"base": 400, "llama": 402, "alpaca": 403}
"""Ids of a base's tokenizer, of one that is grown from it, and of that with [PAD]; in
Chinese-LLaMA-Alpaca 32000, 49953 and 49954."""


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    train_tokenizer(folder / "base")
    tokenizer = copy.deepcopy(load_tokenizer(folder / "base"))
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("lazy dog", "龙")])
    tokenizer.save_pretrained(folder / "llama")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder / "alpaca")
    # Of the base's size, with other tokens.
    shutil.copytree(folder / "base", folder / "foreign")
    content = json.loads((folder / "base" / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "foreign" / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("model", "tokenizer"),
    [("base", "base"), ("base", "llama"), ("llama", "llama"), ("alpaca", "alpaca")],
)
def test_the_four_pairs_of_the_seeds_are_legal(
    tokenizers: Path, model: str, tokenizer: str
) -> None:
    fit = check_vocabulary(ROWS[model], tokenizers / model, tokenizers / tokenizer)
    assert fit.num_new_ids == ROWS[tokenizer] - ROWS[model]


@pytest.mark.parametrize(
    ("model", "tokenizer"),
    [("llama", "base"), ("alpaca", "base"), ("alpaca", "llama"), ("base", "foreign")],
)
def test_a_tokenizer_that_lacks_tokens_of_the_model_or_has_others_is_refused(
    tokenizers: Path, model: str, tokenizer: str
) -> None:
    with pytest.raises(ValueError, match=r"^model\.tokenizer: .* is neither the tokenizer of"):
        check_vocabulary(ROWS[model], tokenizers / model, tokenizers / tokenizer)


def make_adapter(folder: Path, tokenizer: Path | None, manifest: dict[str, str]) -> Path:
    folder.mkdir()
    if tokenizer is not None:
        shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_an_adapter_takes_the_tokenizer_that_it_was_trained_with_alone(
    tokenizers: Path, tmp_path: Path
) -> None:
    own = tokenizers / "alpaca"
    recorded = make_adapter(tmp_path / "a", None, {"tokenizer_hash": hash_tokenizer(own)})
    held = make_adapter(tmp_path / "b", own, {})
    for adapter in (recorded, held):
        assert check_adapter_tokenizer(adapter, own) == []
        for other in ("base", "llama", "foreign"):
            (problem,) = check_adapter_tokenizer(adapter, tokenizers / other)
            assert problem.startswith(f"model.tokenizer: {tokenizers / other} ")
            assert str(adapter) in problem
    unknown = make_adapter(tmp_path / "c", None, {})
    assert check_adapter_tokenizer(unknown, tokenizers / "base") == []


def test_a_chain_goes_from_smaller_to_grown_tokenizers(tokenizers: Path) -> None:
    base, llama, alpaca, foreign = (
        tokenizers / name for name in ("base", "llama", "alpaca", "foreign")
    )
    assert check_tokenizer_chain([base, llama, alpaca]) == []
    assert check_tokenizer_chain([base, tokenizers / "none", base]) == []
    (problem,) = check_tokenizer_chain([base, alpaca, llama])
    assert f"{llama} (402 tokens) is neither the tokenizer of {alpaca}" in problem
    assert "in the order of their training" in problem
    (problem,) = check_tokenizer_chain([foreign, llama])
    assert "2 tokens have another id" in problem


def test_a_tokenizer_that_was_exchanged_is_told_by_its_hash(
    tokenizers: Path, tmp_path: Path
) -> None:
    own = tokenizers / "base"
    manifest = {"tokenizer_hash": hash_tokenizer(own)}
    assert check_tokenizer_hash(make_adapter(tmp_path / "a", own, manifest)) is None
    exchanged = make_adapter(tmp_path / "b", tokenizers / "foreign", manifest)
    assert "does not match its manifest" in str(check_tokenizer_hash(exchanged))
    (problem,) = check_tokenizer_chain([exchanged])
    assert problem.startswith(f"adapters: the tokenizer in {exchanged}")
