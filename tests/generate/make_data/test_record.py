"""The journal is the truth: what a crash can leave is read, what it cannot is refused."""

import json
from pathlib import Path

import pytest

from raytune_llama.config.errors import UserError
from tests.generate.make_data.conftest import (
    MakeData,
    read_journal,
    read_quarantine,
    read_rows,
)
from tests.generate.make_data.fake_endpoint import (
    Answer,
    Call,
    FakeEndpoint,
    answer_rows,
    as_json,
    completion,
    make_rows,
)


def test_last_line_that_a_crash_has_cut_is_asked_for_again(
    run: MakeData, run_dir: Path, endpoint: FakeEndpoint
) -> None:
    run(max_requests=3)
    journal = run_dir / "requests.jsonl"
    content = journal.read_bytes()
    journal.write_bytes(content[:-10])
    run(max_requests=3)
    assert endpoint.calls[3].prompt == endpoint.calls[2].prompt
    numbers = [record["number"] for record in read_journal(run_dir)]
    assert numbers == [1, 2, 3]
    assert read_rows(run_dir) == make_rows(1) + make_rows(2) + make_rows(4)


def test_files_are_restored_from_the_journal(
    run: MakeData, run_dir: Path, endpoint: FakeEndpoint
) -> None:
    endpoint.answer = lambda call: completion(as_json([*make_rows(call.number), "bad"]))
    run(max_requests=2)
    names = ("alpaca.json", "quarantine.jsonl", "manifest.json")
    before = {name: (run_dir / name).read_bytes() for name in names}
    (run_dir / "alpaca.json").unlink()
    (run_dir / "quarantine.jsonl").write_bytes(before["quarantine.jsonl"][:-30])
    (run_dir / ".alpaca.json.0123.tmp").write_bytes(b"[")
    run(max_requests=2)
    assert {name: (run_dir / name).read_bytes() for name in names} == before
    assert not list(run_dir.glob("*.tmp"))
    assert len(endpoint.calls) == 2


def test_damaged_journal_is_refused_by_line(run: MakeData, run_dir: Path) -> None:
    run(max_requests=3)
    journal = run_dir / "requests.jsonl"
    lines = journal.read_bytes().split(b"\n")
    lines[2] = b"\0" * len(lines[2])
    journal.write_bytes(b"\n".join(lines))
    before = (run_dir / "alpaca.json").read_bytes()
    with pytest.raises(UserError, match=r"requests\.jsonl: line 3 is damaged"):
        run(max_requests=4)
    assert (run_dir / "alpaca.json").read_bytes() == before


def test_data_is_published_while_requests_are_pending(
    run: MakeData, run_dir: Path, endpoint: FakeEndpoint
) -> None:
    seen: list[int] = []

    def answer(call: Call) -> Answer:
        if call.number > 1:
            seen.append(len(read_rows(run_dir)))
        return answer_rows(call)

    endpoint.answer = answer
    run(max_requests=2)
    assert seen == [3]


def test_rejected_item_with_invalid_unicode_is_recorded(
    run: MakeData, run_dir: Path, endpoint: FakeEndpoint
) -> None:
    endpoint.answer = lambda _: completion('[{"instruction": "q", "output": "\\ud800"}]')
    run(max_requests=1)
    (line,) = read_quarantine(run_dir)
    assert json.dumps(line["item"]["output"]) == '"\\ud800"'
    assert read_rows(run_dir) == []
