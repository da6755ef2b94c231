"""Promise: a run in a pack equals the same run alone, bit for bit, whatever its neighbours are."""

import gc
import threading
import weakref
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest

from raytune_llama.config.errors import UserError
from raytune_llama.train import loop
from raytune_llama.train.config import PretrainConfig
from raytune_llama.train.monitoring.metrics import EVAL_LOSS, GRAD_NORM, LOSS
from raytune_llama.train.monitoring.replica_check import ReplicaError
from raytune_llama.train.pack.pack import Changes, run_pack
from raytune_llama.train.pack.shared_model import Part
from raytune_llama.train.pack.slot import HandIn, LeftPackError, Slot
from raytune_llama.train.process_group import ProcessGroup
from raytune_llama.train.result import RunResult
from tests.train.conftest import MakeConfig, curve, run_here
from tests.train.group import Group
from tests.train.pack.conftest import ALONE, Listed, largest_difference, pack_here, share
from tests.train.saved import FullDisk

SLOTS: list[dict[str, Any]] = [
    {},
    # Few tokens, and an odd number: matrix products and activations round by both.
    {"batch__sequence_tokens": 7, "batch__micro_batch_sequences": 1},
    {"lora__rank": 2, "lora__alpha": 8.0, "optim__learning_rate": 0.003, "seed": 5},
    {
        "lora__targets": ["q_proj", "v_proj"],
        "lora__dropout": 0.3,
        "batch__sequence_tokens": 40,
        "batch__sequences_per_step": 3,
        "batch__micro_batch_sequences": 1,
        "optim__weight_decay": 0.1,
    },
    {"lora__rank": 7, "lora__dropout": 0.0, "lora__rslora": True, "schedule__warmup_ratio": 0.5},
    {"optim__neftune_alpha": 5.0, "batch__micro_batch_sequences": 4, "max_steps": 4},
    {"lora__modules_to_save": ["embed_tokens"], "optim__max_grad_norm": None},
]


def make_slots(
    make_config: MakeConfig,
    **common: Any,  # noqa: ANN401
) -> list[tuple[PretrainConfig, PretrainConfig]]:
    """Return pairs of the same run: alone and in a pack."""
    fields = [{"lora__modules_to_save": [], **common, **slot} for slot in SLOTS]
    return [
        (make_config(f"alone-{n}", **each), make_config(f"packed-{n}", **each))
        for n, each in enumerate(fields)
    ]


def assert_same_runs(pairs: list[tuple[PretrainConfig, PretrainConfig]]) -> None:
    for number, (alone, packed) in enumerate(pairs):
        difference = largest_difference(packed, alone)
        print(f"slot {number}: largest difference {difference:g}")  # noqa: T201
        for name in (LOSS, EVAL_LOSS, GRAD_NORM):
            assert curve(packed, name) == curve(alone, name), (number, name)
        assert difference == 0.0, number


@pytest.mark.parametrize(
    "common",
    [
        {},
        {"engine__gradient_checkpointing": True},
        {"engine__precision": "bf16"},
        {"engine__precision": "fp16"},
        {"batch__isolate_documents": False},
    ],
    ids=["fp32", "checkpointing", "bf16", "fp16", "seed"],
)
def test_slots_of_unlike_runs_equal_the_runs_alone(
    make_config: MakeConfig, common: dict[str, Any]
) -> None:
    pairs = make_slots(make_config, **common)
    for alone, _ in pairs:
        run_here(alone)
    outcomes = pack_here(Listed([packed for _, packed in pairs]))
    steps = [packed.max_steps for _, packed in pairs]
    assert outcomes == {n: RunResult("finished", step or 0) for n, step in enumerate(steps)}
    assert_same_runs(pairs)


