import copy
from functools import cache
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given
from transformers import AddedToken, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from raytune_llama.chat.tools import write_calls
from raytune_llama.serve.generation.detokenizer import (
    CompletionDecoder,
    IncrementalDetokenizer,
    StopStringFilter,
)
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


CALLS = [("weather", '{"city": "人民 a, b"}'), ("now", "{}")]


@pytest.fixture(scope="module", params=["text", "added", "control"])
def marked(request: pytest.FixtureRequest, tokenizer_dir: Path) -> PreTrainedTokenizerFast:
    """A tokenizer that has the markers as text, as tokens of their own, or as control tokens."""
    tokenizer = copy.deepcopy(load_tokenizer(tokenizer_dir))
    if request.param != "text":
        for text in ("<tool_call>", "</tool_call>"):
            tokenizer.add_tokens(AddedToken(text, special=request.param == "control"))
    return tokenizer


def read(
    tokenizer: PreTrainedTokenizerFast, written: str, *stops: str, has_end: bool = True
) -> tuple[str, list[tuple[str, str]], str]:
    stream = CompletionDecoder(tokenizer, stops, must_call=False)
    tokens: list[int | None] = [*tokenizer(written, add_special_tokens=False)["input_ids"]]
    tokens += [None] if has_end else []
    told, calls = "", list[list[str]]()
    for number, token in enumerate(tokens, start=1):
        text, pieces = stream.push(token, is_last=number == len(tokens))
        assert not (text and calls), "text behind a call"
        told += text
        for piece in pieces:
            calls += [[piece.name, ""]] if piece.name is not None else []
            calls[piece.index][1] += piece.arguments
        if stream.is_stopped:
            break
    return told, [(name, arguments) for name, arguments in calls], stream.finish_reason


@pytest.mark.parametrize("text", ["", "The fox 人", "a"])
def test_calls_come_out_of_tokens_as_they_were_written(
    marked: PreTrainedTokenizerFast, text: str
) -> None:
    written = write_calls(text, CALLS)
    assert read(marked, written) == (text, CALLS, "tool_calls")
    assert read(marked, written, has_end=False)[:2] == (text, CALLS)


def test_stop_strings_end_text_and_no_call(marked: PreTrainedTokenizerFast) -> None:
    # The last one stands in the call's arguments, and its beginning at the text's end.
    written = write_calls("The fox a", CALLS)
    assert read(marked, written, "a, b") == ("The fox a", CALLS, "tool_calls")
    assert read(marked, written, "fox") == ("The ", [], "stop")
    assert read(marked, "The fox a", "a, b") == ("The fox a", [], "stop")
