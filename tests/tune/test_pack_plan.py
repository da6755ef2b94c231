"""Promise: a pack's memory is that of one base and of its runs, and `auto` fits into it."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from raytune_llama.train.estimate.pack import plan_pack
from raytune_llama.tune.pack_plan import choose_num_slots, render_sweep_plan
from tests.train.conftest import MakeConfig
from tests.tune.conftest import MakeSweep

LORA = {"lora__modules_to_save": []}


def test_plan_pack_adds_for_each_run_what_the_largest_needs(make_config: MakeConfig) -> None:
    small = make_config("small", **LORA, lora__rank=2)
    large = make_config("large", **LORA, lora__rank=8, batch__micro_batch_sequences=4)
    both, alone = plan_pack([small, large]), plan_pack([large])
    assert both == alone
    assert plan_pack([small]).slot < both.slot
    # The base is held once: K runs need less than K workers.
    assert both.total(4) < 4 * both.alone
    assert both.total(4) - both.total(3) == both.slot
    assert both.count_slots(both.total(5)) == 5
    assert both.count_slots(both.total(5) - 1) == 4
    assert both.count_slots(0) == 1


@pytest.mark.parametrize(
    ("spare", "num_packs", "wanted"), [(0, 1, 1), (3, 1, 3), (100, 1, 6), (100, 4, 2)]
)
def test_choose_num_slots_fills_the_memory_of_the_smallest_worker_and_all_packs(
    make_sweep: MakeSweep, make_config: MakeConfig, spare: int, num_packs: int, wanted: int
) -> None:
    config = make_config(**LORA)
    memory = plan_pack([config])
    small = 2 * (2**30 + memory.total(spare))
    nodes: list[dict[str, Any]] = [
        {"Alive": True, "Resources": {"CPU": 2.0, "memory": small}},
        {"Alive": True, "Resources": {"CPU": 2.0, "memory": 100 * small}},
        {"Alive": False, "Resources": {"CPU": 2.0, "memory": 1.0}},
    ]
    assert choose_num_slots(make_sweep(pack="auto"), [config], nodes, num_packs) == wanted
    assert choose_num_slots(make_sweep(pack=5), [config], nodes, num_packs) == 5


def test_plan_pack_counts_the_rows_of_a_grown_vocabulary(
    make_config: MakeConfig, tokenizer_dir: Path
) -> None:
    config = make_config(lora__modules_to_save=["embed_tokens"])
    # Not the one that other tests share.
    grown = AutoTokenizer.from_pretrained(tokenizer_dir)
    grown.add_tokens([f"added{number}" for number in range(500)])
    grown.save_pretrained(tokenizer_dir.with_name("grown"))
    larger = make_config(
        "larger",
        lora__modules_to_save=["embed_tokens"],
        model__tokenizer=str(tokenizer_dir.with_name("grown")),
    )
    # A row in fp32, its gradient, two moments, and the copies that a checkpoint is written from.
    assert plan_pack([larger]).slot - plan_pack([config]).slot >= 7 * 4 * 32 * 500


def test_render_sweep_plan_shows_the_memory_of_packs(
    make_sweep: MakeSweep, make_config: MakeConfig
) -> None:
    text = render_sweep_plan(make_sweep(pack=3), [make_config(**LORA)])
    assert "trials       6 of up to 12 steps" in text
    heads = next(line for line in text.splitlines() if "trials at a time" in line).split()
    assert heads[-6:] == ["1", "2", "3*", "4", "8", "16"]
    assert "pack=K" in render_sweep_plan(make_sweep(), [make_config(**LORA)])
