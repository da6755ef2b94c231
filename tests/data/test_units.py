"""Promise: a unit's bytes depend on its file alone, and the ids are those of Hugging Face."""

from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from raytune_llama.data.documents import SourceError
from raytune_llama.data.manifest import SplitManifest
from raytune_llama.data.sources import SourceConfig, discover_files
from raytune_llama.data.store import TokenSplit
from raytune_llama.data.units import (
    EncodePlan,
    Unit,
    UnitRecord,
    UnitStoppedError,
    encode_unit,
    finished_record,
    split_of,
)
from raytune_llama.files import sha256_file
from raytune_llama.model.tokenizer import load_tokenizer
from raytune_llama.storage import Place

TEXT = "The quick brown fox.\n\n人民日报 jumps\nover </s> the <|im_end|> lazy <s> dog\n"


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tokenizer_dir)


def make_unit(path: Path, index: int = 0) -> Unit:
    (file,) = discover_files((SourceConfig(path=str(path)),))
    return Unit(index, file, sha256_file(path))


def make_plan(work_dir: Path, *, validation_fraction: float = 0.0) -> EncodePlan:
    plan = EncodePlan(
        work_dir=work_dir,
        bos_id=0,
        eos_id=1,
        dtype="uint16",
        validation_fraction=validation_fraction,
    )
    plan.store_dir.mkdir(parents=True, exist_ok=True)
    plan.units_dir.mkdir(exist_ok=True)
    return plan


def split_of_record(plan: EncodePlan, record: UnitRecord) -> TokenSplit:
    shard = record.shards["train"]
    assert shard
    return TokenSplit(Place.local(plan.store_dir), SplitManifest.of([shard]))


def documents_of(split: TokenSplit) -> list[list[int]]:
    starts = [*split.document_starts(0, split.num_tokens).tolist(), split.num_tokens]
    return [split.tokens(*pair).tolist() for pair in pairwise(starts)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT)
    return path


def test_encode_unit_plain_text_ids_equal_hugging_face(
    tmp_path: Path, corpus: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    plan = make_plan(tmp_path / "work")
    split = split_of_record(plan, encode_unit(make_unit(corpus), plan, tokenizer))
    first, second, _ = documents_of(split)
    for got, text in ((first, "The quick brown fox."), (second, "人民日报 jumps")):
        assert got == [0, *tokenizer.encode(text, add_special_tokens=False), 1]


def test_encode_unit_control_tokens_in_text_stay_text(
    tmp_path: Path, corpus: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    plan = make_plan(tmp_path / "work")
    split = split_of_record(plan, encode_unit(make_unit(corpus), plan, tokenizer))
    ids = documents_of(split)[2][1:-1]
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids) == "over </s> the <|im_end|> lazy <s> dog"


def test_encode_unit_blank_lines_are_counted_and_bytes_are_the_texts(
    tmp_path: Path, corpus: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    plan = make_plan(tmp_path / "work")
    record = encode_unit(make_unit(corpus), plan, tokenizer)
    assert record.skipped == {"blank": 1, "no_tokens": 0}
    split = split_of_record(plan, record)
    assert split.num_documents == 3
    assert split.num_bytes == len(TEXT.replace("\n", "").encode())


def test_encode_unit_finished_is_recognised_until_anything_changes(
    tmp_path: Path, corpus: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    plan, unit = make_plan(tmp_path / "work"), make_unit(corpus)
    assert finished_record(unit, plan) is None
    record = encode_unit(unit, plan, tokenizer)
    assert finished_record(unit, plan) == record
    assert finished_record(Unit(0, unit.file, "other"), plan) is None
    shard = plan.store_dir / "train-00000.arrow"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert finished_record(unit, plan) is None


def test_encode_unit_torn_record_is_encoded_again(
    tmp_path: Path, corpus: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    plan, unit = make_plan(tmp_path / "work"), make_unit(corpus)
    record = encode_unit(unit, plan, tokenizer)
    file = plan.units_dir / "00000.json"
    file.write_bytes(file.read_bytes()[:40])
    assert finished_record(unit, plan) is None
    assert encode_unit(unit, plan, tokenizer) == record


def test_encode_unit_file_changed_meanwhile_is_refused_without_a_shard(
    tmp_path: Path, corpus: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    plan, unit = make_plan(tmp_path / "work"), make_unit(corpus)
    corpus.write_text("other text\n")
    with pytest.raises(SourceError, match=r"corpus\.txt was changed"):
        encode_unit(unit, plan, tokenizer)
    assert list(plan.store_dir.iterdir()) == []


def test_encode_unit_third_crash_refuses_the_file_by_name(
    tmp_path: Path, corpus: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    class CrashError(BaseException):
        pass

    class CrashingTokenizer:
        def __call__(self, *_: object, **__: object) -> None:
            raise CrashError

    plan, unit = make_plan(tmp_path / "work"), make_unit(corpus)
    for _ in range(3):
        with pytest.raises(CrashError):
            encode_unit(unit, plan, CrashingTokenizer())  # pyright: ignore[reportArgumentType]
    with pytest.raises(SourceError, match=r"corpus\.txt: encoding it ended the process 3 times"):
        encode_unit(unit, plan, tokenizer)


def test_encode_unit_after_another_failed_gives_up(
    tmp_path: Path, corpus: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    plan = make_plan(tmp_path / "work")
    plan.stop_file.touch()
    with pytest.raises(UnitStoppedError):
        encode_unit(make_unit(corpus), plan, tokenizer)
    assert list(plan.store_dir.iterdir()) == []


@given(text=st.text(max_size=20), fraction=st.floats(0, 1, exclude_max=True))
def test_split_of_any_text_follows_the_first_64_bits_of_its_hash(
    text: str, fraction: float
) -> None:
    try:
        data = text.encode()
    except UnicodeEncodeError:
        return
    share = int(sha256(data).hexdigest()[:16], 16) / 2**64
    assert split_of(text, fraction) == ("validation" if share < fraction else "train")


def test_split_of_many_texts_keeps_the_fraction() -> None:
    sides = [split_of(f"document {number}", 0.1) for number in range(10_000)]
    # Five standard deviations of a binomial count are 150.
    assert abs(sides.count("validation") - 1000) < 150
    assert {split_of("same", 0.0) for _ in range(3)} == {"train"}
