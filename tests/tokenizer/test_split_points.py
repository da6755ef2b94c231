"""Promises: the ids of a text in parts are those of the whole, and memory stays bounded."""

# ruff: noqa: RUF001  # a rare letter

import random
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_llama.tokenizer.reference import (
    PieceProto,
    ReferenceEncoder,
    SentencePieceReference,
    is_plain_merging,
)
from raytune_llama.tokenizer.split_points import (
    CHUNK_CHARACTERS,
    MAX_CHUNK_CHARACTERS,
    UnsplittableTextError,
    split_text,
)
from tests.tokenizer import references
from tests.tokenizer.references import CORPUS

ALPHABET = sorted({*"".join(CORPUS)} | {*"\u2581龘\U00020000\U0001f98a\u0301\x00\r\u3000ſ"})


@cache
def reference_of(kind: str) -> ReferenceEncoder:
    if kind in references.SPLITTERS:
        return references.byte_level_reference(kind)
    made = {
        "words-1-nfc": lambda: references.byte_level_reference("words-1", normal_form=True),
        "llama-json": references.llama_json_reference,
        "metaspace": references.metaspace_reference,
        "tied": lambda: references.pieces_reference(references.corpus_pieces(tied=True)),
        "ranked": lambda: references.pieces_reference(references.corpus_pieces(tied=False)),
        "no-prefix": lambda: references.pieces_reference(
            references.corpus_pieces(tied=True), add_dummy_prefix=False
        ),
        "user-defined": user_defined,
    }
    return made[kind]()


def user_defined() -> SentencePieceReference:
    proto = references.pieces_proto(references.corpus_pieces(tied=True))
    for piece in ("人的", "\u2581\u2581\u2581", "x*", "of\u2581the"):
        proto.pieces.add(piece=piece, type=PieceProto.USER_DEFINED)
    return SentencePieceReference(proto.SerializeToString(), frozenset())


KINDS = (
    *references.SPLITTERS,
    *("words-1-nfc", "llama-json", "metaspace", "tied", "ranked", "no-prefix", "user-defined"),
)

texts = st.lists(
    st.sampled_from(ALPHABET) | st.sampled_from([word for line in CORPUS for word in line.split()]),
    max_size=20,
).map("".join) | st.text(max_size=20)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)  # for each of eleven kinds
@given(text=texts)
def test_cut_of_a_text_anywhere_certain_keeps_its_ids(kind: str, text: str) -> None:
    reference = reference_of(kind)
    split_points = reference.split_points
    assert split_points is not None
    places = [at for at in range(1, len(text)) if split_points.is_safe_split(text, at)]
    parts = [part for at in places for part in (text[:at], split_points.anchor + text[at:])]
    whole, anchor, *encoded = reference.encode_unsplit([text, split_points.anchor, *parts])
    for left, right in zip(encoded[::2], encoded[1::2], strict=True):
        assert [*left, *right[len(anchor) :]] == whole.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_cut_of_ordinary_text_finds_places(kind: str) -> None:
    """A rule that allows no cut would keep every id, and be of no use."""
    split_points = reference_of(kind).split_points
    assert split_points is not None
    for text in CORPUS:
        certain = [at for at in range(1, len(text)) if split_points.is_safe_split(text, at)]
        assert np.diff([0, *certain, len(text)]).max() < 40


def long_text(num_characters: int) -> str:
    words = random.Random(0).choices([*" ".join(CORPUS).split(" "), "", "哈哈哈"], k=num_characters)
    return " ".join(words)[:num_characters]


@pytest.mark.parametrize("kind", ["tied", "gpt2-digits"])
def test_encode_of_a_long_text_among_short_ones_equals_the_whole(kind: str) -> None:
    reference = reference_of(kind)
    given_ = ["short", long_text(2 * CHUNK_CHARACTERS + 5), "", *(["x y"] * 3)]
    assert len(list(split_text(given_[1], reference.split_points))) == 3
    for ids, wanted in zip(reference.encode(given_), reference.encode_unsplit(given_), strict=True):
        np.testing.assert_array_equal(ids, wanted)


def test_cut_returns_the_text_in_bounded_stretches() -> None:
    text = long_text(3 * CHUNK_CHARACTERS)
    stretches = list(split_text(text, reference_of("tied").split_points))
    assert "".join(stretches) == text
    assert max(map(len, stretches)) <= CHUNK_CHARACTERS


def test_cut_without_a_certain_place_goes_on_to_the_next_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Letters in a row can be cut nowhere; what follows can."""
    run = 2 * CHUNK_CHARACTERS + 100
    text = "a" * run + " b" * CHUNK_CHARACTERS
    stretches = list(split_text(text, reference_of("gpt2").split_points))
    assert "".join(stretches) == text
    assert len(stretches[0]) == run
    assert max(map(len, stretches[1:])) <= CHUNK_CHARACTERS
    assert str(run) in caplog.text


def test_encode_of_a_text_too_long_to_be_encoded_whole_is_refused() -> None:
    proto = references.unigram_proto(CORPUS)
    reference = SentencePieceReference(proto, frozenset())
    assert reference.split_points is None
    with pytest.raises(UnsplittableTextError, match=str(MAX_CHUNK_CHARACTERS + 1)):
        reference.encode(["a " * (MAX_CHUNK_CHARACTERS // 2) + "b"])


@pytest.mark.parametrize(
    "change",
    [
        {"remove_extra_whitespaces": True},
        {"precompiled_charsmap": b"x"},
        {"escape_whitespaces": False},
    ],
)
def test_cuts_of_a_model_that_changes_text_are_none(change: dict[str, object]) -> None:
    assert is_plain_merging(references.pieces_proto({"a": 0.0}))
    assert not is_plain_merging(references.pieces_proto({"a": 0.0}, **change))
