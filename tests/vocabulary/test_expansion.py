"""Promises: a grown model is whole, says what was done, and text that it knows keeps its ids."""

# ruff: noqa: RUF001  # Chinese text

import copy
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from sentencepiece.sentencepiece_model_pb2 import (
    ModelProto,  # pyright: ignore[reportAttributeAccessIssue]  # made at import
)
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from raytune_llama.config.settings import ConfigError, from_dict
from raytune_llama.data.readers.config import SourceConfig
from raytune_llama.model.vocab import check_vocabulary, new_ids
from raytune_llama.tokenizer.loader import load_reference_encoder, load_tokenizer
from raytune_llama.tokenizer.reference import SentencePieceReference
from raytune_llama.vocabulary import expansion as vocabulary
from raytune_llama.vocabulary.config import ExpandVocabConfig
from raytune_llama.vocabulary.expansion import expand_vocabulary
from raytune_llama.vocabulary.parity import ParityReport
from raytune_llama.vocabulary.samples import sample_documents
from tests.tokenizer.references import corpus_pieces, pieces_proto

PAD = "[PAD]"
ENGLISH = ("The quick brown fox jumps over the lazy dog; it's 2026!", "We'll see 12345 of them.")


def chinese(num: int, seed: int = 0) -> list[str]:
    chosen = random.Random(seed)
    words = [
        "".join(chosen.choices("天地玄黄宇宙洪荒日月盈昃辰宿列张", k=k)) for k in (2, 3, 4) * 30
    ]
    return ["，".join(chosen.choices(words, k=10)) for _ in range(num)]


@pytest.fixture
def corpora(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "new.txt").write_text("\n".join(chinese(800)))
    (tmp_path / "old.txt").write_text("\n".join(ENGLISH * 40))
    return {
        "sources": [{"path": str(tmp_path / "new.txt")}],
        "old_sources": [{"path": str(tmp_path / "old.txt")}],
    }


@pytest.fixture(params=["pieces", "merges"])
def base(request: pytest.FixtureRequest, tmp_path: Path, tokenizer_dir: Path) -> Path:
    """A model with either kind of tokenizer."""
    return make_base(tmp_path / "base", request.param, tokenizer_dir)


def make_base(path: Path, kind: str, tokenizer_dir: Path) -> Path:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=800, **sizes, **heads)).save_pretrained(path)
    if kind == "merges":
        shutil.copytree(tokenizer_dir, path, dirs_exist_ok=True)
    else:
        proto = pieces_proto(corpus_pieces(tied=False))
        (path / "tokenizer.model").write_bytes(proto.SerializeToString())
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        settings = {"tokenizer_class": "LlamaTokenizer", **names}
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def expand(base: Path, corpora: dict[str, Any], **fields: Any) -> Path:  # noqa: ANN401
    target = base.parent / "grown"
    values = {"model": str(base), "target": str(target), **corpora}
    values["training"] = {"num_tokens": 300}
    expand_vocabulary(from_dict(ExpandVocabConfig, values | fields))
    return target


def manifest(target: Path) -> dict[str, Any]:
    return json.loads((target / "manifest.json").read_text())


def test_grown_model_loads_in_plain_transformers_and_says_what_was_done(
    base: Path, corpora: dict[str, Any]
) -> None:
    target = expand(base, corpora, pad_token=PAD, growth={"rows_multiple_of": 64})
    model = AutoModelForCausalLM.from_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    content = manifest(target)["expanded"]
    assert content["num_ids"] == content["num_old_ids"] + content["added"]["tokens"] + 1
    assert len(tokenizer) == content["num_ids"]
    assert tokenizer.pad_token_id == model.config.pad_token_id == content["num_ids"] - 1
    assert len(model.lm_head.weight) % 64 == 0
    new, old = content["fertility"]["new text"], content["fertility"]["old text"]
    assert new["after"]["num_tokens"] < 0.6 * new["before"]["num_tokens"]
    assert new["after"]["num_characters"] == new["before"]["num_characters"]
    assert old["after"] == old["before"]
    assert old["texts_with_other_ids"] == 0
    assert (target / "fertility.png").stat().st_size > 1000
    reference = load_reference_encoder(target)
    text = chinese(1, seed=5)[0]
    assert tokenizer.decode(reference.encode([text])[0]).strip() == text


def test_old_ids_mean_what_they_meant_and_english_keeps_its_ids(
    base: Path, corpora: dict[str, Any]
) -> None:
    target = expand(base, corpora)
    before, after = load_tokenizer(base).get_vocab(), load_tokenizer(target).get_vocab()
    assert {token: after[token] for token in before} == before
    pairs = zip(
        load_reference_encoder(base).encode(ENGLISH),
        load_reference_encoder(target).encode(ENGLISH),
        strict=True,
    )
    assert all(old.tolist() == new.tolist() for old, new in pairs)


def test_a_tokenizer_alone_is_grown_without_a_model(base: Path, corpora: dict[str, Any]) -> None:
    for path in base.glob("*model*.safetensors"):
        path.unlink()
    (base / "config.json").unlink()
    target = expand(base, corpora)
    assert manifest(target)["kind"] == "tokenizer"
    assert not (target / "config.json").exists()
    assert len(load_tokenizer(target)) == manifest(target)["expanded"]["num_ids"]


