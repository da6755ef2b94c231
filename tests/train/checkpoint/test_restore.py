"""Promise: a checkpoint says the same to any number of workers under any strategy."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from raytune_llama.config.settings import from_dict, to_dict
from raytune_llama.storage.place import Place
from raytune_llama.train.checkpoint.config import CheckpointConfig
from raytune_llama.train.checkpoint.layout import checkpoint_path, list_checkpoints
from raytune_llama.train.checkpoint.restore import restore
from raytune_llama.train.checkpoint.saver import Saver
from raytune_llama.train.config import PretrainConfig
from raytune_llama.train.loop import open_session
from raytune_llama.train.monitoring.metrics import EVAL_LOSS, LOSS
from raytune_llama.train.process_group import ProcessGroup
from tests.train.conftest import MakeConfig, curve, run_here, stage_fields
from tests.train.group import Group
from tests.train.saved import ALONE, NoLog, assert_same_content, state_files

LORA: dict[str, Any] = {"lora__dropout": 0.0, "batch__micro_batch_sequences": 1}
FULL = {
    "train": "full",
    "lora": None,
    "optim__learning_rate": 1e-3,
    "batch__micro_batch_sequences": 1,
}
FSDP = {"engine__strategy": "fsdp"}
SAME = 1e-5
"""Relative difference allowed between worker counts and strategies in fp32."""


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    group = Group(4, tmp_path_factory.mktemp("four"))
    yield group
    group.close()


def resave(settings: dict[str, Any], source: Place, target: Place, workers: ProcessGroup) -> None:
    """Load a run's newest checkpoint and save it elsewhere."""
    session = open_session(from_dict(PretrainConfig, settings), workers)
    state = restore(source, session.engine, workers)
    with Saver(target, CheckpointConfig(), session.engine, workers, NoLog()) as saver:
        saver.save(state)


def without(strategies: dict[str, dict[str, Any]], precision: str) -> dict[str, dict[str, Any]]:
    """Leave out what DeepSpeed does not have: fp16 on CPUs."""
    if precision != "fp16":
        return strategies
    return {name: fields for name, fields in strategies.items() if "zero" not in name}


STRATEGIES = {
    "zero 1": stage_fields(1),
    "zero 2": stage_fields(2),
    "zero 3": stage_fields(3),
    # Parameters below the threshold stay whole on every worker.
    "zero 3 with small ones whole": {**stage_fields(3), "engine__deepspeed": {}},
    "fsdp": FSDP,
    "ddp": stage_fields(0),
}


@pytest.mark.parametrize(
    ("trained", "precision"),
    [
        pytest.param(LORA, "fp32", id="lora-fp32"),
        pytest.param(FULL, "bf16", id="full-bf16"),
        pytest.param(LORA, "fp16", id="lora-fp16"),
        # What is trained and the precision change a checkpoint apart from one another, and each
        # of both is above.
        pytest.param(FULL, "fp32", id="full-fp32", marks=pytest.mark.slow),
        pytest.param(LORA, "bf16", id="lora-bf16", marks=pytest.mark.slow),
        pytest.param(FULL, "fp16", id="full-fp16", marks=pytest.mark.slow),
    ],
)
def test_restore_under_another_strategy_has_every_number(
    make_config: MakeConfig, two: Group, trained: dict[str, Any], precision: str
) -> None:
    fields = {**trained, "engine__precision": precision}
    first = make_config("first", **fields, **stage_fields(0))
    two.run(first, stop_after=3)
    source = first.run_place
    for name, strategy in without(STRATEGIES, precision).items():
        # Each loads what the one before has saved.
        config = make_config(name, **{**fields, **strategy})
        two.call(partial(resave, to_dict(config), source, config.run_place))
        ours = checkpoint_path(config.run_place, 3)
        assert_same_content(ours, checkpoint_path(first.run_place, 3))
        source = config.run_place


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("trained", [LORA, FULL], ids=["lora", "full"])
def test_restore_on_other_workers_and_strategy_has_every_number(
    make_config: MakeConfig, two: Group, four: Group, trained: dict[str, Any], precision: str
) -> None:
    fields = {**trained, "engine__precision": precision}
    first = make_config("first", **fields, **(FSDP if precision == "fp16" else stage_fields(2)))
    two.run(first, stop_after=3)
    alone = make_config("alone", **fields, **stage_fields(0))
    resave(to_dict(alone), first.run_place, alone.run_place, ALONE)
    source = alone.run_place
    for name, strategy in without(STRATEGIES, precision).items():
        config = make_config(name, **{**fields, **strategy})
        four.call(partial(resave, to_dict(config), source, config.run_place))
        source = config.run_place
    back = make_config("back", **fields, **stage_fields(0))
    two.call(partial(resave, to_dict(back), source, back.run_place))
    for config in (alone, back):
        ours = checkpoint_path(config.run_place, 3)
        assert_same_content(ours, checkpoint_path(first.run_place, 3))


@pytest.mark.slow
@pytest.mark.parametrize("trained", [LORA, FULL], ids=["lora", "full"])
def test_train_on_two_then_one_then_four_workers_and_back_keeps_the_losses(
    make_config: MakeConfig, two: Group, four: Group, trained: dict[str, Any]
) -> None:
    reference = make_config("reference", **trained)
    run_here(reference)

    def under(strategy: dict[str, Any]) -> PretrainConfig:
        return make_config("parts", **{**trained, **strategy})

    two.run(under(stage_fields(2)), stop_after=1)
    run_here(under(stage_fields(0)), stop_after=2)
    four.run(under(stage_fields(3)), stop_after=1)
    two.run(under(FSDP))
    for name in (LOSS, EVAL_LOSS):
        ours, wanted = (curve(config, name) for config in (under(FSDP), reference))
        assert len(ours) == len(wanted) > 0
        assert ours == pytest.approx(wanted, rel=SAME)
    assert list_checkpoints(reference.run_place)


@pytest.mark.parametrize("number", [0, 1])
def test_restore_on_two_workers_sets_a_damaged_checkpoint_aside_whoever_reads_it(
    make_config: MakeConfig, two: Group, number: int
) -> None:
    whole, config = make_config("whole"), make_config("parts")
    two.run(whole)
    two.run(config, stop_after=5)
    newest = list_checkpoints(config.run_place)[-1]
    file = state_files(newest)[number]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    two.run(config)
    assert curve(config) == curve(whole)
    assert newest.with_name(f"{newest.name}.damaged").exists()
