"""Conversations change their format, every row is accounted for, and CALM's files are exact."""

import json
from pathlib import Path
from typing import Any

import pytest

from raytune_llama.cli import VERBS
from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import ConfigError, from_dict
from raytune_llama.data.config import ConvertDataConfig
from raytune_llama.data.conversion import convert_data
from raytune_llama.data.readers.config import ConversationSource
from raytune_llama.data.readers.conversations import ConversationCounts, read_conversations
from raytune_llama.data.readers.rows import SourceError

ALPACA = [
    {"instruction": "写诗", "input": "", "output": "春眠"},
    {"instruction": "加法", "input": "1 + 1", "output": "2"},
    {"id": "own", "instruction": "q", "input": "", "output": "a"},
]
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def write(path: Path, *rows: Any) -> Path:  # noqa: ANN401
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return path


def convert(source: Path, target: Path, **fields: Any) -> None:  # noqa: ANN401
    read = {name: fields.pop(name) for name in ("input_separator",) if name in fields}
    sources = [{"path": str(source), "format": fields.pop("declared", "auto")} | read]
    convert_data(from_dict(ConvertDataConfig, {"sources": sources, "target": str(target)} | fields))


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def test_calm_conversion_is_exact_to_the_byte(tmp_path: Path) -> None:
    source = write(tmp_path / "calm.jsonl", *ALPACA)
    convert(source, tmp_path / "out", input_separator="", id_prefix="calm")
    assert (tmp_path / "out/train.jsonl").read_bytes().decode() == (
        '{"id": "calm-1", "conversations": [{"from": "human", "value": "写诗"}, '
        '{"from": "assistant", "value": "春眠"}]}\n'
        '{"id": "calm-2", "conversations": [{"from": "human", "value": "加法1 + 1"}, '
        '{"from": "assistant", "value": "2"}]}\n'
        '{"id": "own", "conversations": [{"from": "human", "value": "q"}, '
        '{"from": "assistant", "value": "a"}]}\n'
    )


def test_number_in_an_id_counts_bad_rows_too(tmp_path: Path) -> None:
    bad = {"instruction": "q", "input": "", "output": ""}
    source = write(tmp_path / "calm.jsonl", ALPACA[0], bad, "{broken", "", ALPACA[1])
    convert(source, tmp_path / "out", id_prefix="n", max_bad_fraction=0.5)
    ids = [json.loads(line)["id"] for line in lines(tmp_path / "out/train.jsonl")]
    assert ids == ["n-1", "n-4"]


def test_bad_rows_are_told_with_file_line_and_reason(tmp_path: Path) -> None:
    bad = {"instruction": "q", "input": "", "output": ""}
    write(tmp_path / "in/a.jsonl", *ALPACA)
    write(tmp_path / "in/b.jsonl", ALPACA[0], bad, "{broken", {"text": "x"})
    convert(tmp_path / "in", tmp_path / "out", max_bad_fraction=0.5)
    told = [json.loads(line) for line in lines(tmp_path / "out/quarantine.jsonl")]
    assert [(row["file"], row["line"], row["row"], row["reason"]) for row in told] == [
        ("b.jsonl", 2, 5, "empty_target"),
        ("b.jsonl", 3, 6, "invalid_json"),
        ("b.jsonl", 4, 7, "missing_field"),
    ]
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["num_rows"] == 7
    assert manifest["written"] == {"train": 4}
    assert manifest["quarantined"] == {"empty_target": 1, "invalid_json": 1, "missing_field": 1}


