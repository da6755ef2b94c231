"""Promises: a tokenizer is known by its ids, and control tokens written in text are text."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import (
    ModelProto,  # pyright: ignore[reportAttributeAccessIssue]  # made at import
)

from raytune_llama.tokenizer.loader import (
    encode_text,
    hash_tokenizer,
    load_reference_encoder,
    load_tokenizer,
    write_tokenizer,
)
from tests.conftest import CONTROL_TOKENS
from tests.model.conftest import NAMES_LLAMA, SENTENCES

TEXTS = (
    *SENTENCES,
    "",
    " two  spaces ",
    "line\n\nbreak\ttab",
    "龘 and \U0001f98a are new",
    "def f(x): return x ** 2",
)

CHINESE = ("人民日报", "新年的新年", "敲钟声敲", "人民日报的新年的钟声敲")
"""Texts in which several pieces of a merged vocabulary overlap."""


@pytest.fixture(params=["byte-level", "sentencepiece"])
def any_tokenizer_dir(request: pytest.FixtureRequest) -> Path:
    name = "tokenizer_dir" if request.param == "byte-level" else "llama_tokenizer_dir"
    return request.getfixturevalue(name)


def test_encode_text_of_a_tokenizer_json_equals_the_tokenizers_own_ids(tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    own = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert encode_text(tokenizer, list(TEXTS)) == own
    assert [ids.tolist() for ids in load_reference_encoder(tokenizer_dir).encode(TEXTS)] == own


@pytest.mark.parametrize("name", ["llama_tokenizer_dir", "merged_tokenizer_dir"])
@pytest.mark.parametrize("files", ["model", "both"])
def test_encode_text_of_a_tokenizer_model_equals_sentencepiece(
    request: pytest.FixtureRequest, name: str, tmp_path: Path, files: str
) -> None:
    path = request.getfixturevalue(name)
    if files == "both":
        write_tokenizer(path, tmp_path)
        assert (tmp_path / "tokenizer.json").is_file()
        path = tmp_path
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
    wanted = processor.encode([*TEXTS, *CHINESE])
    assert encode_text(load_tokenizer(path), [*TEXTS, *CHINESE]) == wanted
    encoded = load_reference_encoder(path).encode([*TEXTS, *CHINESE])
    assert [ids.tolist() for ids in encoded] == wanted
    assert {ids.dtype for ids in encoded} == {np.dtype(np.uint32)}


def test_encode_text_with_tied_scores_differs_from_the_conversion(
    merged_tokenizer_dir: Path,
) -> None:
    """Why there is a reference at all: Hugging Face's ids of a merged vocabulary are others."""
    tokenizer = load_tokenizer(merged_tokenizer_dir)
    own = tokenizer(list(CHINESE), add_special_tokens=False)["input_ids"]
    ids = encode_text(tokenizer, list(CHINESE))
    assert ids != own
    assert [tokenizer.decode(text) for text in ids] == list(CHINESE)


