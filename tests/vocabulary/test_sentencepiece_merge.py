"""Promises: merged pieces leave old ids alone, are all of use, and can be the seeds' very file."""

# Chinese text

import random
from itertools import pairwise

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece.sentencepiece_model_pb2 import (
    ModelProto,  # pyright: ignore[reportAttributeAccessIssue]  # made at import
)

from raytune_llama.tokenizer.reference import PieceProto
from raytune_llama.vocabulary.config import PieceScores, PieceTraining
from raytune_llama.vocabulary.sentencepiece_merge import (
    check_base,
    merge_pieces,
    read_pieces,
    train_pieces,
)
from tests.tokenizer.references import CORPUS, corpus_pieces, pieces_proto, unigram_proto

ENGLISH = ["The quick brown fox jumps over the lazy dog; it's 2026, isn't it?", "  def f(x):\n  "]
BASE = pieces_proto(corpus_pieces(tied=False)).SerializeToString()
CHARACTERS = "甲乙丙丁戊己庚辛"


def chinese(num_words: int, seed: int = 0) -> list[str]:
    """Sentences of words that come again and again."""
    chosen = random.Random(seed)
    words = [
        "".join(chosen.choices("天地玄黄宇宙洪荒日月盈昃辰宿列张", k=k)) for k in (2, 2, 3, 4) * 60
    ]
    return ["".join(chosen.choices(words, k=12)) for _ in range(num_words)]


def pieces_of(*pieces: str) -> bytes:
    """A model that holds these pieces."""
    proto = pieces_proto(dict.fromkeys(pieces, -1.0))
    return proto.SerializeToString()


def processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def test_merged_pieces_stand_behind_the_base_with_unique_falling_scores() -> None:
    base, added = (
        ModelProto.FromString(BASE),
        train_pieces(chinese(400), PieceTraining(num_tokens=300)),
    )
    merged = merge_pieces(BASE, added)
    proto = ModelProto.FromString(merged.model)
    assert merged.num_base == len(base.pieces)
    assert list(proto.pieces[: merged.num_base]) == list(base.pieces)
    new = proto.pieces[merged.num_base :]
    assert len(new) == merged.num_new > 100
    scores = [piece.score for piece in new]
    assert all(a > b for a, b in pairwise(scores))
    assert scores[0] < min(piece.score for piece in base.pieces if len(piece.piece) > 1)
    names = [piece.piece for piece in proto.pieces]
    assert len(set(names)) == len(names)
    assert sum(merged.left_out.values()) + merged.num_new == len(
        ModelProto.FromString(added).pieces
    )


@pytest.mark.parametrize("lowest", [-1e9, -(2.0**24)])
def test_scores_are_unique_as_they_are_stored(lowest: float) -> None:
    """LLaMA's characters have scores of -1e9: one less is the same number in a float32."""
    base = ModelProto.FromString(BASE)
    for piece in base.pieces:
        if len(piece.piece) == 1 or lowest > -1e9:
            piece.score = lowest
    merged = merge_pieces(
        base.SerializeToString(), train_pieces(chinese(400), PieceTraining(num_tokens=300))
    )
    scores = [piece.score for piece in ModelProto.FromString(merged.model).pieces]
    new = scores[merged.num_base :]
    assert len(set(new)) == len(new) > 100
    assert max(new) < max(scores[: merged.num_base])


def test_merged_pieces_leave_ascii_text_its_ids_and_shorten_the_new_language() -> None:
    merged = merge_pieces(BASE, train_pieces(chinese(400), PieceTraining(num_tokens=300)))
    before, after = processor(BASE), processor(merged.model)
    assert after.encode(ENGLISH) == before.encode(ENGLISH)
    texts = chinese(50, seed=1)
    assert sum(map(len, after.encode(texts))) < 0.5 * sum(map(len, before.encode(texts)))
    assert after.decode(after.encode(texts)) == texts


def test_ascii_pieces_would_change_the_ids_of_english_and_are_left_out() -> None:
    known = {piece.piece for piece in ModelProto.FromString(BASE).pieces}
    pairs = {a + b for a, b in pairwise(ENGLISH[0]) if (a + b).isalpha()} - known
    added = pieces_of(*sorted(pairs), "”;", "——", "新", "。”", "……月")
    left_out = merge_pieces(BASE, added)
    kept = merge_pieces(BASE, added, keep_ascii=True, scores="tied")
    assert kept.num_new > left_out.num_new
    assert left_out.left_out["ascii"] == kept.num_new - left_out.num_new == len(pairs) + 2
    base_ids = processor(BASE).encode(ENGLISH)
    assert processor(left_out.model).encode(ENGLISH) == base_ids
    assert processor(kept.model).encode(ENGLISH) != base_ids


