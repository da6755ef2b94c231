"""Promises: a tokenizer is known by its ids, and control tokens written in text are text."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from raytune_llama.model.tokenizer import encode_text, load_tokenizer, tokenizer_sha256
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


@pytest.fixture(params=["byte-level", "sentencepiece"])
def any_tokenizer_dir(request: pytest.FixtureRequest) -> Path:
    name = "tokenizer_dir" if request.param == "byte-level" else "llama_tokenizer_dir"
    return request.getfixturevalue(name)


def test_encode_text_of_plain_text_equals_the_tokenizers_own_ids(any_tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(any_tokenizer_dir)
    own = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert encode_text(tokenizer, list(TEXTS)) == own


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


def test_encode_text_with_only_a_tokenizer_model_equals_sentencepiece(
    llama_tokenizer_dir: Path,
) -> None:
    tokenizer = load_tokenizer(llama_tokenizer_dir)
    processor = sentencepiece.SentencePieceProcessor(
        model_file=str(llama_tokenizer_dir / "tokenizer.model")
    )
    for text in TEXTS:
        # Before a leading space Hugging Face's LLaMA tokenizer puts no further one.
        wanted = processor.encode(text)[1:] if text.startswith(" ") else processor.encode(text)
        assert encode_text(tokenizer, [text]) == [wanted]


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


def test_tokenizer_sha256_of_the_same_tokenizer_saved_again_stays(
    any_tokenizer_dir: Path, tmp_path: Path
) -> None:
    load_tokenizer(any_tokenizer_dir).save_pretrained(tmp_path / "saved")
    assert tokenizer_sha256(tmp_path / "saved") == tokenizer_sha256(any_tokenizer_dir)


@pytest.mark.parametrize(
    "settings",
    [
        {"chat_template": "{{ messages }}"},
        {"model_max_length": 17},
        {"padding_side": "left"},
        {"clean_up_tokenization_spaces": True},
    ],
)
def test_tokenizer_sha256_with_settings_that_change_no_id_stays(
    any_tokenizer_dir: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(any_tokenizer_dir, changed)
    change_json(changed / "tokenizer_config.json", lambda content: content.update(settings))
    assert tokenizer_sha256(changed) == tokenizer_sha256(any_tokenizer_dir)


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
def test_tokenizer_sha256_with_a_change_of_ids_changes(
    tokenizer_dir: Path, tmp_path: Path, name: str, change: Callable[[dict[str, Any]], object]
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(tokenizer_dir, changed)
    change_json(changed / name, change)
    before, after = load_tokenizer(tokenizer_dir), load_tokenizer(changed)
    texts = ["Data about 人民日报 nothing", *SENTENCES]
    ids = [(encode_text(t, texts), t.eos_token_id) for t in (before, after)]
    assert ids[0] != ids[1]
    assert tokenizer_sha256(changed) != tokenizer_sha256(tokenizer_dir)


def test_tokenizer_sha256_with_an_added_token_changes(
    any_tokenizer_dir: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(any_tokenizer_dir)
    tokenizer.add_tokens(["fox"])
    tokenizer.save_pretrained(tmp_path / "grown")
    assert tokenizer_sha256(tmp_path / "grown") != tokenizer_sha256(any_tokenizer_dir)


def test_tokenizer_sha256_of_another_tokenizer_model_changes(
    llama_tokenizer_dir: Path, tmp_path: Path
) -> None:
    before = tokenizer_sha256(llama_tokenizer_dir)
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
    assert tokenizer_sha256(llama_tokenizer_dir) != before
