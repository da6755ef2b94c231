"""Promises: old rows keep their bits, new ones mean something, and plain transformers loads it."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer

from raytune_llama.model.vocab import split_new_token
from raytune_llama.tokenizer.loader import load_tokenizer
from raytune_llama.vocabulary.config import GrowthConfig
from raytune_llama.vocabulary.model_growth import grow_model
from tests.model.conftest import MakeModel

IDS = torch.arange(3, 60)[None]
NEW = ("lazy dog", "龙")
MakeBase = Callable[..., Path]


@pytest.fixture
def make_base(tmp_path: Path, tokenizer_dir: Path, make_llama: MakeModel) -> MakeBase:
    def make(**fields: Any) -> Path:  # noqa: ANN401
        path = tmp_path / "base"
        make_llama(**fields).save_pretrained(path)
        shutil.copytree(tokenizer_dir, path, dirs_exist_ok=True)
        return path

    return make


@pytest.fixture
def grown_tokenizer(tmp_path: Path, tokenizer_dir: Path) -> Path:
    """The tokenizer of 400 ids with two texts and a padding token."""
    tokenizer = copy.deepcopy(load_tokenizer(tokenizer_dir))
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in NEW])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "grown-tokenizer")
    return tmp_path / "grown-tokenizer"


def grow(base: Path, tokenizer: Path, **fields: Any) -> tuple[Any, Any, Path]:  # noqa: ANN401
    folder = base.parent / "grown"
    folder.mkdir()
    grow_model(base, tokenizer, folder, GrowthConfig(**fields))
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (base, folder))
    return before.eval(), after.eval(), folder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("initial_rows", ["mean_subtokens", "mean", "normal"])
@pytest.mark.parametrize("rows", [400, 401, 410])
def test_old_tokens_keep_their_rows_and_logits(
    make_base: MakeBase, grown_tokenizer: Path, *, tied: bool, initial_rows: str, rows: int
) -> None:
    base = make_base(tie_word_embeddings=tied, vocab_size=rows)
    before, after, _ = grow(base, grown_tokenizer, initial_rows=initial_rows)
    assert after.config.vocab_size == max(rows, 403)
    assert after.config.tie_word_embeddings == tied
    for old, new in (
        (before.model.embed_tokens, after.model.embed_tokens),
        (before.lm_head, after.lm_head),
    ):
        assert len(new.weight) == max(rows, 403)
        assert torch.equal(new.weight[:400], old.weight[:400])
        assert torch.equal(new.weight[403:], old.weight[403:])
        assert new.weight.isfinite().all()
    with torch.no_grad():
        old_logits, new_logits = before(IDS).logits, after(IDS).logits
    torch.testing.assert_close(new_logits[..., :400], old_logits[..., :400], rtol=0, atol=1e-6)


def test_new_rows_are_the_mean_of_the_tokens_that_their_text_splits_into(
    make_base: MakeBase, grown_tokenizer: Path
) -> None:
    base = make_base()
    before, after, _ = grow(base, grown_tokenizer)
    old, new = load_tokenizer(base), load_tokenizer(grown_tokenizer)
    for table, grown in (
        (before.model.embed_tokens.weight, after.model.embed_tokens.weight),
        (before.lm_head.weight, after.lm_head.weight),
    ):
        for id_ in (400, 401):
            ids = split_new_token(old, new, id_)
            assert len(ids) > 1
            torch.testing.assert_close(grown[id_], table[ids].mean(dim=0))
        torch.testing.assert_close(grown[402], table[:400].mean(dim=0))  # [PAD] is no text


def test_drawn_rows_have_the_deviation_of_the_config_and_come_from_the_seed(
    make_base: MakeBase, grown_tokenizer: Path
) -> None:
    base = make_base(hidden_size=512, num_attention_heads=4, initializer_range=0.05)
    _, after, folder = grow(base, grown_tokenizer, initial_rows="normal", seed=3)
    rows = after.model.embed_tokens.weight[400:403]
    assert rows.std().item() == pytest.approx(0.05, rel=0.1)
    shutil.rmtree(folder)
    _, again, folder = grow(base, grown_tokenizer, initial_rows="normal", seed=3)
    assert torch.equal(again.model.embed_tokens.weight[400:403], rows)
    shutil.rmtree(folder)
    _, other, _ = grow(base, grown_tokenizer, initial_rows="normal", seed=4)
    assert not torch.equal(other.model.embed_tokens.weight[400:403], rows)


def test_rows_are_rounded_up_and_the_surplus_is_the_mean(
    make_base: MakeBase, grown_tokenizer: Path
) -> None:
    before, after, _ = grow(make_base(), grown_tokenizer, rows_multiple_of=64)
    assert after.config.vocab_size == 448
    table = before.lm_head.weight
    assert torch.equal(after.lm_head.weight[403:410], table[403:410])
    torch.testing.assert_close(after.lm_head.weight[410:], table[:400].mean(dim=0).expand(38, -1))


def test_settings_and_tokenizer_agree_on_padding(
    make_base: MakeBase, grown_tokenizer: Path
) -> None:
    _, after, folder = grow(make_base(), grown_tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("[PAD]", 402)
    assert after.config.pad_token_id == after.generation_config.pad_token_id == 402
    assert (
        tokenizer("a lazy dog 龙").input_ids
        == load_tokenizer(grown_tokenizer)("a lazy dog 龙").input_ids
    )


def test_weights_beside_the_tables_are_copied_bit_for_bit(
    make_base: MakeBase, grown_tokenizer: Path
) -> None:
    before, after, _ = grow(make_base(), grown_tokenizer, max_shard_mib=1)
    old, new = before.state_dict(), after.state_dict()
    assert old.keys() == new.keys()
    for name in old.keys() - {"model.embed_tokens.weight", "lm_head.weight"}:
        assert torch.equal(old[name], new[name]), name


def test_a_model_smaller_than_its_own_tokenizer_is_refused(
    make_base: MakeBase, grown_tokenizer: Path, tmp_path: Path
) -> None:
    base = make_base(vocab_size=390)
    with pytest.raises(ValueError, match="400 ids, but its embedding 390 rows"):
        grow_model(base, grown_tokenizer, tmp_path, GrowthConfig())


def test_a_model_without_llamas_embedding_is_refused(
    make_base: MakeBase, grown_tokenizer: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    base = make_base()
    tensors = load_file(base / "model.safetensors")
    tensors["transformer.wte.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, base / "model.safetensors")
    assert json.loads((base / "config.json").read_text())["vocab_size"] == 410
    with pytest.raises(ValueError, match=r"has no model\.embed_tokens\.weight"):
        grow_model(base, grown_tokenizer, tmp_path, GrowthConfig())
