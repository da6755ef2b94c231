"""Promise: of dirty input every row is accounted for, by reason, in bounded memory."""

import bz2
import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from raytune_llama.config.settings import ConfigError
from raytune_llama.data.build.text_corpus import TextUnitReader
from raytune_llama.data.build.unit_encoder import (
    UnitReader,
    UnitRecord,
    encode_unit,
    quarantine_place,
)
from raytune_llama.data.build.units import BuildPlan, plan_units
from raytune_llama.data.readers.config import SourceConfig
from raytune_llama.data.readers.sources import SourceFile, discover_files
from raytune_llama.data.store.manifest import SplitManifest
from raytune_llama.data.store.token_store import TokenSplit
from raytune_llama.storage.place import Place
from raytune_llama.tokenizer.loader import load_reference_encoder

LONG_LINE_MIB = 200
RANGE_BYTES = 1 << 30
MAX_RSS_BYTES = 1500 * 2**20

GOOD = [
    "人民日报一九九八年一月一日。",
    "the quick brown fox",
    "新年的钟声敲响了。全国人民欢度新年。",
]
ROWS = [{"text": text} for text in GOOD]


def lines(*rows: str, end: str = "\n") -> str:
    return "".join(row + end for row in rows)


def jsonl(*rows: Any) -> str:  # noqa: ANN401
    return lines(*(json.dumps(row, ensure_ascii=False) for row in rows))


CASES: dict[str, tuple[str, bytes, dict[str, Any], list[str], dict[str, int], int]] = {
    # file, content, settings, texts in the store, quarantined by reason, blank
    "bom": ("a.txt", b"\xef\xbb\xbf" + lines(*GOOD).encode(), {}, GOOD, {}, 0),
    "utf-16-le": ("a.txt", lines(*GOOD).encode("utf-16"), {}, GOOD, {}, 0),
    "utf-16-be": (
        "a.txt",
        ("\ufeff" + lines(*GOOD)).encode("utf-16-be"),
        {"encoding": "utf-16"},
        GOOD,
        {},
        0,
    ),
    "gbk detected": ("a.txt", lines(*GOOD * 5).encode("gbk"), {}, GOOD * 5, {}, 0),
    "gb18030 declared": (
        "a.jsonl",
        jsonl(*ROWS).encode("gb18030"),
        {"encoding": "gb18030"},
        GOOD,
        {},
        0,
    ),
    "invalid bytes": (
        "a.txt",
        lines(*GOOD).encode() + b"half \xe6\x96\n" + lines(*GOOD).encode(),
        {},
        GOOD * 2,
        {"invalid_bytes": 1},
        0,
    ),
    "nul": ("a.txt", lines(GOOD[0], "a\0b", GOOD[1]).encode(), {}, GOOD[:2], {"nul": 1}, 0),
    "lone surrogates": (
        "a.jsonl",
        (jsonl(ROWS[0]) + '{"text": "\\ud83d"}\n{"text": "\\ude00 x"}\n').encode(),
        {},
        GOOD[:1],
        {"lone_surrogate": 2},
        0,
    ),
    "crlf": ("a.txt", lines(*GOOD, end="\r\n").encode(), {}, GOOD, {}, 0),
    "list for lines": ("a.jsonl", json.dumps(ROWS).encode(), {}, GOOD, {}, 0),
    "lines for list": ("a.json", jsonl(*ROWS).encode(), {}, GOOD, {}, 0),
    "truncated list": ("a.json", json.dumps(ROWS).encode()[:-9], {}, GOOD[:2], {"truncated": 1}, 0),
    "truncated lines": (
        "a.jsonl",
        jsonl(*ROWS).encode()[:-9],
        {},
        GOOD[:2],
        {"invalid_json": 1},
        0,
    ),
    "bad line in the middle": (
        "a.jsonl",
        (jsonl(ROWS[0]) + '{"text": oops}\n' + jsonl(ROWS[1])).encode(),
        {},
        GOOD[:2],
        {"invalid_json": 1},
        0,
    ),
    "bad row in a list": (
        "a.json",
        f"[\n{json.dumps(ROWS[0])},\n{{'text': 'x'}},\n{json.dumps(ROWS[1])}\n]".encode(),
        {},
        GOOD[:2],
        {"invalid_json": 1},
        0,
    ),
    "fields": (
        "a.jsonl",
        jsonl(ROWS[0], {"body": "x"}, {"text": None}, {"text": 3}, {"text": ["x"]}, ["x"]).encode()
        + b'{"text": "a", "text": "b"}\n',
        {},
        GOOD[:1],
        {
            "missing_field": 1,
            "null_field": 1,
            "wrong_type": 2,
            "not_an_object": 1,
            "duplicate_key": 1,
        },
        0,
    ),
    "aliases": (
        "a.json",
        json.dumps([{"output": GOOD[0]}, {"输出": GOOD[1]}, {"other": "x"}]).encode(),
        {"text_field": "output", "text_aliases": ("输出",)},
        GOOD[:2],
        {"missing_field": 1},
        0,
    ),
    "blank": ("a.txt", lines("", GOOD[0], " \u3000", "", GOOD[1]).encode(), {}, GOOD[:2], {}, 3),
    "gzip": ("a.txt.gz", gzip.compress(lines(*GOOD).encode()), {}, GOOD, {}, 0),
    "bz2": ("a.jsonl.bz2", bz2.compress(jsonl(*ROWS).encode()), {}, GOOD, {}, 0),
}


