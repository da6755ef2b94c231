"""The job: budgets, resuming, refusals, and what training reads of its result."""

import json
import threading
from pathlib import Path

import pytest

from raytune_llama.chat.conversations import Conversation
from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import ConfigError
from raytune_llama.data.readers.config import ConversationSource
from raytune_llama.data.readers.conversations import ConversationCounts, read_conversations
from raytune_llama.generate.make_data.job import make_data
from raytune_llama.storage.lease import Lease
from raytune_llama.storage.place import Place
from tests.generate.make_data.conftest import (
    FAST,
    MakeData,
    config_of,
    fast,
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


def test_rows_are_what_training_reads(run: MakeData, run_dir: Path, endpoint: FakeEndpoint) -> None:
    rows = [
        {"instruction": "翻译成英文", "input": "春天来了", "output": "Spring is here."},
        {"instruction": "写一句诗", "input": "", "output": "春眠不觉晓"},
    ]
    endpoint.answer = lambda _: completion(as_json(rows))
    summary = run(max_requests=1)
    assert read_rows(run_dir) == rows
    source = ConversationSource(path=str(summary.data_file))
    counts = ConversationCounts()
    read = [row.conversation for row in read_conversations((source,), counts)]
    assert all(isinstance(conversation, Conversation) for conversation in read)
    assert [
        [turn.content for turn in conversation.turns]
        for conversation in read
        if isinstance(conversation, Conversation)
    ] == [["翻译成英文\n春天来了", "Spring is here."], ["写一句诗", "春眠不觉晓"]]
    assert counts.files == {"alpaca": 1}


def test_num_rows_ends_the_job_with_at_most_one_reply_too_many(
    run: MakeData, run_dir: Path, endpoint: FakeEndpoint
) -> None:
    summary = run(num_rows=10, concurrency=4)
    assert summary.status == "finished"
    assert len(read_rows(run_dir)) == 12
    assert len(endpoint.calls) == 4


def test_replies_with_fewer_rows_than_expected_are_followed_by_more(
    run: MakeData, run_dir: Path, endpoint: FakeEndpoint
) -> None:
    endpoint.answer = lambda call: completion(as_json(make_rows(call.number, 1)))
    run(num_rows=5, concurrency=4)
    assert len(read_rows(run_dir)) >= 5


def test_budget_of_requests_counts_all_starts(
    run: MakeData, run_dir: Path, endpoint: FakeEndpoint
) -> None:
    assert run(max_requests=2).ended_by == "max_requests=2"
    run(max_requests=2)
    assert len(endpoint.calls) == 2
    summary = run(max_requests=5)
    assert len(endpoint.calls) == 5
    assert summary.counts.rows == len(read_rows(run_dir)) == 15
    assert [record["number"] for record in read_journal(run_dir)] == [1, 2, 3, 4, 5]


def test_budget_of_requests_holds_with_more_concurrency(
    run: MakeData, endpoint: FakeEndpoint
) -> None:
    run(max_requests=3, concurrency=8)
    assert len(endpoint.calls) == 3


def test_budget_of_tokens_ends_the_job(run: MakeData, endpoint: FakeEndpoint) -> None:
    summary = run(max_tokens=301)
    assert summary.counts.tokens == 450
    assert len(endpoint.calls) == 3


def test_budget_of_tokens_without_token_counts_is_refused(
    run: MakeData, run_dir: Path, endpoint: FakeEndpoint
) -> None:
    endpoint.answer = lambda call: completion(as_json(make_rows(call.number)), usage=False)
    with pytest.raises(UserError, match=r"max_tokens: .* does not report token counts"):
        run(max_tokens=1000)
    assert len(read_rows(run_dir)) == 3


def test_requests_are_concurrent_up_to_the_limit(run: MakeData, endpoint: FakeEndpoint) -> None:
    together = threading.Barrier(3, timeout=20)

    def wait_for_others(call: Call) -> Answer:
        together.wait()
        return answer_rows(call)

    endpoint.answer = wait_for_others
    assert run(max_requests=6, concurrency=3).counts.rows == 18


def test_same_seed_gives_the_same_prompt_by_number(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_data(config_of(endpoint.url, tmp_path / name, max_requests=3), None, **fast())
    prompts = [call.prompt for call in endpoint.calls]
    assert prompts[:3] == prompts[3:]
    assert len(set(prompts)) == 3


def test_near_duplicates_of_earlier_starts_are_left_out(
    run: MakeData, run_dir: Path, endpoint: FakeEndpoint
) -> None:
    first = {"instruction": "List three healthy foods to eat", "input": "", "output": "x"}
    near = {**first, "instruction": "List three healthy foods to eat today"}
    endpoint.answer = lambda _: completion(as_json([first]))
    run(max_requests=1)
    endpoint.answer = lambda call: completion(as_json([near, near, *make_rows(call.number, 1)]))
    summary = run(max_requests=2)
    assert summary.counts.duplicates == 2
    assert len(read_rows(run_dir)) == 2
    rejected = read_quarantine(run_dir)
    assert [line["reason"] for line in rejected] == ["near_duplicate"] * 2
    assert rejected[0]["item"] == near
    assert first["instruction"] in rejected[0]["detail"]


def test_near_duplicates_in_one_reply_are_left_out(
    run: MakeData, run_dir: Path, endpoint: FakeEndpoint
) -> None:
    (row,) = make_rows(1, 1)
    endpoint.answer = lambda _: completion(as_json([row, row, row]))
    assert run(max_requests=1).counts.duplicates == 2
    assert read_rows(run_dir) == [row]


def test_everything_in_a_reply_is_kept_or_in_the_quarantine(
    run: MakeData, run_dir: Path, endpoint: FakeEndpoint
) -> None:
    good = make_rows(1, 1)[0]
    bad = [{**good, "output": 3}, {"instruction": "x"}, "text", {**good, "output": " "}]
    replies = {
        1: completion(as_json([good, *bad])),
        2: completion("Sorry, I can't do that."),
        3: completion("[]"),
        4: completion(None, "content_filter"),
        5: completion(as_json(make_rows(5, 2))[:-20], "length"),
        6: completion("Here you are:\n```json\n" + as_json(make_rows(6, 1)) + "\n```\nEnjoy!"),
    }
    endpoint.answer = lambda call: replies[call.number]
    counts = run(max_requests=6).counts
    assert counts.rejected == {
        "wrong_type": 1,
        "missing_field": 1,
        "not_an_object": 1,
        "empty_output": 1,
        "not_json": 1,
        "empty_list": 1,
        "no_text": 1,
        "cut_off": 1,
    }
    assert read_rows(run_dir) == [good, make_rows(5, 2)[0], *make_rows(6, 1)]
    by_reason = {line["reason"]: line for line in read_quarantine(run_dir)}
    assert by_reason["not_json"]["reply"] == "Sorry, I can't do that."
    assert by_reason["not_json"]["request"] == 2
    assert by_reason["wrong_type"]["item"] == bad[0]
    assert counts.quarantined == 8


def test_other_fields_of_items_are_counted_and_left_out(
    run: MakeData, run_dir: Path, endpoint: FakeEndpoint
) -> None:
    rows = [{**row, "topic": "x"} for row in make_rows(1, 2)]
    endpoint.answer = lambda _: completion(as_json(rows))
    assert run(max_requests=1).counts.ignored_fields == {"topic": 2}
    assert read_rows(run_dir) == make_rows(1, 2)


def test_model_without_usable_replies_stops_the_job(run: MakeData, endpoint: FakeEndpoint) -> None:
    endpoint.answer = lambda _: completion("no")
    with pytest.raises(UserError, match=r"4 consecutive replies had no row .* not_json 1"):
        run(num_rows=10, max_fruitless_requests=4)
    assert len(endpoint.calls) == 4


def test_another_config_in_the_same_target_is_refused_with_the_difference(
    run: MakeData, run_dir: Path, endpoint: FakeEndpoint, tmp_path: Path
) -> None:
    run(max_requests=1)
    before = (run_dir / "alpaca.json").read_bytes()
    with pytest.raises(ConfigError, match=r"prompt\.seed: 1 -> 2"):
        run(max_requests=2, prompt={"seed": 2})
    topics = tmp_path / "topics.txt"
    topics.write_text("\n".join(f"topic {n}" for n in range(10)))
    with pytest.raises(ConfigError, match=r"texts\.topics"):
        run(max_requests=2, prompt={"topics": str(topics)})
    with pytest.raises(ConfigError, match=r"model: 'teacher' -> 'other'"):
        run(max_requests=2, model="other")
    assert (run_dir / "alpaca.json").read_bytes() == before
    assert len(endpoint.calls) == 1


def test_settings_of_how_it_runs_may_change(run: MakeData, run_dir: Path) -> None:
    run(max_requests=1)
    run(num_rows=9, concurrency=2, timeout_seconds=9.0)
    assert len(read_rows(run_dir)) == 9


def test_second_process_on_a_target_is_refused(
    run: MakeData, run_dir: Path, endpoint: FakeEndpoint
) -> None:
    with Lease(Place.local(run_dir), FAST) as lease:
        lease.confirm()
        with pytest.raises(ConfigError, match="is locked by another driver"):
            run(max_requests=1)
    assert not endpoint.calls


def test_target_with_other_files_is_refused(run: MakeData, run_dir: Path) -> None:
    run_dir.mkdir()
    (run_dir / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"run_dir: .* contains notes\.txt"):
        run(max_requests=1)
    assert [path.name for path in run_dir.iterdir()] == ["notes.txt"]


def test_manifest_describes_the_result(
    run: MakeData, run_dir: Path, endpoint: FakeEndpoint
) -> None:
    run(max_requests=2)
    text = (run_dir / "manifest.json").read_text()
    manifest = json.loads(text)
    assert manifest["status"] == "finished"
    assert manifest["data"]["rows"] == 6
    assert manifest["counts"]["models"] == {"teacher": 2}
    assert manifest["counts"]["base_urls"] == {endpoint.url: 2}
    assert manifest["identity"]["texts"].keys() == {"prompt", "topics", "task_types"}


def test_key_is_sent_and_appears_nowhere(
    run: MakeData, run_dir: Path, endpoint: FakeEndpoint, caplog: pytest.LogCaptureFixture
) -> None:
    run(max_requests=1, key="sk-secret")
    assert endpoint.calls[0].authorization == "Bearer sk-secret"
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert not any(b"sk-secret" in path.read_bytes() for path in files)
    assert "sk-secret" not in caplog.text


def test_without_a_key_no_authorization_is_sent(run: MakeData, endpoint: FakeEndpoint) -> None:
    run(max_requests=1)
    assert endpoint.calls[0].authorization is None


def test_endpoint_elsewhere_needs_a_key(run_dir: Path) -> None:
    config = config_of("https://api.example.com/v1", run_dir, max_requests=1)
    with pytest.raises(ConfigError, match="OPENAI_API_KEY is not set"):
        make_data(config, None, **fast())
    assert not run_dir.exists()
