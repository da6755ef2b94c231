"""Promises: a tokenizer belongs to its model, new rows mean something, old ones keep their bits."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AddedToken, LlamaForCausalLM, PreTrainedTokenizerFast

from raytune_llama.model.vocab import (
    VocabularyFit,
    check_vocabulary,
    grow_embeddings,
    num_embedding_rows,
    split_new_token,
)
from raytune_llama.tokenizer.loader import encode_text, load_tokenizer
from tests.conftest import train_tokenizer
from tests.model.conftest import MakeModel

NEW_TOKENS = (
    AddedToken("lazy dog", normalized=False),
    AddedToken("龙", normalized=False),
    AddedToken("<|new|>", normalized=False, special=True),
)


def add_tokens(path: Path, grown: Path, *tokens: AddedToken) -> Path:
    """Write the tokenizer of a directory to another one, with more tokens."""
    tokenizer = copy.deepcopy(load_tokenizer(path))
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(grown)
    return grown


@pytest.fixture
def grown_dir(tmp_path: Path, tokenizer_dir: Path) -> Path:
    """The byte-level tokenizer of 400 ids with three more: two texts and a control token."""
    return add_tokens(tokenizer_dir, tmp_path / "grown", *NEW_TOKENS)


def tables_of(model: LlamaForCausalLM) -> dict[str, Tensor]:
    return {
        "input": model.model.embed_tokens.weight.detach().clone(),
        "output": model.lm_head.weight.detach().clone(),
    }


def test_check_vocabulary_of_the_models_own_tokenizer_counts_surplus_rows(
    tokenizer_dir: Path,
) -> None:
    fit = check_vocabulary(410, tokenizer_dir, tokenizer_dir)
    assert fit == VocabularyFit(num_rows=410, num_base_ids=400, num_ids=400)
    assert (fit.num_new_ids, fit.num_unused_rows) == (0, 10)


@pytest.mark.parametrize(("rows", "surplus"), [(410, 7), (400, 0)])
def test_check_vocabulary_of_a_grown_tokenizer_counts_new_ids(
    tokenizer_dir: Path, grown_dir: Path, rows: int, surplus: int
) -> None:
    fit = check_vocabulary(rows, tokenizer_dir, grown_dir)
    assert (fit.num_new_ids, fit.num_unused_rows) == (3, surplus)


def test_check_vocabulary_of_a_foreign_tokenizer_is_refused(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    other = train_tokenizer(tmp_path / "other", special=False)
    with pytest.raises(ValueError, match=r"model\.tokenizer.*'<s>', 0 there and None here"):
        check_vocabulary(410, tokenizer_dir, other)


def test_check_vocabulary_of_a_smaller_tokenizer_is_refused(
    tokenizer_dir: Path, grown_dir: Path
) -> None:
    with pytest.raises(ValueError, match=r"model\.tokenizer.*3 tokens"):
        check_vocabulary(410, grown_dir, tokenizer_dir)


def test_check_vocabulary_with_own_ids_beyond_the_rows_is_refused(tokenizer_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.path.*up to 399.*399 rows"):
        check_vocabulary(399, tokenizer_dir, tokenizer_dir)


def test_check_vocabulary_of_a_model_without_tokenizer_compares_sizes(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    fit = check_vocabulary(410, tmp_path, tokenizer_dir)
    assert (fit.num_new_ids, fit.num_unused_rows) == (0, 10)
    with pytest.raises(ValueError, match=r"model\.tokenizer.*up to 399.*399 rows"):
        check_vocabulary(399, tmp_path, tokenizer_dir)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("rows", "rows_after"), [(410, 410), (401, 403), (400, 403)])
def test_grow_embeddings_starts_new_rows_as_means_and_keeps_the_old_ones(
    make_llama: MakeModel,
    tokenizer_dir: Path,
    grown_dir: Path,
    *,
    tied: bool,
    rows: int,
    rows_after: int,
) -> None:
    old, new = load_tokenizer(tokenizer_dir), load_tokenizer(grown_dir)
    model = make_llama(tie_word_embeddings=tied, vocab_size=rows)
    before, ids_1T = tables_of(model), torch.arange(20, 60)[None]
    with torch.no_grad():
        logits = model(ids_1T).logits[..., :400]
        assert grow_embeddings(model, old, new) == 3
        assert torch.equal(model(ids_1T).logits[..., :400], logits)
    assert num_embedding_rows(model) == model.config.vocab_size == rows_after
    after = tables_of(model)
    pieces = [encode_text(old, [text])[0] for text in ("lazy dog", "龙")]
    assert [len(ids) > 1 for ids in pieces] == [True, True]
    for name, table in after.items():
        kept = before[name][:400]
        assert torch.equal(table[:400], kept)
        wanted = torch.stack([*(kept[ids].mean(dim=0) for ids in pieces), kept.mean(dim=0)])
        torch.testing.assert_close(table[400:403], wanted)
        assert torch.equal(table[403:], before[name][403:])
    one_table = model.model.embed_tokens.weight is model.lm_head.weight
    assert one_table == tied == model.config.tie_word_embeddings
    assert torch.equal(after["input"], after["output"]) == tied


def test_grow_embeddings_to_no_more_ids_changes_nothing(
    make_llama: MakeModel, tokenizer_dir: Path
) -> None:
    model, tokenizer = make_llama(), load_tokenizer(tokenizer_dir)
    before = tables_of(model)
    assert grow_embeddings(model, tokenizer, tokenizer) == 0
    assert all(torch.equal(table, before[name]) for name, table in tables_of(model).items())


def test_grow_embeddings_of_a_grown_model_can_be_saved_and_loaded(
    make_llama: MakeModel, tokenizer_dir: Path, grown_dir: Path, tmp_path: Path
) -> None:
    model = make_llama(vocab_size=400)
    grow_embeddings(model, load_tokenizer(tokenizer_dir), load_tokenizer(grown_dir))
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    ids_1T = torch.tensor([[5, 400, 401, 402]])
    with torch.no_grad():
        assert torch.equal(loaded(ids_1T).logits, model(ids_1T).logits)


def test_grow_embeddings_takes_any_special_token_for_a_control_token(
    make_llama: MakeModel, tokenizer_dir: Path, grown_dir: Path
) -> None:
    """Without its settings file a tokenizer lists no special tokens, but its tokens say it."""
    (grown_dir / "tokenizer_config.json").unlink()
    old, new = load_tokenizer(tokenizer_dir), load_tokenizer(grown_dir)
    assert new.all_special_ids == []
    assert [bool(split_new_token(old, new, id_)) for id_ in (400, 401, 402)] == [True, True, False]


def learn_pieces(path: Path, grown: Path, *pieces: str) -> PreTrainedTokenizerFast:
    """Write a tokenizer with further pieces in its own vocabulary, as a merge of two makes it."""
    load_tokenizer(path).save_pretrained(grown)
    file = grown / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    for piece in pieces:
        vocabulary[piece] = len(vocabulary)
    file.write_text(json.dumps(content))
    return load_tokenizer(grown)


def test_split_new_token_of_sentencepiece_adds_no_space_and_loses_none(
    llama_tokenizer_dir: Path, tmp_path: Path
) -> None:
    """Text encoded alone begins with a space: each Chinese piece would take up a part of it."""
    old = load_tokenizer(llama_tokenizer_dir)
    new = learn_pieces(llama_tokenizer_dir, tmp_path / "grown", "日龙狐", "▁foxes")
    spelled = [old.convert_ids_to_tokens(split_new_token(old, new, id_)) for id_ in (360, 361)]
    joined = ["".join(tokens) for tokens in spelled]
    assert joined[1] == "▁foxes"
    assert joined[0].startswith("日")
    # The two characters that the old vocabulary lacks are spelled in bytes.
    assert bytes(int(token[3:5], 16) for token in spelled[0][1:]).decode() == "龙狐"


def test_split_new_token_of_added_text_adds_no_space(
    llama_tokenizer_dir: Path, tmp_path: Path
) -> None:
    old = copy.deepcopy(load_tokenizer(llama_tokenizer_dir))
    grown = add_tokens(llama_tokenizer_dir, tmp_path / "grown", *NEW_TOKENS)
    new = copy.deepcopy(load_tokenizer(grown))
    spelled = [old.convert_ids_to_tokens(split_new_token(old, new, 360 + i)) for i in range(3)]
    assert "".join(spelled[0]) == "lazy▁dog"
    assert spelled[1] == [f"<0x{byte:02X}>" for byte in "龙".encode()]
    assert spelled[2] == []


def test_split_new_token_that_is_a_part_of_a_character_keeps_its_bytes(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    old = load_tokenizer(tokenizer_dir)
    # The first two of the three bytes of a character that the tokenizer has never seen.
    part = "".join(old.convert_ids_to_tokens(encode_text(old, ["龙"])[0]))[:2]
    new = learn_pieces(tokenizer_dir, tmp_path / "grown", part, "Ġfoxes")
    spelled = [
        "".join(old.convert_ids_to_tokens(split_new_token(old, new, id_))) for id_ in (400, 401)
    ]
    assert spelled == [part, "Ġfoxes"]


def test_check_vocabulary_of_a_copied_tokenizer_equals_the_original(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(tokenizer_dir, tmp_path / "copy")
    fit = check_vocabulary(400, tokenizer_dir, tmp_path / "copy")
    assert (fit.num_new_ids, fit.num_unused_rows) == (0, 0)


def test_check_vocabulary_of_a_tokenizer_saved_without_its_model_warns(
    llama_tokenizer_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same tokens, but not the same ids of a text."""
    load_tokenizer(llama_tokenizer_dir).save_pretrained(tmp_path / "saved")
    check_vocabulary(360, llama_tokenizer_dir, llama_tokenizer_dir)
    assert not caplog.records
    check_vocabulary(360, llama_tokenizer_dir, tmp_path / "saved")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
