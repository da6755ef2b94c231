"""Promises: a fast engine is used only with the reference's ids, and goes on being checked."""

import pickle
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from raytune_llama.tokenizer import reference
from raytune_llama.tokenizer.compiled import encoder as compiled
from raytune_llama.tokenizer.config import EncoderKind
from raytune_llama.tokenizer.encoder import (
    CHECK_INTERVAL_TEXTS,
    CheckedEncoder,
    SelectedEncoder,
    TokenIdMismatchError,
)
from raytune_llama.tokenizer.loader import encode_text, load_reference_encoder, load_tokenizer
from raytune_llama.tokenizer.selection import select_encoder
from tests.model.conftest import SENTENCES
from tests.tokenizer import references
from tests.tokenizer.test_loader import change_json

pytest.importorskip("numba", reason="the fast engine is an extra")

from raytune_llama.tokenizer.compiled.encoder import CompiledEncoder


def choose(path: Path, sample: Sequence[str], engine: EncoderKind = "auto") -> SelectedEncoder:
    return select_encoder(load_tokenizer(path), sample, engine)


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
def test_encoder_gives_the_ids_of_the_reference_and_of_encode_text_also_as_a_pickle(
    any_dir: Path, engine: EncoderKind
) -> None:
    encoder = choose(any_dir, SENTENCES, engine).encoder
    assert isinstance(encoder, CheckedEncoder) == (engine != "reference")
    copy = pickle.loads(pickle.dumps(encoder))  # noqa: S301
    assert (copy.name, copy.version) == (encoder.name, encoder.version)
    texts = [*SENTENCES, "", " a </s> b <s>", "人民日报的新年的钟声敲"]
    encoded = [ids.tolist() for ids in encoder.encode(texts)]
    assert encoded == [ids.tolist() for ids in copy.encode(texts)]
    assert encoded == [ids.tolist() for ids in load_reference_encoder(any_dir).encode(texts)]
    assert encoded == encode_text(load_tokenizer(any_dir), texts)


def test_encoder_in_shared_memory_which_is_read_only_gives_the_same_ids(
    merged_tokenizer_dir: Path,
) -> None:
    encoder = choose(merged_tokenizer_dir, SENTENCES).encoder
    buffers: list[pickle.PickleBuffer] = []
    content = pickle.dumps(encoder, protocol=5, buffer_callback=buffers.append)
    shared = [memoryview(bytes(buffer)) for buffer in buffers]
    assert sum(map(len, shared)) > len(content)  # the tables are outside
    copy = pickle.loads(content, buffers=shared)  # noqa: S301
    for wanted, ids in zip(encoder.encode(SENTENCES), copy.encode(SENTENCES), strict=True):
        np.testing.assert_array_equal(ids, wanted)


def test_choice_counts_what_was_compared(tokenizer_dir: Path) -> None:
    few, more = (choose(tokenizer_dir, sample) for sample in ([], ["人", "four"]))
    assert few.num_texts > 1000
    assert (more.num_texts - few.num_texts, more.num_bytes - few.num_bytes) == (2, 7)


def test_choice_for_a_tokenizer_of_unknown_kind_is_the_reference(
    unigram_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    choice = choose(unigram_dir, SENTENCES)
    assert (choice.encoder.name, choice.num_texts) == ("sentencepiece", 0)
    assert choice.reason is not None
    assert choice.reason in caplog.text
    with pytest.raises(ValueError, match="compiled can't be used"):
        choose(unigram_dir, SENTENCES, "compiled")


def test_choice_when_ids_differ_is_the_reference(tokenizer_dir: Path, tmp_path: Path) -> None:
    """With ignore_merges a word that is a token stays one, though no merges make it."""
    path = tmp_path / "unreachable"
    shutil.copytree(tokenizer_dir, path)

    def add_unreachable(content: dict[str, dict[str, object]]) -> None:
        content["model"]["ignore_merges"] = True
        content["model"]["vocab"]["quickest"] = 400  # pyright: ignore[reportIndexIssue]

    change_json(path / "tokenizer.json", add_unreachable)
    choice = choose(path, SENTENCES)
    assert (choice.encoder.name, choice.num_texts) == ("tokenizers", 0)
    assert "quickest" in str(choice.reason)


def test_checked_encoder_with_other_ids_names_the_text(
    llama_tokenizer_dir: Path, merged_tokenizer_dir: Path, piece_model: Path
) -> None:
    merged = load_reference_encoder(merged_tokenizer_dir)
    shutil.copy(piece_model, llama_tokenizer_dir)
    encoder = CheckedEncoder(CompiledEncoder(merged), load_reference_encoder(llama_tokenizer_dir))
    chosen = random.Random(0)
    texts = [f"人民日报{chosen.randrange(10**9)}" for _ in range(5 * CHECK_INTERVAL_TEXTS)]
    indexes = set()
    for start in (0, 1, 2):
        with pytest.raises(TokenIdMismatchError) as caught:
            encoder.encode(texts[start:])
        place = start + caught.value.index
        assert repr(texts[place]) in str(caught.value)
        assert pickle.loads(pickle.dumps(caught.value)).index == caught.value.index  # noqa: S301
        indexes.add(caught.value.index)
    assert len(indexes) == 3  # a hash of the texts chooses: not always the first


@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize("path", ["tokenizer_dir", "merged_tokenizer_dir"])
def test_encoder_from_where_another_version_is_installed_is_refused(
    request: pytest.FixtureRequest, path: str, engine: EncoderKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = pickle.dumps(choose(request.getfixturevalue(path), [], engine).encoder)
    module = compiled if engine == "auto" else reference
    monkeypatch.setattr(module, "version", lambda _: "0.1")
    with pytest.raises(ValueError, match="same packages"):
        pickle.loads(content)  # noqa: S301


def test_encoder_of_a_model_with_sentencepiece_ids_equals_the_library(
    merged_tokenizer_dir: Path,
) -> None:
    file = merged_tokenizer_dir / "tokenizer.model"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
    encoder = choose(merged_tokenizer_dir, SENTENCES).encoder
    for text in (*SENTENCES, "人民日报的新年的钟声敲", "  a\n\n b", ""):
        np.testing.assert_array_equal(encoder.encode([text])[0], processor.encode(text))
