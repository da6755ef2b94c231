"""An endpoint that misbehaves: what is repeated, what ends the job, and what it says."""

import email.utils
import itertools
import json
import socket
import time
from pathlib import Path

import pytest

from raytune_llama.config.errors import UserError
from raytune_llama.generate.make_data.job import make_data
from tests.generate.make_data.conftest import (
    MakeData,
    config_of,
    read_journal,
    read_quarantine,
    read_rows,
)
from tests.generate.make_data.fake_endpoint import (
    Answer,
    Call,
    FakeEndpoint,
    answer_rows,
    error,
)

PASSING = {
    "429": error(429, "slow down"),
    "500": error(500, "oops"),
    "503": Answer(503, b"<html>busy</html>", {"content-type": "text/html"}),
    "connection": Answer(fault="reset"),
    "time_out": Answer(fault="hang"),
    "invalid_response": Answer(200, b'{"choices": [{"mess'),
}


@pytest.mark.parametrize("cause", PASSING)
def test_failure_that_passes_is_repeated_and_counted(
    cause: str, run: MakeData, run_dir: Path, endpoint: FakeEndpoint
) -> None:
    endpoint.answer = lambda call: PASSING[cause] if call.number in (2, 3) else answer_rows(call)
    summary = run(max_requests=2, timeout_seconds=0.5)
    assert summary.counts.retries == {cause: 2}
    assert len(read_rows(run_dir)) == 6
    # The same prompt again, and no request number twice.
    assert len({call.prompt for call in endpoint.calls[1:]}) == 1
    assert [record["number"] for record in read_journal(run_dir)] == [1, 2]


def test_response_that_ends_in_the_middle_is_repeated(
    run: MakeData, run_dir: Path, endpoint: FakeEndpoint
) -> None:
    def answer(call: Call) -> Answer:
        whole = answer_rows(call)
        return Answer(body=whole.body, fault="cut") if call.number == 2 else whole

    endpoint.answer = answer
    assert run(max_requests=2).counts.retries == {"connection": 1}
    assert len(read_rows(run_dir)) == 6


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honored(form: str, run: MakeData, endpoint: FakeEndpoint) -> None:
    def answer(call: Call) -> Answer:
        date = email.utils.formatdate(time.time() + 2, usegmt=True)
        wait = "1" if form == "seconds" else date
        return error(429, "slow down", retry_after=wait) if call.number == 1 else answer_rows(call)

    endpoint.answer = answer
    run(max_requests=1)
    first, second = endpoint.calls
    # A date has no fractions of a second.
    assert second.time - first.time >= 0.95


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (error(401, "Incorrect API key provided"), "Incorrect API key provided"),
        (error(404, "The model `x` does not exist"), "The model `x` does not exist"),
        (error(400, "max_tokens is too large"), "max_tokens is too large"),
        (error(429, "You exceeded your quota", "insufficient_quota"), "exceeded your quota"),
    ],
)
def test_refusal_ends_the_job_at_once_in_the_endpoints_words(
    answer: Answer, words: str, run: MakeData, run_dir: Path, endpoint: FakeEndpoint
) -> None:
    endpoint.answer = lambda _: answer
    with pytest.raises(UserError, match=words):
        run(max_requests=3)
    assert len(endpoint.calls) == 1
    assert not run_dir.exists()


@pytest.mark.parametrize("status", [400, 422])
def test_prompt_that_a_filter_refuses_is_quarantined_and_the_others_go_on(
    status: int, run: MakeData, run_dir: Path, endpoint: FakeEndpoint
) -> None:
    refused = error(status, "the content filter was triggered")
    endpoint.answer = lambda call: refused if call.number == 2 else answer_rows(call)
    run(max_requests=3)
    assert len(read_rows(run_dir)) == 6
    (line,) = read_quarantine(run_dir)
    assert "the content filter was triggered" in json.dumps(line)
    assert len(endpoint.calls) == 3


