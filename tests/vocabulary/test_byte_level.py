"""Promises: learned merges shorten new text, and leave old tokens and ASCII text alone."""

# ruff: noqa: RUF001  # Chinese text

import copy
import json
import random
from typing import Any

import pytest
from tokenizers import Tokenizer

from raytune_llama.vocabulary.byte_level import check_byte_level, grow_byte_level, is_ascii
from tests.tokenizer.references import SPLITTERS, byte_level, llama_json_reference

ENGLISH = ["The quick brown fox jumps over the lazy dog; it's 2026!", "def f(x):\n    return {}"]


def chinese(num: int, seed: int = 0) -> list[str]:
    chosen = random.Random(seed)
    words = [
        "".join(chosen.choices("天地玄黄宇宙洪荒日月盈昃辰宿列张", k=k)) for k in (2, 3, 4) * 20
    ]
    return ["，".join(chosen.choices(words, k=6)) + " price" for _ in range(num)]


@pytest.fixture(params=sorted(SPLITTERS))
def engine(request: pytest.FixtureRequest) -> dict[str, Any]:
    return json.loads(byte_level(request.param).to_str())


def test_grown_tokenizer_shortens_new_text_and_keeps_every_old_id(engine: dict[str, Any]) -> None:
    before_json = copy.deepcopy(engine)
    grown = grow_byte_level(engine, chinese(300), 100)
    assert engine == before_json
    before = Tokenizer.from_str(json.dumps(engine))
    after = Tokenizer.from_str(json.dumps(grown.engine))
    old, new = before.get_vocab(), after.get_vocab()
    assert {token: new[token] for token in old} == old
    assert sorted(set(new.values()) - set(old.values())) == list(
        range(max(old.values()) + 1, max(old.values()) + 1 + grown.num_new)
    )
    assert grown.num_new == 100
    for text in ENGLISH:
        assert after.encode(text).ids == before.encode(text).ids
    texts = chinese(40, seed=0)
    lengths = [sum(len(t.encode(text).ids) for text in texts) for t in (before, after)]
    assert lengths[1] < 0.6 * lengths[0]
    assert [after.decode(after.encode(text).ids) for text in texts] == texts


def test_new_tokens_are_met_in_the_text_that_they_were_learned_from(engine: dict[str, Any]) -> None:
    texts = chinese(300)
    grown = grow_byte_level(engine, texts, 60)
    after = Tokenizer.from_str(json.dumps(grown.engine))
    first = len(after.get_vocab()) - grown.num_new
    # The last ones at least: earlier ones may always become parts of others.
    seen = {id_ for text in texts for id_ in after.encode(text).ids}
    assert {first + grown.num_new - 1, first + grown.num_new - 2} <= seen


def test_no_token_of_ascii_alone_is_learned_and_merges_with_one_are_counted() -> None:
    engine = json.loads(byte_level("gpt2").to_str())
    # In one word, as the pattern takes letters of all scripts together.
    texts = [f"zyxwv{word}" for word in ("价格", "价", "格") for _ in range(100)]
    grown = grow_byte_level(engine, texts, 100)
    new = set(grown.engine["model"]["vocab"]) - set(engine["model"]["vocab"])
    assert new
    assert not any(map(is_ascii, new))
    assert grown.left_out["ascii"] > 0
    assert grown.left_out["ascii_part"] > 0


def test_fewer_tokens_than_asked_for_are_told(caplog: pytest.LogCaptureFixture) -> None:
    engine = json.loads(byte_level("words-3").to_str())
    grown = grow_byte_level(engine, ["天地玄黄"] * 3, 500)
    assert 0 < grown.num_new < 20
    assert f"the text yields only {grown.num_new} of the 500 requested tokens" in caplog.text


def test_ids_go_on_behind_control_tokens_that_stand_behind_the_vocabulary() -> None:
    tokenizer = byte_level("words-3")
    tokenizer.add_special_tokens(["<|a|>", "<|b|>"])
    grown = grow_byte_level(json.loads(tokenizer.to_str()), chinese(100), 20)
    after = Tokenizer.from_str(json.dumps(grown.engine))
    assert len(set(after.get_vocab().values())) == tokenizer.get_vocab_size() + grown.num_new
    for token in ("<s>", "<|a|>", "<|b|>"):
        assert after.token_to_id(token) == tokenizer.token_to_id(token)
        assert after.encode(token).ids == [tokenizer.token_to_id(token)]


def test_merges_in_the_old_form_stay_in_it() -> None:
    engine = json.loads(byte_level("gpt2").to_str())
    engine["model"]["merges"] = [" ".join(merge) for merge in engine["model"]["merges"]]
    grown = grow_byte_level(engine, chinese(100), 20)
    assert all(isinstance(merge, str) for merge in grown.engine["model"]["merges"])
    Tokenizer.from_str(json.dumps(grown.engine))


def test_a_tokenizer_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="model: neither has a SentencePiece tokenizer"):
        check_byte_level(llama_json_reference().engine, "model")