def test_a_piece_that_no_pair_makes_is_left_out_and_named() -> None:
    merged = merge_pieces(BASE, pieces_of("甲", "乙", "丙", "甲乙丙"))
    assert merged.unreachable == ("甲乙丙",)
    assert (merged.num_new, merged.left_out["unreachable"]) == (3, 1)
    kept = merge_pieces(BASE, pieces_of("甲", "乙", "丙", "甲乙丙"), keep_unreachable=True)
    assert (kept.num_new, kept.unreachable) == (4, ("甲乙丙",))
    made = merge_pieces(BASE, pieces_of("甲", "乙", "丙", "甲乙", "甲乙丙"))
    assert (made.num_new, made.unreachable) == (5, ())


@given(
    pieces=st.lists(
        st.text(CHARACTERS, min_size=2, max_size=4), min_size=1, max_size=12, unique=True
    ),
    scores=st.sampled_from(["descending", "tied"]),
    seed=st.integers(0, 1000),
)
def test_pieces_called_unreachable_are_in_the_ids_of_no_text(
    pieces: list[str], scores: PieceScores, seed: int
) -> None:
    merged = merge_pieces(
        BASE, pieces_of(*CHARACTERS, *pieces), scores=scores, keep_unreachable=True
    )
    encoder = processor(merged.model)
    chosen = random.Random(seed)
    texts = ["".join(chosen.choices([*pieces, *CHARACTERS], k=8)) for _ in range(200)]
    found = {encoder.id_to_piece(id_) for ids in encoder.encode(texts) for id_ in ids}
    assert not found & set(merged.unreachable)
    alone = {piece for piece in pieces if encoder.encode(piece, out_type=str)[-1] == piece}
    assert alone == set(pieces) - set(merged.unreachable)


def test_tied_pieces_are_those_of_the_seeds_program() -> None:
    added = ModelProto.FromString(
        train_pieces([*chinese(300), *ENGLISH * 30], PieceTraining(num_tokens=320))
    )
    wanted = ModelProto.FromString(BASE)
    known = {piece.piece for piece in wanted.pieces}
    for piece in added.pieces:
        if piece.piece not in known:
            wanted.pieces.add(piece=piece.piece, score=0)
    merged = merge_pieces(
        BASE, added.SerializeToString(), scores="tied", keep_ascii=True, keep_unreachable=True
    )
    found = ModelProto.FromString(merged.model)
    assert [(p.piece, p.score, p.type) for p in found.pieces] == [
        (p.piece, p.score, p.type) for p in wanted.pieces
    ]


def test_pieces_that_the_base_has_or_that_come_twice_are_added_once() -> None:
    added = ModelProto.FromString(pieces_of("龘", "人"))
    added.pieces.add(piece="龘", score=-9.0)
    merged = merge_pieces(BASE, added.SerializeToString())
    assert (merged.num_new, merged.left_out["known"]) == (1, 256 + 3 + 2)


def test_a_caller_can_leave_pieces_out() -> None:
    merged = merge_pieces(BASE, pieces_of("龘", "靐"), without=frozenset({"靐"}))
    assert (merged.num_new, merged.left_out["chosen"]) == (1, 1)


def test_training_learns_from_lines_that_sentencepiece_would_skip() -> None:
    line = "".join(chinese(3000)) + "龘靐" * 2000
    assert len(line.encode()) > 50_000
    pieces = read_pieces(train_pieces([line], PieceTraining(num_tokens=300)), "new").pieces
    assert sum(len(piece.piece) > 1 and piece.type == PieceProto.NORMAL for piece in pieces) > 100
    assert any("龘靐" in piece.piece for piece in pieces)


def test_training_on_too_little_text_names_the_field() -> None:
    with pytest.raises(ValueError, match=r"training\.num_tokens: .* 4000 pieces"):
        train_pieces(["天地玄黄"], PieceTraining(num_tokens=4000))


def test_a_base_whose_scores_are_probabilities_is_refused() -> None:
    check_base(BASE, "base")
    with pytest.raises(ValueError, match="base: is not a BPE model"):
        check_base(unigram_proto(CORPUS), "base")
    with pytest.raises(ValueError, match="base: is not a SentencePiece model"):
        check_base(b"tokens", "base")