def test_sentencepiece_and_tokenizers_agree_on_a_grown_vocabulary(
    tmp_path: Path, tokenizer_dir: Path, corpora: dict[str, Any]
) -> None:
    target = expand(make_base(tmp_path / "base", "pieces", tokenizer_dir), corpora)
    parity = manifest(target)["expanded"]["parity"]
    assert parity["texts"] > 800
    assert parity["differing"] == 0
    assert isinstance(load_reference_encoder(target), SentencePieceReference)


def test_pieces_on_which_libraries_differ_are_left_out(
    tmp_path: Path,
    tokenizer_dir: Path,
    corpora: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = make_base(tmp_path / "base", "pieces", tokenizer_dir)
    compared: list[int] = []

    def compare(directory: Path, texts: list[str]) -> ParityReport:
        if directory == base:
            return ParityReport(num_texts=0, num_bytes=0, differing=(), ids=frozenset())
        size = len(load_tokenizer(directory))
        compared.append(size)
        differs = len(compared) == 1
        return ParityReport(
            num_texts=len(texts),
            num_bytes=1,
            differing=("text",) * differs,
            ids=frozenset({5, size - 1}) if differs else frozenset(),
        )

    monkeypatch.setattr(vocabulary, "compare_libraries", compare)
    target = expand(base, corpora)
    added = manifest(target)["expanded"]["added"]
    assert compared == [len(load_tokenizer(target)) + 1, len(load_tokenizer(target))]
    assert len(added["differing"]) == added["left_out"]["chosen"] == 1


def test_given_pieces_tied_as_the_seeds_do_are_all_there(
    tmp_path: Path, tokenizer_dir: Path, corpora: dict[str, Any]
) -> None:
    base = make_base(tmp_path / "base", "pieces", tokenizer_dir)
    given = pieces_proto(dict.fromkeys(("龘", "靐", "龘靐龘", "qu"), -1.0))
    (tmp_path / "given.model").write_bytes(given.SerializeToString())
    target = expand(
        base,
        corpora,
        pieces=str(tmp_path / "given.model"),
        scores="tied",
        keep_ascii=True,
        keep_unreachable=True,
    )
    pieces = ModelProto.FromString((target / "tokenizer.model").read_bytes()).pieces
    known = ModelProto.FromString((base / "tokenizer.model").read_bytes()).pieces
    wanted = [
        piece for piece in ("龘", "靐", "龘靐龘", "qu") if piece not in {p.piece for p in known}
    ]
    assert [(p.piece, p.score) for p in pieces[len(known) :]] == [(name, 0) for name in wanted]
    assert manifest(target)["expanded"]["added"]["unreachable"] == ["龘靐龘"]


def test_every_wrong_input_is_named_at_once_and_nothing_is_left(
    base: Path, corpora: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "grown").mkdir()
    (tmp_path / "grown" / "file").write_text("")
    (tmp_path / "no.model").write_text("text")
    with pytest.raises(ConfigError) as caught:
        expand(
            base,
            corpora | {"sources": [{"path": str(tmp_path / "none.txt")}]},
            pieces=str(tmp_path / "no.model"),
        )
    problems = "\n".join(caught.value.problems)
    for part in ("sources.0.path", "pieces: ", "target: "):
        assert part in problems
    assert [path.name for path in (tmp_path / "grown").iterdir()] == ["file"]


def test_a_tokenizer_with_tokens_behind_its_pieces_is_refused(
    tmp_path: Path, tokenizer_dir: Path, corpora: dict[str, Any]
) -> None:
    base = make_base(tmp_path / "base", "pieces", tokenizer_dir)
    tokenizer = copy.deepcopy(load_tokenizer(base))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(base)
    with pytest.raises(ConfigError, match=r"1 added tokens after its \d+ pieces"):
        expand(base, corpora)


def test_too_little_text_leaves_nothing_behind(base: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.txt").write_text("天地玄黄\n")
    if (base / "tokenizer.model").exists():
        with pytest.raises(ValueError, match=r"training\.num_tokens"):
            expand(base, {"sources": [{"path": str(tmp_path / "tiny.txt")}]})
        assert not (tmp_path / "grown").exists()


def test_a_sample_comes_from_all_over_a_corpus_and_keeps_its_size(tmp_path: Path) -> None:
    lines = [f"{number:07d} " + "x" * 192 for number in range(40_000)]
    (tmp_path / "big.txt").write_text("\n".join(lines))
    sources = (SourceConfig(path=str(tmp_path / "big.txt")),)
    sample = sample_documents(sources, 3 << 20, held_out=0.1)
    found = sorted(int(text[:7]) for text in sample.texts + sample.held_out)
    assert 2.5 < sample.num_bytes / 2**20 < 4.5
    assert found[0] < 6000
    assert found[-1] > 34_000
    assert len(set(found)) == len(found)
    assert 0.08 < len(sample.held_out) / len(found) < 0.12
    whole = sample_documents(sources, 1 << 30)
    assert whole.texts == lines
    assert (whole.held_out, whole.num_bad) == ([], 0)


def test_rows_of_a_model_that_was_only_grown_count_as_untrained(
    base: Path, corpora: dict[str, Any]
) -> None:
    num_old, target = len(load_tokenizer(base)), expand(base, corpora)
    num_new = len(load_tokenizer(target)) - num_old
    fit = check_vocabulary(num_old + num_new, target, target)
    assert (fit.num_base_ids, fit.num_new_ids) == (num_old, num_new)
    assert new_ids(target, target) == range(num_old, num_old + num_new)
    assert not new_ids(base, base)