def test_too_many_bad_rows_leave_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", ALPACA[0], "{broken")
    with pytest.raises(SourceError, match=r"^max_bad_fraction: 1 of 2(.|\n)*invalid_json"):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("declared", ["auto", "alpaca"])
def test_folder_of_two_formats_is_refused_with_file_and_line(tmp_path: Path, declared: str) -> None:
    write(tmp_path / "in/a.jsonl", *ALPACA)
    write(tmp_path / "in/b.jsonl", ALPACA[0], CHAT)
    with pytest.raises(SourceError, match=r"b\.jsonl: line 2: the row is messages, but .*alpaca"):
        convert(tmp_path / "in", tmp_path / "out", declared=declared)


def test_file_of_no_format_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", {"text": "x"}, {"text": "y"})
    with pytest.raises(SourceError, match=r"^sources\.0\.fields: no row"):
        convert(source, tmp_path / "out", max_bad_fraction=1.0)


def test_head_is_held_out_in_order(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", *ALPACA)
    convert(source, tmp_path / "out", split={"head": 2}, id_prefix="n")
    held = [json.loads(line)["id"] for line in lines(tmp_path / "out/dev.jsonl")]
    rest = [json.loads(line)["id"] for line in lines(tmp_path / "out/train.jsonl")]
    assert (held, rest) == (["n-1", "n-2"], ["own"])


def test_hash_split_depends_on_the_text_alone(tmp_path: Path) -> None:
    rows = [{"instruction": f"q{n}", "input": "", "output": f"a{n}"} for n in range(200)]
    sides: list[set[str]] = []
    for name, listed in (("a", rows), ("b", [*rows[::-1], *rows[:50]])):
        source = write(tmp_path / f"{name}.jsonl", *listed)
        convert(source, tmp_path / name, split={"hash_fraction": 0.2}, id_prefix=name)
        held = [json.loads(line) for line in lines(tmp_path / name / "dev.jsonl")]
        sides.append({row["conversations"][0]["value"] for row in held})
        assert len(lines(tmp_path / name / "train.jsonl")) + len(held) == len(listed)
    assert sides[0] == sides[1]
    assert 15 <= len(sides[0]) <= 65


@pytest.mark.parametrize("layout", ["json", "jsonl"])
@pytest.mark.parametrize("row_format", ["alpaca", "messages", "completion", "conversations"])
def test_rows_survive_any_format_and_layout(tmp_path: Path, layout: str, row_format: str) -> None:
    source = write(tmp_path / "a.jsonl", *ALPACA)
    convert(source, tmp_path / "there", format=row_format, layout=layout)
    convert(source, tmp_path / "straight")
    convert(tmp_path / f"there/train.{layout}", tmp_path / "back")
    assert lines(tmp_path / "back/train.jsonl") == lines(tmp_path / "straight/train.jsonl")


def test_one_array_over_several_lines_is_read(tmp_path: Path) -> None:
    source = tmp_path / "a.json"
    source.write_text(json.dumps([*ALPACA, 7], indent=1), encoding="utf-8")
    counts = ConversationCounts()
    rows = list(read_conversations((ConversationSource(path=str(source)),), counts))
    assert [row.number for row in rows] == [1, 2, 3, 4]
    assert [row.line for row in rows] == [2, 7, 12, 18]
    assert getattr(rows[3].conversation, "reason", "") == "not_an_object"
    assert counts.files == {"alpaca": 1}


def test_keys_without_meaning_are_counted_in_the_manifest(tmp_path: Path) -> None:
    dirty = '{"指令": "q", "输入": "", "输出": "a", "note": "n", "note": "m"}'
    convert(write(tmp_path / "a.jsonl", dirty), tmp_path / "out")
    keys = json.loads((tmp_path / "out/manifest.json").read_text())["keys"]
    assert keys["ignored"] == keys["repeated"] == {"note": 1}
    assert keys["aliased"] == {"指令": 1, "输入": 1, "输出": 1}


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"sources": []}, "sources: got an empty list"),
        ({"split": {}}, "split.head: set either head or hash_fraction"),
        ({"split": {"head": 1, "hash_fraction": 0.1}}, "split.head: set either"),
        ({"format": "alpacca"}, "format: got 'alpacca'"),
    ],
)
def test_config_is_checked_before_anything_is_read(
    tmp_path: Path, fields: dict[str, Any], problem: str
) -> None:
    data = {"sources": [{"path": str(tmp_path / "none")}], "target": str(tmp_path / "out")}
    with pytest.raises(ConfigError, match=problem):
        from_dict(ConvertDataConfig, data | fields)


def test_target_that_exists_and_files_of_text_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", *ALPACA)
    with pytest.raises(ConfigError, match=r"^target: .* exists"):
        convert(source, tmp_path)
    text = write(tmp_path / "a.txt", "no rows")
    with pytest.raises(ConfigError, match=r"^sources\.0\.path: .*plain text: .*a\.txt"):
        convert(text, tmp_path / "out")


def test_job_converts_and_refuses_mistakes(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", *ALPACA)

    def job(file: Path) -> int:
        # Called in this process: another would spend seconds on imports.
        arguments = [f"sources=[{{path: {file}}}]", f"target={tmp_path / 'out'}"]
        return VERBS["convert-data"](arguments, "raytune convert-data")

    assert job(source) == 0
    for file in (source, tmp_path / "none.jsonl"):
        with pytest.raises(UserError):
            job(file)
    assert len(lines(tmp_path / "out/train.jsonl")) == 3
