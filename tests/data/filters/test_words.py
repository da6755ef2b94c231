"""Promise: words mean the same in every text, whatever stands beside it."""

import unicodedata

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from raytune_llama.data.filters import words
from raytune_llama.data.filters.words import BATCH_CHARACTERS, WordArrays, batch_texts, find_words

TEXTS = st.lists(
    st.text(st.sampled_from("aB\u00e91 ,.\n人民\u0e01\uac00\U00020000\ufffd"), max_size=12)
    | st.text(max_size=12),
    max_size=6,
)


def expected_words(text: str) -> list[str]:
    """The definition of a word, character by character; for the alphabet of `TEXTS`."""
    found: list[str] = []
    is_open = False
    for character in text:
        is_word = unicodedata.category(character)[0] in "LMN"
        is_single = bool(words.character_flags()[ord(character)] & words.SINGLE_WORD_FLAG)
        if is_word and is_open and not is_single:
            found[-1] += character
        elif is_word:
            found.append(character)
        is_open = is_word and not is_single
    return found


def lower(character: str) -> str:
    """Lower case where it is one character."""
    return character.lower() if len(character.lower()) == 1 else character


def words_of(texts: list[str]) -> list[list[tuple[int, int]]]:
    """Length and hash of each word of each text."""
    found: list[list[tuple[int, int]]] = [[] for _ in texts]
    for piece in batch_texts(texts):
        there = find_words(piece)
        starts = np.arange(len(there.text))
        hashes = there.hash_ngrams(starts, starts + 1)
        for text, length, value in zip(
            piece.text[there.text].tolist(), there.num_characters, hashes, strict=True
        ):
            found[text].append((int(length), int(value)))
    return found


def test_character_flags_of_scripts_are_right() -> None:
    flags = words.character_flags()
    single = words.CJK_FLAG | words.LETTER_FLAG | words.WORD_FLAG | words.SINGLE_WORD_FLAG
    for character in "人々かカ\U00020000":
        assert flags[ord(character)] == single, character
    assert flags[ord("한")] == words.CJK_FLAG | words.LETTER_FLAG | words.WORD_FLAG
    assert flags[ord("ก")] == words.LETTER_FLAG | words.WORD_FLAG | words.SINGLE_WORD_FLAG
    assert flags[ord("a")] == words.LETTER_FLAG | words.WORD_FLAG
    assert flags[ord("7")] == words.WORD_FLAG
    assert flags[ord("\u3000")] == flags[ord("\n")] == words.SPACE_FLAG
    for symbol in "。#\u200b\x00\ufffd\ue000\U0001f600":
        assert flags[ord(symbol)] == words.SYMBOL_FLAG, hex(ord(symbol))


@given(TEXTS)
def test_find_words_equals_the_definition(texts: list[str]) -> None:
    wanted = [expected_words(text) for text in texts]
    found = words_of(texts)
    assert [[length for length, _ in one] for one in found] == [
        [len(word) for word in one] for one in wanted
    ]
    # Equal words have equal hashes, and others have others.
    pairs = {
        ("".join(map(lower, word)), value)
        for one, values in zip(wanted, found, strict=True)
        for word, (_, value) in zip(one, values, strict=True)
    }
    assert len({value for _, value in pairs}) == len({word for word, _ in pairs}) == len(pairs)


@given(TEXTS)
def test_find_words_of_a_text_do_not_depend_on_its_neighbours(texts: list[str]) -> None:
    assert words_of(texts) == [words_of([text])[0] for text in texts]


def test_hash_runs_depend_on_order_length_and_content() -> None:
    (piece,) = batch_texts(["人民 日报 人民 a b ab 民人 a A"])
    found: WordArrays = find_words(piece)
    starts = np.arange(len(found.text) - 1)
    pairs = found.hash_ngrams(starts, starts + 2).tolist()
    single = found.hash_ngrams(starts, starts + 1).tolist()
    assert pairs[0] == pairs[4]
    assert single[6] == single[11]
    assert len({*pairs, *single}) == len(set(pairs)) + len(set(single)) == 11 + 7


def test_cut_pieces_keep_every_character_in_bounds() -> None:
    long = "长" * (BATCH_CHARACTERS + 3)
    texts = ["", "a", long, "", "b" * 70_000, "c", ""]
    whole = [""] * len(texts)
    for piece in batch_texts(texts):
        assert len(piece.codes) <= BATCH_CHARACTERS
        for index, start, stop in zip(piece.text, piece.starts, piece.starts[1:], strict=False):
            whole[index] += "".join(map(chr, piece.codes[start:stop]))
    assert whole == texts


def test_count_of_empty_texts_is_zero() -> None:
    (piece,) = batch_texts(["", "a b", "", "", "c", ""])
    assert piece.count(words.LETTER_FLAG).tolist() == [0, 2, 0, 0, 1, 0]
