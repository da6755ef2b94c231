"""Promises: a fast engine is used only with the reference's ids, and goes on being checked."""

import dataclasses
import json
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from raytune_llama.model.encoder import (
    CHECKED_SHARE,
    CheckedEncoder,
    EncoderChoice,
    IdsDifferError,
    build_encoder,
    choose_encoder,
)
from raytune_llama.model.tokenizer import encode_text, load_reference, load_tokenizer
from tests.model import references
from tests.model.conftest import SENTENCES
from tests.model.test_tokenizer import change_json

pytest.importorskip("numba", reason="the fast engine is an extra")

from raytune_llama.model.compiled import CompiledEncoder


@pytest.fixture(params=["tokenizer_dir", "llama_tokenizer_dir", "merged_tokenizer_dir"])
def any_dir(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture
def unigram_dir(llama_tokenizer_dir: Path) -> Path:
    """A tokenizer.model of a kind that the fast engine can't read."""
    (llama_tokenizer_dir / "tokenizer.model").write_bytes(references.unigram_proto(SENTENCES))
    (llama_tokenizer_dir / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "unk_token": "<unk>"}'
    )
    return llama_tokenizer_dir


@pytest.mark.parametrize("engine", ["auto", "reference", "compiled"])
def test_encoder_gives_the_ids_of_the_reference_and_of_encode_text(
    any_dir: Path, engine: str
) -> None:
    choice = choose_encoder(any_dir, SENTENCES, engine)  # pyright: ignore[reportArgumentType]
    assert choice.verified == (engine != "reference")
    encoder = build_encoder(any_dir, choice)
    assert (encoder.name, encoder.version) == (choice.engine, choice.version)
    texts = [*SENTENCES, "", " a </s> b <s>", "人民日报的新年的钟声敲"]
    encoded = [ids.tolist() for ids in encoder.encode(texts)]
    assert encoded == [ids.tolist() for ids in load_reference(any_dir).encode(texts)]
    assert encoded == encode_text(load_tokenizer(any_dir), texts)


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_choice_goes_to_a_worker_as_a_pickle_and_into_a_manifest_as_json(
    any_dir: Path, engine: str
) -> None:
    choice = choose_encoder(any_dir, SENTENCES, engine)  # pyright: ignore[reportArgumentType]
    assert pickle.loads(pickle.dumps(choice)) == choice  # noqa: S301
    assert EncoderChoice(**json.loads(json.dumps(dataclasses.asdict(choice)))) == choice


def test_choice_counts_what_was_compared(tokenizer_dir: Path) -> None:
    few, more = (choose_encoder(tokenizer_dir, sample) for sample in ([], ["人", "four"]))
    assert few.num_texts > 1000
    assert (more.num_texts - few.num_texts, more.num_bytes - few.num_bytes) == (2, 7)
    assert dataclasses.replace(more, num_texts=0, num_bytes=0) == dataclasses.replace(
        few, num_texts=0, num_bytes=0
    )


def test_choice_for_a_tokenizer_of_unknown_kind_is_the_reference(
    unigram_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    choice = choose_encoder(unigram_dir, SENTENCES)
    assert (choice.engine, choice.verified) == ("sentencepiece", False)
    assert choice.reason is not None
    assert choice.reason in caplog.text
    with pytest.raises(ValueError, match="compiled can't be used"):
        choose_encoder(unigram_dir, SENTENCES, "compiled")


def test_choice_when_ids_differ_is_the_reference(tokenizer_dir: Path, tmp_path: Path) -> None:
    """With ignore_merges a word that is a token stays one, though no merges make it."""
    path = tmp_path / "unreachable"
    shutil.copytree(tokenizer_dir, path)

    def add_unreachable(content: dict[str, dict[str, object]]) -> None:
        content["model"]["ignore_merges"] = True
        content["model"]["vocab"]["quickest"] = 400  # pyright: ignore[reportIndexIssue]

    change_json(path / "tokenizer.json", add_unreachable)
    choice = choose_encoder(path, SENTENCES)
    assert (choice.engine, choice.verified) == ("tokenizers", False)
    assert "quickest" in str(choice.reason)


def test_checked_encoder_with_other_ids_names_the_text(
    llama_tokenizer_dir: Path, merged_tokenizer_dir: Path, piece_model: Path
) -> None:
    merged = load_reference(merged_tokenizer_dir)
    shutil.copy(piece_model, llama_tokenizer_dir)
    encoder = CheckedEncoder(CompiledEncoder(merged), load_reference(llama_tokenizer_dir))
    chosen = random.Random(0)
    texts = [f"人民日报{chosen.randrange(10**9)}" for _ in range(5 * CHECKED_SHARE)]
    indexes = set()
    for start in (0, 1, 2):
        with pytest.raises(IdsDifferError) as caught:
            encoder.encode(texts[start:])
        place = start + caught.value.index
        assert repr(texts[place]) in str(caught.value)
        assert pickle.loads(pickle.dumps(caught.value)).index == caught.value.index  # noqa: S301
        indexes.add(caught.value.index)
    assert len(indexes) == 3  # a hash of the texts chooses: not always the first


def test_build_encoder_of_another_tokenizer_than_the_drivers_is_refused(
    merged_tokenizer_dir: Path, piece_model: Path
) -> None:
    choice = choose_encoder(merged_tokenizer_dir, SENTENCES, "reference")
    shutil.copy(piece_model, merged_tokenizer_dir)
    with pytest.raises(ValueError, match="on this node"):
        build_encoder(merged_tokenizer_dir, choice)


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_build_encoder_with_another_version_than_the_drivers_is_refused(
    tokenizer_dir: Path, engine: str
) -> None:
    choice = choose_encoder(tokenizer_dir, [], engine)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="same packages"):
        build_encoder(tokenizer_dir, dataclasses.replace(choice, version="0.1"))


def test_encoder_of_a_model_with_sentencepiece_ids_equals_the_library(
    merged_tokenizer_dir: Path,
) -> None:
    file = merged_tokenizer_dir / "tokenizer.model"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
    encoder = build_encoder(merged_tokenizer_dir, choose_encoder(merged_tokenizer_dir, SENTENCES))
    for text in (*SENTENCES, "人民日报的新年的钟声敲", "  a\n\n b", ""):
        np.testing.assert_array_equal(encoder.encode([text])[0], processor.encode(text))
