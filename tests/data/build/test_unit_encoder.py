"""Promise: a unit's bytes depend on its file alone, and the ids are those of Hugging Face."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from raytune_llama.data.build.text_corpus import TextUnitReader, choose_splits
from raytune_llama.data.build.unit_encoder import (
    UnitRecord,
    UnitStoppedError,
    encode_unit,
    finished_record,
    quarantine_place,
)
from raytune_llama.data.build.units import BuildPlan, WorkUnit, plan_units
from raytune_llama.data.filters.config import CleaningConfig
from raytune_llama.data.readers.config import SourceConfig
from raytune_llama.data.readers.rows import SourceError
from raytune_llama.data.readers.sources import discover_files
from raytune_llama.data.store.manifest import RowCounts, SplitManifest
from raytune_llama.data.store.token_store import TokenSplit
from raytune_llama.storage.place import Place
from raytune_llama.tokenizer.loader import build_reference_encoder, load_tokenizer
from raytune_llama.tokenizer.reference import TextEncoder

TEXT = "The quick brown fox.\n\n人民日报 jumps\nover </s> the <|im_end|> lazy <s> dog\n"


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(tokenizer_dir)


@pytest.fixture(scope="module")
def encoder(tokenizer: PreTrainedTokenizerFast) -> TextEncoder:
    return build_reference_encoder(tokenizer)


def make_plan(work_dir: Path, corpus: Path, **fields: Any) -> BuildPlan:  # noqa: ANN401
    work = Place.local(work_dir)
    plan = BuildPlan(
        work_dir=work,
        store_dir=work / "store",
        files=discover_files((SourceConfig(path=str(corpus)),)),
        bos_id=0,
        eos_id=1,
        dtype="uint16",
        validation_fraction=0.0,
        **fields,
    )
    plan.store_dir.path.mkdir(parents=True, exist_ok=True)
    plan.units_dir.path.mkdir(exist_ok=True)
    return plan


def unit_of(plan: BuildPlan) -> WorkUnit:
    (unit,) = plan_units(plan.files, 1 << 20)
    return unit


def split_of_record(plan: BuildPlan, record: UnitRecord) -> TokenSplit:
    shard = record.shards["train"]
    assert shard
    return TokenSplit(plan.store_dir, SplitManifest.from_shards([shard]))


def documents_of(split: TokenSplit) -> list[list[int]]:
    starts = [*split.document_starts(0, split.num_tokens).tolist(), split.num_tokens]
    return [split.tokens(*pair).tolist() for pair in pairwise(starts)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT)
    return path


def test_encode_unit_plain_text_ids_equal_hugging_face(
    tmp_path: Path, corpus: Path, tokenizer: PreTrainedTokenizerFast, encoder: TextEncoder
) -> None:
    plan = make_plan(tmp_path / "work", corpus)
    split = split_of_record(plan, encode_unit(unit_of(plan), plan, TextUnitReader(encoder)))
    first, second, _ = documents_of(split)
    for got, text in ((first, "The quick brown fox."), (second, "人民日报 jumps")):
        assert got == [0, *tokenizer.encode(text, add_special_tokens=False), 1]


def test_encode_unit_control_tokens_in_text_stay_text(
    tmp_path: Path, corpus: Path, tokenizer: PreTrainedTokenizerFast, encoder: TextEncoder
) -> None:
    plan = make_plan(tmp_path / "work", corpus)
    split = split_of_record(plan, encode_unit(unit_of(plan), plan, TextUnitReader(encoder)))
    ids = documents_of(split)[2][1:-1]
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids) == "over </s> the <|im_end|> lazy <s> dog"


def test_encode_unit_blank_lines_are_counted_and_bytes_are_the_texts(
    tmp_path: Path, corpus: Path, encoder: TextEncoder
) -> None:
    plan = make_plan(tmp_path / "work", corpus)
    record = encode_unit(unit_of(plan), plan, TextUnitReader(encoder))
    assert record.rows == RowCounts(total=4, documents=3, skipped={"blank": 1})
    split = split_of_record(plan, record)
    assert split.num_documents == 3
    assert split.num_bytes == len(TEXT.replace("\n", "").encode())
    lengths = [len(ids) for ids in documents_of(split)]
    # Of the text's own tokens, without those around it.
    assert record.lengths[: max(lengths).bit_length()] == [
        sum(2**power <= length - 2 < 2 ** (power + 1) for length in lengths)
        for power in range(max(lengths).bit_length())
    ]


def test_encode_unit_bad_rows_are_counted_and_listed(tmp_path: Path, encoder: TextEncoder) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_bytes(b"good\nbad \xff\n\nalso good\nnul\0\n")
    plan = make_plan(tmp_path / "work", corpus)
    unit = unit_of(plan)
    record = encode_unit(unit, plan, TextUnitReader(encoder))
    bad = {"invalid_bytes": 1, "nul": 1}
    assert record.rows == RowCounts(total=5, documents=2, skipped={"blank": 1}, quarantined=bad)
    lines = quarantine_place(unit, plan).path.read_text().splitlines()
    assert [(row["file"], row["line"], row["offset"]) for row in map(json.loads, lines)] == [
        ("corpus.txt", 2, 5),
        ("corpus.txt", 5, 22),
    ]


def test_encode_unit_cleaning_counts_what_it_leaves_out_and_encodes_what_it_changes(
    tmp_path: Path, encoder: TextEncoder
) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("e\u0301t\u00e9 is long enough\nshort\nanother text that stays\n")
    cleaning = CleaningConfig(normalization="NFC", min_characters=10)
    plan = make_plan(tmp_path / "work", corpus, cleaning=cleaning)
    record = encode_unit(unit_of(plan), plan, TextUnitReader(encoder))
    assert record.rows == RowCounts(total=3, documents=2, skipped={"too_short": 1})
    split = split_of_record(plan, record)
    texts = ["\u00e9t\u00e9 is long enough", "another text that stays"]
    assert documents_of(split) == [[0, *ids.tolist(), 1] for ids in encoder.encode(texts)]
    assert split.num_bytes == sum(len(text.encode()) for text in texts)


def test_encode_unit_file_that_is_something_else_is_given_up_early(
    tmp_path: Path, encoder: TextEncoder
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("not JSON\n" * 3000)
    plan = make_plan(tmp_path / "work", corpus)
    with pytest.raises(SourceError, match=r"corpus\.jsonl: 3000 of its first 3000 rows"):
        encode_unit(unit_of(plan), plan, TextUnitReader(encoder))


def test_encode_unit_finished_is_recognised_until_anything_changes(
    tmp_path: Path, corpus: Path, encoder: TextEncoder
) -> None:
    plan = make_plan(tmp_path / "work", corpus)
    unit = unit_of(plan)
    assert finished_record(unit, plan) is None
    record = encode_unit(unit, plan, TextUnitReader(encoder))
    assert finished_record(unit, plan) == record
    assert finished_record(replace(unit, key="other"), plan) is None
    shard = plan.store_dir.path / "train-00000.arrow"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert finished_record(unit, plan) is None


def test_encode_unit_of_a_file_that_was_written_again_is_another_unit(
    tmp_path: Path, corpus: Path
) -> None:
    key = unit_of(make_plan(tmp_path / "work", corpus)).key
    assert unit_of(make_plan(tmp_path / "work", corpus)).key == key
    stat = corpus.stat()
    corpus.write_text(TEXT.upper())
    os.utime(corpus, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert unit_of(make_plan(tmp_path / "work", corpus)).key != key


def test_encode_unit_torn_record_is_encoded_again(
    tmp_path: Path, corpus: Path, encoder: TextEncoder
) -> None:
    plan = make_plan(tmp_path / "work", corpus)
    unit = unit_of(plan)
    record = encode_unit(unit, plan, TextUnitReader(encoder))
    file = plan.units_dir.path / "00000.json"
    file.write_bytes(file.read_bytes()[:40])
    assert finished_record(unit, plan) is None
    assert encode_unit(unit, plan, TextUnitReader(encoder)) == record


def test_encode_unit_file_changed_meanwhile_is_refused_without_a_shard(
    tmp_path: Path, corpus: Path, encoder: TextEncoder
) -> None:
    plan = make_plan(tmp_path / "work", corpus)
    corpus.write_text("other text\n")
    with pytest.raises(SourceError, match=r"corpus\.txt was changed"):
        encode_unit(unit_of(plan), plan, TextUnitReader(encoder))
    assert list(plan.store_dir.path.iterdir()) == []


def test_encode_unit_third_crash_refuses_the_file_by_name(
    tmp_path: Path, corpus: Path, encoder: TextEncoder
) -> None:
    class CrashError(BaseException):
        pass

    class CrashingEncoder:
        name = version = "crash"

        def encode(self, texts: Sequence[str]) -> list[Any]:  # noqa: ARG002
            raise CrashError

    plan = make_plan(tmp_path / "work", corpus)
    unit = unit_of(plan)
    for _ in range(3):
        with pytest.raises(CrashError):
            encode_unit(unit, plan, TextUnitReader(CrashingEncoder()))
    with pytest.raises(SourceError, match=r"corpus\.txt.*: encoding it crashed .* 3 times"):
        encode_unit(unit, plan, TextUnitReader(encoder))


def test_encode_unit_after_another_failed_gives_up(
    tmp_path: Path, corpus: Path, encoder: TextEncoder
) -> None:
    plan = make_plan(tmp_path / "work", corpus)
    plan.stop_file.write_bytes(b"")
    with pytest.raises(UnitStoppedError):
        encode_unit(unit_of(plan), plan, TextUnitReader(encoder))
    assert list(plan.store_dir.path.iterdir()) == []


@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=20), max_size=5),
    fraction=st.floats(0, 1, exclude_max=True),
)
def test_choose_sides_any_text_follows_the_first_64_bits_of_its_hash(
    texts: list[str], fraction: float
) -> None:
    shares = [int(sha256(text.encode()).hexdigest()[:16], 16) / 2**64 for text in texts]
    sides = choose_splits(texts, fraction)
    assert sides["train"].tolist() == [share >= fraction for share in shares]
    if fraction:
        assert sides["validation"].tolist() == [share < fraction for share in shares]


def test_choose_sides_of_many_texts_keeps_the_fraction() -> None:
    sides = choose_splits([f"document {number}" for number in range(10_000)], 0.1)
    # Five standard deviations of a binomial count are 150.
    assert abs(sides["validation"].sum() - 1000) < 150
