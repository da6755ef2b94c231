"""Promise: a loss or gradient that is not finite moves no weight, on no worker, and is told.

Workers here are processes with gloo between them, as under Ray Train, without Ray.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from raytune_llama.model.llama import SummedLoss, causal_lm
from raytune_llama.storage.place import Place
from raytune_llama.train.checkpoint.layout import (
    CheckpointError,
    RunState,
    checkpoint_path,
    list_checkpoints,
)
from raytune_llama.train.config import PretrainConfig
from raytune_llama.train.engines.protocol import StateSlice, StepResult, TrainEngine
from raytune_llama.train.loop import open_session, read_batches, train
from raytune_llama.train.monitoring.incident_log import BAD_STEPS_FILE
from raytune_llama.train.monitoring.metrics import (
    BAD_STEPS,
    EVAL_LOSS,
    LOSS,
    TARGET_TOKENS,
    read_metrics,
    read_records,
)
from raytune_llama.train.monitoring.nonfinite import check_updates, state_after_rollback
from raytune_llama.train.process_group import ProcessGroup
from tests.train.conftest import MakeConfig, curve, run_here, stage_fields
from tests.train.group import Group
from tests.train.marked import CROPS, MARKS, mark_at, write_broken_model, write_marked_store
from tests.train.saved import ALONE, FullDisk, hashes_of

ADAPTER = "pt_lora_model/adapter_model.safetensors"
FSDP = {"engine__strategy": "fsdp"}
STRATEGIES = {
    "ddp": stage_fields(0),
    "fsdp": FSDP,
    "zero_1": stage_fields(1),
    "zero_2": stage_fields(2),
    "zero_3": stage_fields(3),
}
SKIP = {"optim__on_bad_step": "skip"}
ROLL_BACK = {"optim__on_bad_step": "rollback"}
BAD_POSITION = 4 * 4 + 1
"""The second sequence of the fifth step: of two workers, the second has it."""


@pytest.fixture(scope="session")
def marked_store(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    path = tmp_path_factory.mktemp("marked")
    write_marked_store(path, tokenizer_dir)
    return path


@pytest.fixture
def make_marked(
    make_config: MakeConfig, marked_store: Path, tokenizer_dir: Path, tmp_path: Path
) -> MakeConfig:
    """Make configs of a run whose fifth step has one text that makes the loss nan."""
    broken: Path | None = None

    def make(name: str = "run", **fields: Any) -> PretrainConfig:  # noqa: ANN401
        nonlocal broken
        given = {"data__store_dir": str(marked_store), "lora__dropout": 0.0, **CROPS, **fields}
        if broken is None:
            mark = mark_at(make_config(name, **given), BAD_POSITION)
            broken = write_broken_model(tmp_path / "broken", tokenizer_dir, mark)
        return make_config(name, **{"model__path": str(broken), **given})

    return make


def incidents(config: PretrainConfig) -> list[dict[str, Any]]:
    return read_records(config.run_place / BAD_STEPS_FILE)


def state_at(config: PretrainConfig, step: int) -> RunState:
    manifest = checkpoint_path(config.run_place, step) / "manifest.json"
    return RunState(**manifest.read_json()["state"])


def tensors_at(config: PretrainConfig, step: int) -> list[str]:
    return hashes_of(checkpoint_path(config.run_place, step))


def saved_adapter(config: PretrainConfig) -> bytes:
    return (config.run_place / ADAPTER).read_bytes()


EVERY_STEP = {"checkpoint__every_steps": 1, "checkpoint__keep_last": 9}


@pytest.mark.parametrize(
    ("strategy", "precision"),
    [
        *((strategy, "fp32") for strategy in STRATEGIES),
        *(("zero_1", "bf16"), ("zero_3", "bf16"), ("ddp", "fp16"), ("fsdp", "fp16")),
        # As in fp32: no scale of the loss, and no optimizer of its own.
        pytest.param("ddp", "bf16", marks=pytest.mark.slow),
        # The optimizer of ZeRO 1.
        pytest.param("zero_2", "bf16", marks=pytest.mark.slow),
    ],
)
def test_train_nan_of_one_worker_moves_no_weight_of_any(
    make_marked: MakeConfig, two: Group, strategy: str, precision: str
) -> None:
    fields = {**SKIP, **EVERY_STEP, "engine__precision": precision}
    config = make_marked(strategy, **fields, **STRATEGIES[strategy])
    two.run(config)
    assert tensors_at(config, 5) == tensors_at(config, 4)
    assert tensors_at(config, 6) != tensors_at(config, 5)
    losses = [record[LOSS] for record in read_metrics(config.run_place) if LOSS in record]
    assert [step for step, loss in enumerate(losses, start=1) if loss is None] == [5]
    assert (state_at(config, 6).num_bad_steps, state_at(config, 6).num_bad_in_row) == (1, 0)
    (record,) = incidents(config)
    assert (record["step"], record["loss_sum"], record["answer"]) == (5, "nan", "skip")
    if precision == "fp32":
        # Nothing of the step stays anywhere, such as in sums of gradients.
        reference = make_marked("reference", **fields)
        run_here(reference)
        good = [loss for loss in curve(reference) if loss is not None]
        assert [loss for loss in losses if loss is not None] == pytest.approx(good, rel=1e-5)


def break_gradient(module: SummedLoss) -> Any:  # noqa: ANN401  # a handle
    """Let gradients be nan while the loss is finite."""

    def spoil(_module: nn.Module, _inputs: Any, output: Tensor) -> None:  # noqa: ANN401
        output.register_hook(lambda gradient: gradient * math.nan)

    norm = cast("nn.Module", causal_lm(module.model).get_decoder().norm)
    return norm.register_forward_hook(spoil)


def break_loss(module: nn.Module) -> Any:  # noqa: ANN401  # a handle
    """Let the loss be inf while gradients are finite."""

    def spoil(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:  # noqa: ANN401
        return output + math.inf

    return module.register_forward_hook(spoil)


def state_of(engine: TrainEngine) -> dict[str, StateSlice]:
    return {
        s.name: StateSlice(
            s.name, s.start, *(t.clone() for t in (s.weight, s.exp_avg, s.exp_avg_sq))
        )
        for s in engine.trainable_state()
    }


def assert_same_state(ours: dict[str, StateSlice], wanted: dict[str, StateSlice]) -> None:
    for name, state in wanted.items():
        assert torch.equal(ours[name].weight, state.weight), name
        assert torch.equal(ours[name].exp_avg, state.exp_avg), name
        assert torch.equal(ours[name].exp_avg_sq, state.exp_avg_sq), name


def take_steps(config: PretrainConfig, *breaks: Callable[[SummedLoss], Any] | None) -> TrainEngine:
    """Take steps on one batch, broken or not; check that the broken ones move no weight."""
    session = open_session(config, ProcessGroup.single_process())
    engine, batch = session.engine, next(read_batches(session, 0))
    seeds = [0] * len(batch.micro_batches)
    for break_ in breaks:
        before = state_of(engine)
        handle = break_(engine.module) if break_ else None
        result = engine.train_step(batch.micro_batches, seeds, sum(batch.source_targets), 0.01)
        assert result.was_applied == (break_ is None)
        assert result.is_bad == (break_ is not None)
        if handle is not None:
            handle.remove()
            assert_same_state(state_of(engine), before)
    return engine


@pytest.mark.parametrize("break_", [break_gradient, break_loss])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_train_step_not_finite_leaves_nothing_behind(
    make_config: MakeConfig, strategy: str, break_: Callable[[SummedLoss], Any]
) -> None:
    config = make_config(**STRATEGIES[strategy])
    reference = state_of(take_steps(config, None, None))
    assert_same_state(state_of(take_steps(config, None, break_, None)), reference)


@pytest.mark.parametrize("strategy", ["ddp", "zero_2", "zero_3"])
def test_train_step_of_new_rows_that_no_text_holds_heeds_the_loss(
    make_config: MakeConfig,
    untied_model_dir: Path,
    grown_tokenizer: Path,
    strategy: str,
) -> None:
    # The texts are encoded without the new tokens: of all that is trained, the gradient is zero.
    config = make_config(
        train="embeddings",
        lora=None,
        embeddings={"new_rows_only": True},
        model__path=str(untied_model_dir),
        model__tokenizer=str(grown_tokenizer),
        **STRATEGIES[strategy],
    )
    take_steps(config, None, break_loss)


@pytest.mark.parametrize(
    ("loss_sum", "loss_scale", "is_bad"),
    [
        (1.0, 1024.0, False),  # the scale was too large
        (1.0, 1.0, True),
        (1.0, 0.5, True),
        (math.nan, 1024.0, True),
        (math.inf, 1.0, True),
    ],
)
def test_step_result_blames_the_loss_scale_only_above_1(
    loss_sum: float,
    loss_scale: float,
    is_bad: bool,  # noqa: FBT001
) -> None:
    result = StepResult(loss_sum, math.inf, was_applied=False, loss_scale=loss_scale)
    assert result.is_bad == is_bad
    assert not replace(result, was_applied=True).is_bad


def test_train_stops_at_a_bad_step_and_saves_nothing_of_it(make_marked: MakeConfig) -> None:
    config = make_marked(checkpoint__every_steps=3)
    for _ in range(2):
        with pytest.raises(FloatingPointError, match=r"step 5: non-finite loss .* loss nan"):
            run_here(config)
        assert [path.name for path in list_checkpoints(config.run_place)] == ["step-00000003"]
        # The second start meets the step again, and the file has it once.
        (record,) = incidents(config)
        assert (record["step"], record["answer"]) == (5, "stop")


def test_train_bad_step_names_the_texts_it_read(
    make_marked: MakeConfig, two: Group, run_dir: Place
) -> None:
    config = make_marked("named", run_dir=str(run_dir), **SKIP)
    two.run(config)
    (record,) = incidents(config)
    samples = {sample["position"]: sample for sample in record["samples"]}
    assert list(samples) == [16, 17, 18, 19]
    # One forward pass of the second worker, whose other sequence is that of position 19.
    assert [p for p, sample in samples.items() if sample.get("suspect")] == [17, 19]
    mark = mark_at(config, BAD_POSITION)
    number = MARKS.index(mark)
    wanted = {"source": "corpus", "index": number, "epoch": 0}
    assert {key: samples[17][key] for key in wanted} == wanted
    assert samples[17]["documents"] == [{"number": number, "file": 0, "offset": number}]


@pytest.mark.parametrize("answer", [SKIP, ROLL_BACK])
def test_train_more_bad_steps_in_a_row_than_allowed_stop_the_run(
    make_config: MakeConfig,
    marked_store: Path,
    tokenizer_dir: Path,
    tmp_path: Path,
    answer: dict[str, str],
) -> None:
    fields = {"data__store_dir": str(marked_store), **CROPS, **answer, "optim__max_bad_steps": 2}
    config = make_config(**fields)
    bad = [mark_at(config, 4 * step) for step in (0, 2, 3, 4)]
    model = write_broken_model(tmp_path / "model", tokenizer_dir, "".join(bad))
    config = make_config(**fields, model__path=str(model))
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="in a row: 3"):
            run_here(config)
        assert [(r["step"], r["answer"] == "stop") for r in incidents(config)] == [
            (1, False),
            (3, False),
            (4, False),
            (5, True),
        ]


def test_train_rollback_goes_on_behind_the_bad_step_from_the_weights_before(
    make_marked: MakeConfig,
) -> None:
    fields = {"checkpoint__every_steps": 3, "checkpoint__keep_last": 9, "eval__every_steps": None}
    config, skipped = make_marked("back", **ROLL_BACK, **fields), make_marked("skip", **SKIP)
    run_here(config)
    run_here(skipped)
    assert tensors_at(config, 5) == tensors_at(config, 3)
    assert tensors_at(config, 6) != tensors_at(config, 5)
    state = state_at(config, 6)
    assert (state.num_bad_steps, state.num_undone_steps, state.rollback_step) == (1, 1, 6)
    # Each step is there once and reads what it would have read.
    assert curve(config, TARGET_TOKENS) == curve(skipped, TARGET_TOKENS)
    assert curve(config, BAD_STEPS) == [1.0, 1.0]
    assert incidents(config)[0]["rollback_step"] == 3


def test_train_rollback_in_the_first_steps_goes_back_to_the_start(
    make_marked: MakeConfig,
) -> None:
    fields = {"checkpoint__every_steps": 99, "checkpoint__keep_last": 9, "eval__every_steps": None}
    config = make_marked(**ROLL_BACK, **fields)
    run_here(config)
    assert tensors_at(config, 5) == tensors_at(config, 0)
    assert state_at(config, 5).num_undone_steps == 4


def test_train_rollback_forgets_the_best_step_that_it_took_back(make_marked: MakeConfig) -> None:
    fields = {"checkpoint__every_steps": 3, "checkpoint__keep_last": 9, "eval__every_steps": 1}
    config = make_marked(**ROLL_BACK, **fields, checkpoint__keep_best=False)
    run_here(config)
    losses = curve(config, EVAL_LOSS)
    assert losses[4] < losses[3] == min(losses[:4])
    # The fifth step goes back to the third one's weights.
    assert losses[5] == losses[3]
    state = state_at(config, 5)
    assert (state.best_step, state.best_loss) == (3, losses[3])


@pytest.mark.parametrize(("unwritten", "back_to"), [("step-00000004", 2), ("step-00000002", 4)])
def test_train_rollback_to_a_checkpoint_that_was_not_written_takes_the_one_before(
    make_marked: MakeConfig, monkeypatch: pytest.MonkeyPatch, unwritten: str, back_to: int
) -> None:
    fields = {"checkpoint__every_steps": 2, "checkpoint__keep_last": 9, "eval__every_steps": None}
    config = make_marked(**ROLL_BACK, **fields)
    FullDisk(monkeypatch, times=1, name=unwritten)
    run_here(config)
    assert not checkpoint_path(config.run_place, int(unwritten[-1])).exists()
    assert tensors_at(config, 5) == tensors_at(config, back_to)
    assert state_at(config, 5).rollback_step == 5
    assert state_at(config, 5).num_undone_steps == 4 - back_to
    assert incidents(config)[0]["rollback_step"] == back_to


def test_train_rollback_without_any_checkpoint_ends_by_name(
    make_marked: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"checkpoint__every_steps": 99, "eval__every_steps": None}
    config = make_marked(**ROLL_BACK, **fields)
    FullDisk(monkeypatch, times=1)
    with pytest.raises(CheckpointError, match=r"no intact checkpoint of step 0 or before"):
        run_here(config)


class KilledError(Exception):
    """Stands for a kill: whatever was not written by then is not there."""


def kill_after(config: PretrainConfig, steps: int) -> None:
    """Start a run, and end it as a kill would."""
    left = iter(range(steps))

    def kill() -> bool:
        if next(left, None) is None:
            raise KilledError
        return False

    with pytest.raises(KilledError):
        train(config, ProcessGroup.single_process(), kill)


def end_of(config: PretrainConfig) -> tuple[Any, ...]:
    """Return all that a run has come to, but for times."""
    state = replace(state_at(config, 8), seconds=0.0)
    return state, saved_adapter(config), curve(config), incidents(config)


@pytest.mark.parametrize("answer", [SKIP, ROLL_BACK])
def test_train_ended_before_or_behind_a_bad_step_equals_one_that_was_not(
    make_marked: MakeConfig, answer: dict[str, str]
) -> None:
    # A stop's checkpoint is the only one kept, but for that of a rollback.
    fields = {"max_steps": 8, "checkpoint__every_steps": 3, "checkpoint__keep_last": 1}
    fields |= {**answer, "lora__dropout": 0.1}
    whole = make_marked("whole", **fields)
    run_here(whole)
    for steps in (4, 5):
        killed, stopped = (make_marked(f"{how}{steps}", **fields) for how in ("killed", "stopped"))
        kill_after(killed, steps)
        # A stop saves a checkpoint that the other run does not have.
        run_here(stopped, stop_after=steps)
        for config in (killed, stopped):
            run_here(config)
            assert end_of(config) == end_of(whole), config.run_dir


@pytest.mark.parametrize(
    "strategy",
    [
        "fsdp",
        "zero_2",
        # Takes as long as the other two together, and DeepSpeed is tried by zero_2.
        pytest.param("zero_3", marks=pytest.mark.slow),
    ],
)
def test_train_rollback_on_two_workers_equals_a_resumed_one(
    make_marked: MakeConfig, two: Group, strategy: str
) -> None:
    fields = {**ROLL_BACK, **STRATEGIES[strategy], "lora__dropout": 0.1, "max_steps": 8}
    whole, parts = make_marked("whole", **fields), make_marked("parts", **fields)
    two.run(whole)
    two.run(parts, stop_after=5)
    two.run(parts)
    assert end_of(parts) == end_of(whole)


@pytest.mark.parametrize("answer", [SKIP, ROLL_BACK])
def test_train_of_nothing_but_bad_steps_fails_with_the_counts_and_writes_no_result(
    make_config: MakeConfig,
    marked_store: Path,
    tokenizer_dir: Path,
    tmp_path: Path,
    answer: dict[str, str],
) -> None:
    model = write_broken_model(tmp_path / "model", tokenizer_dir, MARKS)
    fields = {"data__store_dir": str(marked_store), **CROPS, **answer, "max_steps": 4}
    config = make_config(model__path=str(model), **fields)
    # Fewer than max_bad_steps; and the same command cannot make a result of them either.
    for _ in range(2):
        with pytest.raises(FloatingPointError, match=r"none of the 4 steps .*4 had a non-finite"):
            run_here(config)
        assert not (config.run_place / "pt_lora_model").exists()


def test_train_with_some_bad_steps_finishes_and_warns_of_their_number(
    make_marked: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_marked(**SKIP)
    assert run_here(config).status == "finished"
    (told,) = [m for m in caplog.messages if "steps have not updated the weights" in m]
    assert told.startswith("1 of 6 steps")
    manifest = (config.run_place / "pt_lora_model/manifest.json").read_json()
    assert manifest["run"]["bad_steps"] == 1


@pytest.mark.parametrize(
    ("state", "num_kept"),
    [
        (RunState(step=3, num_skipped_steps=3), 0),
        (RunState(step=5, num_bad_steps=2, num_skipped_steps=1, num_undone_steps=2), 0),
        (RunState(step=5, num_bad_steps=2, num_skipped_steps=1, num_undone_steps=1), 1),
    ],
)
def test_check_updates_counts_steps_without_effect_of_every_kind(
    state: RunState, num_kept: int
) -> None:
    assert state.num_kept_steps == num_kept
    if num_kept:
        check_updates(state, ALONE)
        return
    with pytest.raises(FloatingPointError, match=f"none of the {state.step} steps"):
        check_updates(state, ALONE)


def test_state_after_rollback_counts_each_undone_step_once() -> None:
    start = RunState(step=0)
    # Step 1 was good, 2 bad; the checkpoint after that rollback could not be written.
    once = state_after_rollback(replace(start, step=2, num_bad_steps=1), start)
    assert once.num_undone_steps == 1
    # Step 3 was good, 4 bad.
    again = state_after_rollback(replace(once, step=4, num_bad_steps=2), start)
    assert (again.num_undone_steps, again.num_kept_steps) == (2, 0)
