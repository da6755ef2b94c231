from functools import cache
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given
from transformers import PreTrainedTokenizerBase

from raytune_llama.serve.generation.detokenizer import IncrementalDetokenizer, StopStringFilter
from raytune_llama.tokenizer.loader import encode_text, load_tokenizer

TEXTS = st.text(st.sampled_from("ab \n人民🙂🇩🇪é.!<s>\u200d"), max_size=30)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tokenizer_dir)


@cache
def encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(encode_text(tokenizer, [text])[0])


def parts_of(stream: IncrementalDetokenizer, tokens: list[int]) -> list[str]:
    return [*(stream.push(token) for token in tokens), stream.finish()]


@given(text=TEXTS)
def test_stream_of_all_tokens_is_the_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    tokens = encoded(tokenizer, text)
    assert "".join(parts_of(IncrementalDetokenizer(tokenizer), tokens)) == text


@given(tokens=st.lists(st.integers(3, 399), max_size=20))
def test_stream_of_any_tokens_is_what_the_tokenizer_decodes(
    tokenizer: PreTrainedTokenizerBase, tokens: list[int]
) -> None:
    told = "".join(parts_of(IncrementalDetokenizer(tokenizer), tokens))
    assert told == tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


@given(text=TEXTS, stops=st.lists(st.text("ab人🙂.", min_size=1, max_size=4), max_size=3))
def test_stream_ends_before_the_stop_string_that_is_whole_first(
    tokenizer: PreTrainedTokenizerBase, text: str, stops: list[str]
) -> None:
    cutter = StopStringFilter(stops)
    parts = parts_of(IncrementalDetokenizer(tokenizer), encoded(tokenizer, text))
    told = "".join(map(cutter.push, parts)) + cutter.finish()
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert told == (text[: min(ends)[1]] if ends else text)
    assert cutter.is_stopped == bool(ends)


def test_stream_tells_a_character_when_it_is_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    parts = parts_of(IncrementalDetokenizer(tokenizer), encoded(tokenizer, "🙂!"))
    # Four bytes are four tokens here.
    assert parts == ["", "", "", "🙂", "!", ""]


def test_stream_leaves_control_tokens_out(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = [0, *encoded(tokenizer, "a"), 2, *encoded(tokenizer, "b"), 1]
    assert "".join(parts_of(IncrementalDetokenizer(tokenizer), tokens)) == "ab"


def test_stream_shows_control_tokens_that_are_to_be_shown(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokens = [0, *encoded(tokenizer, "a"), 2, *encoded(tokenizer, "人"), 1]
    assert (
        "".join(parts_of(IncrementalDetokenizer(tokenizer, shown={2}), tokens)) == "a<|im_end|>人"
    )