def encode(folder: Path, tokenizer_dir: Path, **settings: Any) -> tuple[BuildPlan, UnitRecord]:  # noqa: ANN401
    files = discover_files((SourceConfig(path=str(folder / "corpus"), **settings),))
    return encode_whole(folder, files, TextUnitReader(load_reference_encoder(tokenizer_dir)))


def encode_whole(
    folder: Path, files: list[SourceFile], reader: UnitReader
) -> tuple[BuildPlan, UnitRecord]:
    """Encode files as one unit."""
    work = Place.local(folder / "work")
    plan = BuildPlan(
        work_dir=work,
        store_dir=work / "store",
        files=files,
        bos_id=None,
        eos_id=None if reader.has_targets else 1,
        dtype="uint16",
        validation_fraction=0.0,
    )
    plan.store_dir.path.mkdir(parents=True)
    plan.units_dir.path.mkdir()
    (unit,) = plan_units(plan.files, RANGE_BYTES)
    return plan, encode_unit(unit, plan, reader)


@pytest.mark.parametrize("case", CASES)
def test_dirty_input_is_accounted_for_by_reason(
    case: str, tmp_path: Path, tokenizer_dir: Path
) -> None:
    name, data, settings, texts, bad, blank = CASES[case]
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / name).write_bytes(data)
    (tmp_path / "corpus" / f"empty.{name.partition('.')[2]}").touch()
    plan, record = encode(tmp_path, tokenizer_dir, **settings)
    shard = record.shards["train"]
    assert shard is not None
    split = TokenSplit(plan.store_dir, SplitManifest.from_shards([shard]))
    ids = split.tokens(0, split.num_tokens).tolist()
    wanted = [[*one.tolist(), 1] for one in load_reference_encoder(tokenizer_dir).encode(texts)]
    assert ids == [id_ for one in wanted for id_ in one]
    assert record.rows.quarantined == bad
    assert record.rows.skipped.get("blank", 0) == blank
    assert record.rows.is_balanced
    assert record.rows.total == len(texts) + sum(bad.values()) + blank
    listed = quarantine_place(plan_units(plan.files, RANGE_BYTES)[0], plan)
    reasons: Counter[str] = Counter()
    if record.quarantine:
        for line in listed.read_bytes().decode().splitlines():
            row = json.loads(line)
            reasons[row["reason"]] += 1
            assert row["file"] == name
            assert data[row["offset"] :] or name.endswith((".gz", ".bz2"))
    assert reasons == bad


@pytest.mark.parametrize(
    ("name", "data", "settings", "problem"),
    [
        ("a.jsonl", b"[{}]", {"format": "jsonl"}, "set format to json or auto"),
        ("a.json", b'{"text": "x"}\n{"text": "y"}\n', {"format": "json"}, "set format to jsonl"),
        ("a.txt", "中文".encode("utf-16-le") * 3 + b"a\0" * 9, {}, "set encoding to utf-16-le"),
        ("a.txt.gz", b"plain text", {}, "a.txt.gz: not gzip"),
        (
            "a.txt",
            b"\xef\xbb\xbfx",
            {"encoding": "gb18030"},
            "byte order mark of utf-8, but encoding is",
        ),
    ],
)
def test_file_that_contradicts_its_config_is_refused_before_any_work(
    name: str, data: bytes, settings: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=problem):
        discover_files((SourceConfig(path=str(tmp_path), **settings),))


MEASURE = """
import re, sys
from pathlib import Path
from tests.data.readers.test_dirty import encode
plan, record = encode(Path(sys.argv[1]), Path(sys.argv[2]))
# Not getrusage: its peak is also that of the process which started this one.
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
print(record.rows.documents, record.rows.num_quarantined, peak)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_one_line_of_200_mb_stays_in_bounded_memory(
    name: str, tmp_path: Path, tokenizer_dir: Path
) -> None:
    (tmp_path / "corpus").mkdir()
    unit = "新年的钟声敲响了 the quick brown fox, "
    text = unit * (LONG_LINE_MIB * 2**20 // len(unit.encode()))
    row = text if name == "a.txt" else json.dumps({"text": text}, ensure_ascii=False)
    with (tmp_path / "corpus" / name).open("w") as file:
        file.write(f"[{row}]" if name == "a.json" else row)
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(tokenizer_dir)]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    documents, bad, peak = map(int, done.stdout.split())
    assert (documents, bad) == (1, 0)
    assert peak < MAX_RSS_BYTES