def test_joint_products_of_gpus_equal_the_runs_alone_but_for_rounding(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = make_slots(make_config)
    for alone, _ in pairs:
        run_here(alone)
    monkeypatch.delattr(Part, "run")  # what computes slot by slot
    configs = [packed for _, packed in pairs]
    run_pack(share(configs[0], joint=True), Listed(configs), ALONE)
    for number, (alone, packed) in enumerate(pairs):
        for name in (LOSS, EVAL_LOSS):
            wanted = pytest.approx(curve(alone, name), rel=1e-5)
            assert curve(packed, name) == wanted, (number, name)


def test_slot_is_unchanged_by_neighbours_that_diverge_leave_and_join(
    make_config: MakeConfig,
) -> None:
    pairs = make_slots(make_config)[:3]
    for alone, _ in pairs:
        run_here(alone)
    plain = {"lora__modules_to_save": [], "checkpoint__every_steps": 1}
    diverging = make_config("diverging", **plain, optim__learning_rate=1e30)
    leaving = make_config("leaving", **plain)
    source = Listed(
        [*(packed for _, packed in pairs), diverging, leaving],
        joining={1: 7, 2: 12, 3: 1, 4: 2},
        leaving={4: 16},
    )
    outcomes = pack_here(source)
    assert isinstance(outcomes[3], FloatingPointError)
    assert all(outcomes[number] == RunResult("finished", 6) for number in (0, 1, 2))
    assert 4 not in outcomes
    assert_same_runs(pairs)


def test_slot_that_leaves_frees_what_its_loop_held_at_once() -> None:
    class Held:
        pass

    seen: list[weakref.ref[Held]] = []

    def loop(slot: Slot) -> RunResult:
        held = Held()
        seen.append(weakref.ref(held))
        slot.exchange(HandIn(cast("Part", None), None))
        raise AssertionError(held)

    gc.disable()
    try:
        slot = Slot(0, loop)
        slot.start()
        slot.leave()
        assert isinstance(slot.error, LeftPackError)
        assert seen[0]() is None
    finally:
        gc.enable()


def test_slot_with_an_error_of_its_own_ends_alone(make_config: MakeConfig, tmp_path: Path) -> None:
    fields = {"lora__modules_to_save": []}
    alone, packed = make_config("alone", **fields), make_config("packed", **fields)
    broken = make_config("broken", **fields, data__store_dir=str(tmp_path / "missing"))
    run_here(alone)
    outcomes = pack_here(Listed([broken, packed]))
    assert isinstance(outcomes[0], UserError)
    assert outcomes[1] == RunResult("finished", 6)
    assert_same_runs([(alone, packed)])


def test_pack_with_an_error_that_a_restart_may_mend_ends_every_run(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(monkeypatch, times=100, name="metrics.jsonl")
    configs = [make_config(f"packed-{n}", lora__modules_to_save=[]) for n in range(2)]
    with pytest.raises(OSError, match="No space left"):
        pack_here(Listed(configs))
    disk.left = 0
    assert pack_here(Listed(configs)) == {n: RunResult("finished", 6) for n in range(2)}
    assert not [each.name for each in threading.enumerate() if each.name.startswith("run ")]


def test_pack_shows_its_progress_and_whose_turn_it_is(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"lora__modules_to_save": [], "batch__micro_batch_sequences": 1}
    source = Listed([make_config(f"packed-{n}", **fields) for n in range(2)], joining={1: 3})
    ticks: list[int] = []
    turns: list[int | None] = []
    changes, train_step = source.changes, loop.train_step

    def watch_changes(*, is_idle: bool) -> Changes:
        ticks.append(ALONE.progress.ticks)
        turns.append(ALONE.progress.thread_id)
        return changes(is_idle=is_idle)

    def watch_step(*values: Any) -> Any:  # noqa: ANN401
        assert ALONE.progress.thread_id == threading.get_ident()
        result = train_step(*values)
        assert ALONE.progress.thread_id == threading.get_ident()
        return result

    monkeypatch.setattr(source, "changes", watch_changes)
    monkeypatch.setattr(loop, "train_step", watch_step)
    assert pack_here(source) == {n: RunResult("finished", 6) for n in range(2)}
    # Each round, of which a step takes several.
    assert all(first < second for first, second in pairwise(ticks))
    assert len(ticks) > 3 * 6
    assert set(turns) == {None}


def test_run_that_fails_too_often_by_itself_ends_alone(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"lora__modules_to_save": []}
    alone, packed = make_config("alone", **fields), make_config("packed", **fields)
    broken = make_config("broken", **fields)
    run_here(alone)
    FullDisk(monkeypatch, times=100, name="broken/metrics.jsonl")
    source = Listed([broken, packed], max_failures=2)
    with pytest.raises(OSError, match="No space left"):
        pack_here(source)
    # The workers are restarted, with all runs that have not ended.
    source.round = -1
    outcomes = pack_here(source)
    assert isinstance(outcomes[0], OSError)
    assert outcomes[1] == RunResult("finished", 6)
    assert_same_runs([(alone, packed)])


def test_unlike_copies_of_the_base_end_the_pack(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def differ(*_: object) -> None:
        raise ReplicaError("worker 1 holds other weights")

    monkeypatch.setattr(loop, "compare_replicas", differ)
    fields = {"lora__modules_to_save": [], "scale__compare_every_steps": 1}
    source = Listed([make_config("packed", **fields)])
    with pytest.raises(ReplicaError):
        pack_here(source)
    assert source.outcomes == {}


@pytest.mark.parametrize("first", ["packed", "alone"])
def test_stopped_run_resumes_in_a_pack_or_alone_as_if_never_stopped(
    make_config: MakeConfig, first: str
) -> None:
    pairs = make_slots(make_config)[:2]
    for alone, packed in pairs:
        run_here(alone)
        if first == "alone":
            run_here(packed, stop_after=3)
    configs = [packed for _, packed in pairs]
    stops = {0: stop_after(3), 1: stop_after(2)} if first == "packed" else {}
    outcomes = pack_here(Listed(configs, stops=stops))
    if first == "packed":
        assert outcomes == {0: RunResult("stopped", 3), 1: RunResult("stopped", 2)}
        for packed in configs:
            assert run_here(packed).status == "finished"
    assert_same_runs(pairs)


def stop_after(num_steps: int) -> Callable[[], bool]:
    asked = iter(range(10**9))
    return lambda: next(asked) >= num_steps


def pack_job(configs: list[PretrainConfig], workers: ProcessGroup) -> None:
    source = Listed(configs, joining={2: 4})
    run_pack(share(configs[0], workers), source, workers)
    assert {getattr(each, "status", each) for each in source.outcomes.values()} == {"finished"}


def test_pack_of_two_workers_equals_the_runs_alone_on_two(
    make_config: MakeConfig, two: Group
) -> None:
    pairs = make_slots(make_config)[:3]
    for alone, _ in pairs:
        two.run(alone)
    two.call(partial(pack_job, [packed for _, packed in pairs]))
    assert_same_runs(pairs)
