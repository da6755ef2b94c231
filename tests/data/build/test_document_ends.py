"""Promise: documents begin as transformers begins a text, and those of an old store as they did."""

import copy
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from raytune_llama.config.settings import ConfigError, from_dict, load
from raytune_llama.data.build.preparation import open_data
from raytune_llama.data.build.preview import render_preview
from raytune_llama.data.build.text_corpus import document_ends, keep_store_bos
from raytune_llama.data.config import DataConfig, PrepareDataConfig
from raytune_llama.storage.place import Place
from raytune_llama.tokenizer.loader import encode_text, leading_ids, load_tokenizer
from tests.conftest import train_tokenizer

BOS, EOS = 0, 1
TEMPLATES = {"plain": "$A", "bos": "<s> $A", "both": "<s> $A </s>", "two": "<|im_end|> <s> $A"}


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> dict[str, Path]:
    """The same tokenizer with post-processors that put other ids around a text."""
    folders: dict[str, Path] = {}
    for name, template in TEMPLATES.items():
        tokenizer = copy.deepcopy(load_tokenizer(tokenizer_dir))
        special = [("<s>", BOS), ("</s>", EOS), ("<|im_end|>", 2)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[pair for pair in special if pair[0] in template]
        )
        folders[name] = tmp_path_factory.mktemp(f"tokenizer-{name}")
        tokenizer.save_pretrained(folders[name])
    return folders


def make_config(tmp_path: Path, **fields: Any) -> DataConfig:  # noqa: ANN401
    (tmp_path / "a.txt").write_text("the quick brown fox\n人民日报 </s>\n")
    sources = [{"path": str(tmp_path / "a.txt")}]
    return from_dict(
        DataConfig, {"sources": sources, "store_dir": str(tmp_path / "store"), **fields}
    )


def write_manifest(config: DataConfig, bos_id: int | None) -> Place:
    store = Place.parse(config.store_dir, "store_dir")
    inputs = {"tokenizer": {"bos_id": bos_id, "eos_id": EOS}}
    (store / "manifest.json").write_json({"inputs": inputs})
    return store


@pytest.mark.parametrize("name", TEMPLATES)
def test_leading_ids_are_those_of_calling_the_tokenizer(
    name: str, tokenizers: dict[str, Path]
) -> None:
    tokenizer = load_tokenizer(tokenizers[name])
    for text in ("the fox", "人民", " x"):
        plain = encode_text(tokenizer, [text])[0]
        called = tokenizer(text)["input_ids"]
        begin = list(leading_ids(tokenizer))
        assert called[: len(begin) + len(plain)] == [*begin, *plain]


@pytest.mark.parametrize("name", ["plain", "bos", "both"])
def test_document_ends_of_auto_begin_as_the_tokenizer_does_and_end_with_eos(
    name: str, tmp_path: Path, tokenizers: dict[str, Path]
) -> None:
    tokenizer = load_tokenizer(tokenizers[name])
    begins = tokenizer("a")["input_ids"][0] == BOS
    # The default is auto; the end of a text is learned whatever a prompt has.
    assert document_ends(make_config(tmp_path), tokenizer) == (BOS if begins else None, EOS)
    assert document_ends(make_config(tmp_path, bos=True, eos=False), tokenizer) == (BOS, None)
    assert document_ends(make_config(tmp_path, bos=False), tokenizer) == (None, EOS)


@pytest.mark.parametrize("name", ["plain", "bos"])
def test_preview_shows_the_document_that_the_tokenizer_gives(
    name: str, tmp_path: Path, tokenizers: dict[str, Path]
) -> None:
    config = make_config(tmp_path)
    shown = render_preview(config, tokenizers[name], num_documents=1, color=False).split("\n")[1]
    assert shown.startswith("[<s>]|") == (name == "bos")
    assert shown.endswith("|[</s>]")


def test_open_data_tokenizer_that_begins_with_two_tokens_is_refused_by_auto_only(
    tmp_path: Path, tokenizers: dict[str, Path]
) -> None:
    with pytest.raises(ConfigError) as caught:
        open_data(make_config(tmp_path), tokenizers["two"])
    (problem,) = caught.value.problems
    assert problem.startswith("data.bos: ")
    assert "<|im_end|>, <s>" in problem
    assert open_data(make_config(tmp_path, bos=True), tokenizers["two"]).tokenizer


def test_open_data_tokenizer_without_bos_is_refused_by_true_only(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(tmp_path / "tokenizer", special=False)
    with pytest.raises(ConfigError) as caught:
        open_data(make_config(tmp_path, bos=True, eos=True), tokenizer)
    assert [line.partition(":")[0] for line in caught.value.problems] == ["data.bos", "data.eos"]
    assert open_data(make_config(tmp_path, eos=False), tokenizer).tokenizer


def test_keep_store_bos_store_of_the_former_default_is_kept_and_said(
    tmp_path: Path, tokenizers: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config, tokenizer = make_config(tmp_path), load_tokenizer(tokenizers["plain"])
    store = write_manifest(config, BOS)
    assert keep_store_bos(config, tokenizer, store) == make_config(tmp_path, bos=True)
    (message,) = caplog.messages
    assert str(store) in message
    assert "<s>" in message


@pytest.mark.parametrize(
    ("name", "recorded", "bos"),
    [
        ("bos", BOS, "auto"),  # the same store either way
        ("plain", None, "auto"),
        ("bos", None, "auto"),  # built with false: stale
        ("plain", 7, "auto"),  # another tokenizer's: stale
        ("plain", BOS, False),  # said by the config: stale
    ],
)
def test_keep_store_bos_changes_nothing_else(
    name: str, recorded: int | None, bos: object, tmp_path: Path, tokenizers: dict[str, Path]
) -> None:
    config, tokenizer = make_config(tmp_path, bos=bos), load_tokenizer(tokenizers[name])
    assert keep_store_bos(config, tokenizer, write_manifest(config, recorded)) is config
    shutil.rmtree(tmp_path / "store")
    assert keep_store_bos(config, tokenizer, Place.local(tmp_path / "store")) is config


def test_bos_is_auto_true_or_false(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"tokenizer: t\ndata: {{sources: [{{path: a}}], store_dir: {tmp_path}}}\n")
    found = [load(PrepareDataConfig, [str(file), f"data.bos={text}"]).data.bos
             for text in ("auto", "true", "false")]  # fmt: skip
    assert found == ["auto", True, False]
    with pytest.raises(ConfigError, match=r"data\.bos: .*auto"):
        load(PrepareDataConfig, [str(file), "data.bos=always"])


def test_tokenizers_of_this_file_differ_in_their_post_processor_only(
    tokenizers: dict[str, Path],
) -> None:
    loaded = [load_tokenizer(path) for path in tokenizers.values()]
    assert all(isinstance(tokenizer, PreTrainedTokenizerFast) for tokenizer in loaded)
    assert len({tuple(encode_text(tokenizer, ["the fox"])[0]) for tokenizer in loaded}) == 1
