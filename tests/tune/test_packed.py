"""Promise: a sweep that cannot be packed is refused by field name before Ray starts."""

from typing import Any

import pytest

from raytune_llama.config.settings import ConfigError
from raytune_llama.tune.journal import Journal, SlotUse
from raytune_llama.tune.sweep import run_sweep
from tests.train.conftest import fields_of
from tests.tune.conftest import MakeSweep

RATE = {"optim.learning_rate": {"loguniform": [1e-4, 1e-1]}}


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ({"fixed": {"engine.strategy": "fsdp"}}, ["engine.strategy"]),
        ({"fixed": {"train": "full", "lora": None}, "space": RATE}, ["lora"]),
        (
            {"fixed": {"lora.dora": True, "engine.strategy": "fsdp"}},
            ["engine.strategy", "lora.dora"],
        ),
        (
            {"space": {**RATE, "engine.precision": {"choice": ["fp32", "bf16"]}}},
            ["space.engine.precision"],
        ),
    ],
)
def test_sweep_that_cannot_be_packed_is_refused_by_field(
    make_sweep: MakeSweep, fields: dict[str, Any], refused: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        run_sweep(make_sweep(pack=2, **fields))
    assert fields_of(caught.value.problems) == refused


def test_journal_read_again_knows_when_each_trial_was_in_a_pack(make_sweep: MakeSweep) -> None:
    place = make_sweep().place
    journal = Journal(place)
    for number in range(3):
        journal.start(number, {})
        journal.join(number, 0, number)
    journal.report(2, 4, 3.0, 1.0)
    journal.end(0, "finished")
    journal.join(1, 0, 1)
    again = Journal(place).trials
    assert again == journal.trials
    first, second, third = (again[number].slot_uses for number in range(3))
    assert [(use.pack, use.slot) for use in first] == [(0, 0)]
    assert first[0].ended is not None
    assert first[0].ended >= first[0].started
    # It still trains, and was there at its last evaluation at least.
    assert third[0].ended is not None
    # It was interrupted before its first evaluation, and joined again.
    assert second == (
        SlotUse(0, 1, second[0].started, None),
        SlotUse(0, 1, second[1].started, None),
    )