def test_encode_text_with_control_tokens_written_in_it_keeps_them_text(
    any_tokenizer_dir: Path,
) -> None:
    tokenizer = load_tokenizer(any_tokenizer_dir)
    controls = {tokenizer.get_vocab()[token] for token in CONTROL_TOKENS[:2]}
    for text in ("</s>", "a</s>b", "<s> Data</s>", "x <s></s>"):
        assert controls & set(tokenizer(text, add_special_tokens=False)["input_ids"])
        [ids] = encode_text(tokenizer, [text])
        assert not controls & set(ids)
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", [1, 4])
def test_encode_text_with_a_special_piece_of_the_model_written_keeps_it_text(
    llama_tokenizer_dir: Path, kind: int
) -> None:
    """As a normal (1) or user-defined (4) piece SentencePiece itself would find it in a text."""
    file = llama_tokenizer_dir / "tokenizer.model"
    proto = ModelProto.FromString(file.read_bytes())
    for text in ("<s>x", "xy"):
        proto.pieces.add(piece=text, score=-1.0, type=kind)
    file.write_bytes(proto.SerializeToString())
    plain = encode_text(load_tokenizer(llama_tokenizer_dir), ["a xy"])
    assert 361 in plain[0]
    names = NAMES_LLAMA | {"added_tokens_decoder": {"361": {"content": "xy", "special": True}}}
    (llama_tokenizer_dir / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer = load_tokenizer(llama_tokenizer_dir)
    [ids] = encode_text(tokenizer, ["a xy"])
    assert 361 not in ids
    assert tokenizer.decode(ids) == "a xy"


def test_reference_of_a_tokenizer_with_a_new_special_token_stays_sentencepiece(
    merged_tokenizer_dir: Path,
) -> None:
    before = load_reference_encoder(merged_tokenizer_dir)
    names = NAMES_LLAMA | {"pad_token": "[PAD]"}
    (merged_tokenizer_dir / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer = load_tokenizer(merged_tokenizer_dir)
    assert tokenizer.pad_token_id == max(tokenizer.get_vocab().values())
    after = load_reference_encoder(merged_tokenizer_dir)
    assert after.name == "sentencepiece"
    texts = [*TEXTS, *CHINESE, "a [PAD] b"]
    for ids, wanted in zip(after.encode(texts), before.encode(texts), strict=True):
        np.testing.assert_array_equal(ids, wanted)


def test_reference_of_a_tokenizer_with_text_added_as_tokens_is_tokenizers(
    llama_tokenizer_dir: Path, tmp_path: Path
) -> None:
    """SentencePiece knows nothing of such tokens, so that its ids are not the tokenizer's."""
    tokenizer = copy.deepcopy(load_tokenizer(llama_tokenizer_dir))
    tokenizer.add_tokens(["fox"])
    tokenizer.save_pretrained(tmp_path / "grown")
    shutil.copy(llama_tokenizer_dir / "tokenizer.model", tmp_path / "grown")
    reference = load_reference_encoder(tmp_path / "grown")
    assert reference.name == "tokenizers"
    [ids] = reference.encode(["a fox"])
    assert ids.tolist() == encode_text(tokenizer, ["a fox"])[0]
    assert tokenizer.convert_tokens_to_ids("fox") in ids


def test_load_tokenizer_of_two_tokenizers_in_one_directory_is_refused(
    tokenizer_dir: Path, llama_tokenizer_dir: Path, tmp_path: Path
) -> None:
    both = tmp_path / "both"
    shutil.copytree(tokenizer_dir, both)
    shutil.copy(llama_tokenizer_dir / "tokenizer.model", both)
    with pytest.raises(ValueError, match="two tokenizers"):
        load_tokenizer(both)


def test_reference_beside_a_tokenizer_model_of_another_format_is_tokenizers(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    both = tmp_path / "both"
    shutil.copytree(tokenizer_dir, both)
    (both / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # tiktoken's
    assert load_reference_encoder(both).name == "tokenizers"


def test_reference_of_half_a_surrogate_pair_raises_a_value_error(any_tokenizer_dir: Path) -> None:
    with pytest.raises(ValueError, match="surrogates"):
        load_reference_encoder(any_tokenizer_dir).encode(["text", "half \ud83d of it"])


@pytest.mark.parametrize("names", [None, {}, {"tokenizer_class": "PreTrainedTokenizerFast"}])
def test_load_tokenizer_of_a_tokenizer_model_of_unknown_kind_is_refused(
    llama_tokenizer_dir: Path, names: dict[str, str] | None
) -> None:
    settings = llama_tokenizer_dir / "tokenizer_config.json"
    settings.unlink()
    if names is not None:
        settings.write_text(json.dumps(names))
    with pytest.raises(ValueError, match="LlamaTokenizer"):
        load_tokenizer(llama_tokenizer_dir)


def test_load_tokenizer_of_a_directory_without_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_tokenizer_hash_of_the_same_tokenizer_saved_again_stays(
    any_tokenizer_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "saved").mkdir()
    write_tokenizer(any_tokenizer_dir, tmp_path / "saved")
    assert hash_tokenizer(tmp_path / "saved") == hash_tokenizer(any_tokenizer_dir)


@pytest.mark.parametrize(
    "settings",
    [
        {"chat_template": "{{ messages }}"},
        {"model_max_length": 17},
        {"padding_side": "left"},
        {"clean_up_tokenization_spaces": True},
    ],
)
def test_tokenizer_hash_with_settings_that_change_no_id_stays(
    any_tokenizer_dir: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(any_tokenizer_dir, changed)
    change_json(changed / "tokenizer_config.json", lambda content: content.update(settings))
    assert hash_tokenizer(changed) == hash_tokenizer(any_tokenizer_dir)


def change_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def add_token(content: dict[str, Any]) -> None:
    content["added_tokens_decoder"] = {"400": {"content": "nothing", "special": False}}


def end_with_another_token(content: dict[str, Any]) -> None:
    content["eos_token"] = "<|im_end|>"  # noqa: S105


def forget_a_merge(content: dict[str, Any]) -> None:
    content["model"]["merges"].pop()


def swap_two_ids(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def normalize(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Lowercase"}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer_config.json", add_token),
        ("tokenizer_config.json", end_with_another_token),
        ("tokenizer.json", forget_a_merge),
        ("tokenizer.json", swap_two_ids),
        ("tokenizer.json", normalize),
    ],
)
def test_tokenizer_hash_with_a_change_of_ids_changes(
    tokenizer_dir: Path, tmp_path: Path, name: str, change: Callable[[dict[str, Any]], object]
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(tokenizer_dir, changed)
    change_json(changed / name, change)
    before, after = load_tokenizer(tokenizer_dir), load_tokenizer(changed)
    texts = ["Data about 人民日报 nothing", *SENTENCES]
    ids = [(encode_text(t, texts), t.eos_token_id) for t in (before, after)]
    assert ids[0] != ids[1]
    assert hash_tokenizer(changed) != hash_tokenizer(tokenizer_dir)


def test_tokenizer_hash_with_an_added_token_changes(
    any_tokenizer_dir: Path, tmp_path: Path
) -> None:
    tokenizer = copy.deepcopy(load_tokenizer(any_tokenizer_dir))
    tokenizer.add_tokens(["fox"])
    tokenizer.save_pretrained(tmp_path / "grown")
    assert hash_tokenizer(tmp_path / "grown") != hash_tokenizer(any_tokenizer_dir)


def test_tokenizer_hash_of_another_tokenizer_model_changes(
    llama_tokenizer_dir: Path, tmp_path: Path
) -> None:
    before = hash_tokenizer(llama_tokenizer_dir)
    prefix = tmp_path / "other"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_prefix=str(prefix),
        vocab_size=350,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        minloglevel=2,
    )
    shutil.copy(f"{prefix}.model", llama_tokenizer_dir / "tokenizer.model")
    assert json.loads((llama_tokenizer_dir / "tokenizer_config.json").read_text()) == NAMES_LLAMA
    assert hash_tokenizer(llama_tokenizer_dir) != before