def test_refusal_in_between_keeps_the_rows_and_can_be_resumed(
    run: MakeData, run_dir: Path, endpoint: FakeEndpoint
) -> None:
    endpoint.answer = lambda call: error(401, "expired") if call.number == 3 else answer_rows(call)
    with pytest.raises(UserError, match="6 rows are kept; the same command resumes"):
        run(max_requests=4)
    assert len(read_rows(run_dir)) == 6
    run(max_requests=4)
    assert len(read_rows(run_dir)) == 12


@pytest.mark.parametrize("model", [None, "teacher"])
def test_endpoint_that_is_not_running_is_one_error_at_once(
    model: str | None, run_dir: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    fields = {} if model is None else {"model": model}
    config = config_of(f"http://127.0.0.1:{port}/v1", run_dir, num_rows=3, concurrency=8, **fields)
    start = time.monotonic()
    with pytest.raises(UserError, match=rf"127\.0\.0\.1:{port}/v1.*connection attempts failed"):
        make_data(config, None)
    assert time.monotonic() - start < 20
    assert not run_dir.exists()


def test_server_that_is_no_such_endpoint_is_one_error_at_once(
    run: MakeData, endpoint: FakeEndpoint
) -> None:
    endpoint.answer = lambda _: Answer(200, b"<html>Welcome</html>", {"content-type": "text/html"})
    with pytest.raises(UserError, match=r"no chat completion in OpenAI's format: .*Welcome"):
        run(max_requests=1)
    assert len(endpoint.calls) == 1


def test_endpoint_that_goes_away_ends_the_job_and_loses_nothing(
    run: MakeData, run_dir: Path, endpoint: FakeEndpoint
) -> None:
    endpoint.answer = lambda call: error(503, "gone") if call.number > 2 else answer_rows(call)
    with pytest.raises(UserError, match="no request was answered in 3 tries"):
        run(max_requests=5, max_tries=3)
    assert len(endpoint.calls) == 5
    assert len(read_rows(run_dir)) == 6
    endpoint.answer = answer_rows
    run(max_requests=5)
    assert [record["number"] for record in read_journal(run_dir)] == [1, 2, 3, 4, 5]


def test_prompt_that_always_fails_is_quarantined_if_others_are_answered(
    run: MakeData, run_dir: Path, endpoint: FakeEndpoint
) -> None:
    bad: list[str] = []
    numbers = itertools.count(1000)

    def answer(call: Call) -> Answer:
        bad[:] = bad or [call.prompt]
        if call.prompt == bad[0]:
            return error(500, "poisoned")
        return answer_rows(Call(next(numbers), call.body, None, call.time))

    endpoint.answer = answer
    run(max_requests=20, concurrency=4, max_tries=4)
    assert len(read_rows(run_dir)) == 57
    (line,) = read_quarantine(run_dir)
    assert (line["reason"], line["request"]) == ("no_text", 1)
    assert "poisoned" in line["detail"]


def test_parameters_are_sent_as_configured(run: MakeData, endpoint: FakeEndpoint) -> None:
    sampling = {"temperature": 0.5, "max_tokens": 77, "extra_body": {"top_k": 9}}
    run(max_requests=1, sampling=sampling)
    body = endpoint.calls[0].body
    assert {name: body[name] for name in ("temperature", "max_tokens", "top_k", "model")} == {
        "temperature": 0.5,
        "max_tokens": 77,
        "top_k": 9,
        "model": "teacher",
    }
    assert "top_p" not in body


def test_reply_without_choices_is_quarantined(
    run: MakeData, run_dir: Path, endpoint: FakeEndpoint
) -> None:
    nothing = Answer(body=b'{"choices": [], "model": "teacher"}')
    endpoint.answer = lambda call: nothing if call.number == 1 else answer_rows(call)
    run(max_requests=2)
    assert [line["reason"] for line in read_quarantine(run_dir)] == ["no_text"]
