"""Answers with tools, token by token."""

import copy
from pathlib import Path

import pytest
from transformers import AddedToken, PreTrainedTokenizerFast

from raytune_llama.chat.tools import write_calls
from raytune_llama.serve.generation.streams import CompletionDecoder
from raytune_llama.tokenizer.loader import load_tokenizer

CALLS = [("weather", '{"city": "人民 a, b"}'), ("now", "{}")]


@pytest.fixture(scope="module", params=["text", "added", "control"])
def tokenizer(request: pytest.FixtureRequest, tokenizer_dir: Path) -> PreTrainedTokenizerFast:
    """Knows the markers as text, as tokens of their own, or as control tokens."""
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
    tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    written = write_calls(text, CALLS)
    assert read(tokenizer, written) == (text, CALLS, "tool_calls")
    assert read(tokenizer, written, has_end=False)[:2] == (text, CALLS)


def test_stop_strings_end_text_and_no_call(tokenizer: PreTrainedTokenizerFast) -> None:
    # The last one stands in the call's arguments, and its beginning at the text's end.
    written = write_calls("The fox a", CALLS)
    assert read(tokenizer, written, "a, b") == ("The fox a", CALLS, "tool_calls")
    assert read(tokenizer, written, "fox") == ("The ", [], "stop")
    assert read(tokenizer, "The fox a", "a, b") == ("The fox a", [], "stop")
