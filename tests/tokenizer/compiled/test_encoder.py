"""Promise: the fast engine gives the reference's ids, ties and all, or leaves a text to it."""

# a rare letter

import json
import random
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from raytune_llama.tokenizer.hard_texts import hard_texts
from raytune_llama.tokenizer.reference import (
    PieceProto,
    ReferenceEncoder,
    SentencePieceReference,
    TokenizersReference,
)
from tests.tokenizer import references
from tests.tokenizer.references import CORPUS
from tests.tokenizer.test_split_points import ALPHABET, long_text, reference_of

pytest.importorskip("numba", reason="the fast engine is an extra")

from raytune_llama.tokenizer.compiled.encoder import CompiledEncoder

KINDS = (
    *references.SPLITTERS,
    *("words-1-nfc", "llama-json", "metaspace", "tied", "ranked", "no-prefix"),
)


@cache
def compiled_of(kind: str) -> CompiledEncoder:
    return CompiledEncoder(reference_of(kind))


def assert_same(
    encoder: CompiledEncoder, reference: ReferenceEncoder, texts: Sequence[str]
) -> None:
    encoded, wanted = encoder.encode(texts), reference.encode(texts)
    assert [ids.tolist() for ids in encoded] == [ids.tolist() for ids in wanted]
    assert {ids.dtype for ids in encoded} <= {np.dtype(np.uint32)}


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_on_hard_texts_equals_the_reference(kind: str) -> None:
    vocabulary = [*" ".join(CORPUS).split(" "), *ALPHABET, "\u2581\u2581", "  ", "'ll", "\r\n"]
    encoder = compiled_of(kind)
    before = encoder.num_apart
    texts = hard_texts(["<s>", "</s>"], vocabulary)
    assert_same(encoder, reference_of(kind), texts)
    # Leaving all to the reference would be equal, too.
    assert encoder.num_apart - before < len(texts) / 10


pieces = st.lists(st.sampled_from(ALPHABET) | st.sampled_from(CORPUS), max_size=30)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)  # for each of ten kinds
@given(texts=st.lists(pieces.map("".join) | st.text(max_size=30), max_size=6))
def test_compiled_on_any_text_equals_the_reference(kind: str, texts: list[str]) -> None:
    assert_same(compiled_of(kind), reference_of(kind), texts)


words = st.text("ab\u2581哈", min_size=2, max_size=5)


@given(
    vocabulary=st.dictionaries(words, st.sampled_from([0.0, -1.0, -2.0]), max_size=25),
    characters=st.sets(st.sampled_from("ab哈")),
    texts=st.lists(st.text("ab 哈\u2581c", max_size=25), min_size=1, max_size=5),
)
def test_compiled_with_any_pieces_and_ties_equals_sentencepiece(
    vocabulary: dict[str, float], characters: set[str], texts: list[str]
) -> None:
    """Pieces without their parts, of better score than these, that overlap themselves."""
    scores = {"\u2581": -3.0} | dict.fromkeys(sorted(characters), -3.0) | vocabulary
    reference = references.pieces_reference(scores)
    assert_same(CompiledEncoder(reference), reference, texts)


@cache
def untrained() -> str:
    return references.byte_level("gpt2", size=258).to_str()


@settings(max_examples=50)
@given(
    merges=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=25),
    texts=st.lists(st.text("abc d", max_size=25), min_size=1, max_size=5),
)
def test_compiled_with_any_merges_equals_tokenizers(
    merges: list[tuple[int, int]], texts: list[str]
) -> None:
    """Merges of which one makes what another has made, in any order."""
    engine = json.loads(untrained())
    tokens = ["a", "b", "c", "d", "Ġ"]
    listed: list[list[str]] = []
    for left, right in merges:
        pair = [tokens[left % len(tokens)], tokens[right % len(tokens)]]
        if pair not in listed:
            listed.append(pair)
            tokens.append("".join(pair))
    vocabulary = engine["model"]["vocab"]
    for token in tokens:
        vocabulary.setdefault(token, len(vocabulary))
    engine["model"]["merges"] = listed
    reference = TokenizersReference(json.dumps(engine))
    assert_same(CompiledEncoder(reference), reference, texts)


@pytest.mark.parametrize("kind", ["tied", "gpt2-digits"])
def test_compiled_with_a_small_memo_equals_the_reference(kind: str) -> None:
    """It is full again and again, and most segments share a place in it with others."""
    encoder = CompiledEncoder(reference_of(kind), memo_entries=16)
    chosen = random.Random(0)
    for _ in range(300):
        words = ["".join(chosen.choices("abcdeof", k=chosen.randrange(9))) for _ in range(20)]
        assert_same(encoder, reference_of(kind), [" ".join(words), *words])


@pytest.mark.parametrize("kind", ["tied", "gpt2-digits"])
def test_compiled_on_a_long_text_equals_the_reference(kind: str) -> None:
    text = long_text(600_000)
    assert_same(compiled_of(kind), reference_of(kind), [text, "short", text[:300_000]])


def test_compiled_of_a_vocabulary_without_some_bytes_equals_the_reference() -> None:
    """Hugging Face's library drops what it has no token for."""
    engine = references.byte_level_reference("gpt2").engine
    del engine["model"]["vocab"]["\u0104"]  # how byte 4 is spelled
    reference = TokenizersReference(json.dumps(engine))
    encoder = CompiledEncoder(reference)
    assert_same(encoder, reference, ["a\x04b", "plain"])
    assert encoder.num_apart == 1


def test_compiled_with_text_added_as_a_token_equals_the_reference() -> None:
    tokenizer = references.byte_level("gpt2")
    tokenizer.add_tokens(["fox jumps", AddedToken("lazy", lstrip=True)])
    tokenizer.add_special_tokens(["<|im_end|>"])
    reference = TokenizersReference(tokenizer.to_str())
    with pytest.raises(ValueError, match=r"unsupported tokenizer\.json"):
        CompiledEncoder(reference)
    tokenizer = Tokenizer.from_str(references.byte_level("gpt2").to_str())
    tokenizer.add_tokens(["fox jumps"])
    reference = TokenizersReference(tokenizer.to_str())
    assert_same(CompiledEncoder(reference), reference, ["a fox jumps over", "fox  jumps", "fox"])


def test_compiled_of_an_unknown_kind_is_refused() -> None:
    unigram = SentencePieceReference(references.unigram_proto(CORPUS), frozenset())
    with pytest.raises(ValueError, match="unsupported SentencePiece model"):
        CompiledEncoder(unigram)
    proto = references.pieces_proto(references.corpus_pieces(tied=True))
    proto.pieces.add(piece="of the", type=PieceProto.USER_DEFINED)
    with pytest.raises(ValueError, match="user-defined"):
        CompiledEncoder(SentencePieceReference(proto.SerializeToString(), frozenset()))
