"""Promise: failures without progress end a run, with their causes; with progress none does."""

import pickle

from hypothesis import given
from hypothesis import strategies as st

from raytune_llama.train.orchestration.failure_policy import (
    MAX_BACKOFF_SECONDS,
    FailurePolicy,
    backoff_seconds,
)
from raytune_llama.train.result import AbortReason


def attempt(failures: FailurePolicy, step: int, *causes: str) -> bool:
    """Start a group of workers at a step, and let it fail; return whether it might start."""
    admission = failures.admit(step)
    if admission.abort_reason is None:
        failures.record(causes or ("killed",))
    return admission.abort_reason is None


def test_three_failures_at_one_step_end_the_run_with_their_causes() -> None:
    failures = FailurePolicy(max_failures=3)
    assert attempt(failures, 100, "worker 0: it rained")
    assert attempt(failures, 100, "worker 1: it snowed")
    assert attempt(failures, 100, "worker 2: it hailed")
    ending = failures.admit(100).abort_reason
    assert ending is not None
    assert ending.kind == "gave up"
    for word in ("step 100", "it rained", "it snowed", "it hailed", "scale.max_failures"):
        assert word in ending.cause
    # And no other starts.
    assert failures.admit(500).abort_reason == ending


def test_failure_with_a_new_checkpoint_each_time_never_ends_the_run() -> None:
    failures = FailurePolicy(max_failures=2)
    assert all(attempt(failures, step) for step in range(200))
    assert failures.admit(200).attempt == 201


def test_first_failure_behind_a_new_checkpoint_is_the_first_in_a_row() -> None:
    failures = FailurePolicy(max_failures=2)
    assert attempt(failures, 0)
    # It had saved step 10 before it failed; then it fails behind step 10 for the second time.
    assert attempt(failures, 10)
    assert failures.admit(10).abort_reason is not None


def test_restart_without_a_failure_is_not_counted() -> None:
    failures = FailurePolicy(max_failures=1)
    answers = [failures.admit(7) for _ in range(5)]  # as Ray resizes the group
    assert all(answer.abort_reason is None and answer.wait_seconds == 0 for answer in answers)


def test_failure_told_by_many_is_one() -> None:
    failures = FailurePolicy(max_failures=2)
    failures.admit(0)
    failures.record(["the watch"])
    failures.record(["the controller"])
    answer = failures.admit(0)
    assert answer.abort_reason is None
    assert failures.num_in_a_row == 1


def test_lost_checkpoint_is_no_progress_when_it_is_saved_again() -> None:
    failures = FailurePolicy(max_failures=3)
    assert attempt(failures, 20)
    assert attempt(failures, 10)  # the newest was damaged
    assert attempt(failures, 20)
    assert failures.admit(20).abort_reason is not None


def test_mistake_ends_the_run_at_once_and_the_first_reason_stands() -> None:
    failures = FailurePolicy(max_failures=3)
    failures.admit(0)
    first = AbortReason("refused", "data.sources: no such file")
    failures.abort(first)
    failures.abort(AbortReason("diverged", "step 3: the loss is nan"))
    assert failures.admit(0).abort_reason == first


def test_failures_survive_the_way_to_another_process() -> None:
    failures = FailurePolicy(max_failures=2)
    attempt(failures, 5)
    assert attempt(pickle.loads(pickle.dumps(failures)), 5)  # noqa: S301
    assert pickle.loads(pickle.dumps(failures)) == failures  # noqa: S301


@given(st.integers(1, 10**6))
def test_wait_grows_with_failures_and_is_bounded(count: int) -> None:
    assert backoff_seconds(count) <= backoff_seconds(count + 1) <= MAX_BACKOFF_SECONDS
    assert [backoff_seconds(number) for number in (1, 2, 3)] == [0, 5, 20]


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=60), st.integers(1, 4))
def test_run_ends_exactly_when_the_newest_failures_are_all_at_one_checkpoint(
    attempts: list[tuple[int, bool]], tolerated: int
) -> None:
    failures = FailurePolicy(tolerated)
    step, in_a_row, fails = 0, 0, False
    for progress, fails_then in attempts:
        # What was saved since the last start counts before its failure does.
        in_a_row = (0 if progress else in_a_row) + fails
        step += progress
        answer = failures.admit(step)
        assert (answer.abort_reason is not None) == (in_a_row >= tolerated)
        if answer.abort_reason is not None:
            return
        fails = fails_then
        if fails:
            failures.record(["killed"])
