"""The plan shows what does not fit into sequences, before and after the store is built."""

import json
from pathlib import Path
from typing import Any

import pytest

from raytune_llama.config.settings import from_dict, override
from raytune_llama.data.build.preparation import open_data
from raytune_llama.train.config import SftConfig
from raytune_llama.train.estimate.lengths import measure_lengths, render_lengths
from raytune_llama.train.estimate.plan import build_plan, render_plan
from tests.data.stores import build_store
from tests.train.conftest import MakeConfig


@pytest.fixture
def sft(tmp_path: Path, model_dir: Path) -> SftConfig:
    rows = [{"instruction": "fox " * n, "output": "dog " * (2 * n + 1)} for n in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values: dict[str, Any] = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(model_dir)},
        "data": {
            "sources": [{"path": str(tmp_path / "rows.jsonl")}],
            "store_dir": str(tmp_path / "store"),
            "chat": {"template": "belle"},
            "max_left_out_fraction": 1.0,
        },
        "lora": {"rank": 4},
        "batch": {"sequence_tokens": 60},
        "engine": {"precision": "fp32", "strategy": "ddp"},
        "max_steps": 60,
        "plan": True,
    }
    return from_dict(SftConfig, values)


def block_of(text: str) -> list[str]:
    """Return the lines about lengths of a plan."""
    lines = text.split("\n")
    start = next(n for n, line in enumerate(lines) if line.startswith("lengths "))
    return lines[start : lines.index("", start)]


def test_build_plan_of_conversations_without_a_store_shows_a_sample_of_lengths(
    sft: SftConfig, tmp_path: Path
) -> None:
    plan = build_plan(sft)
    lines = block_of(render_plan(plan))
    assert lines[0].endswith("conversations in a sample of the sources")
    limit = ["60", "tokens,", "batch.sequence_tokens;", "truncation:", "keep_eos"]
    assert lines[1].split() == ["limit", *limit]
    facts = dict(plan.lengths.facts())
    assert [line.split()[0] for line in lines[2:4]] == ["learned", "cut"]
    assert all(fact in "\n".join(lines) for fact in facts.values())
    assert plan.lengths.cut.total() > 3
    rows = [line.split() for line in lines if " to " in line]
    assert sum(int(row[3]) for row in rows) == plan.lengths.num_documents
    assert sum(int(row[5]) for row in rows) == plan.lengths.cut.total()
    assert sum(int(row[6]) for row in rows) == plan.lengths.left_out.total()
    assert all(len(line) <= 100 for line in lines)
    assert not (tmp_path / "store").exists()


def test_build_plan_of_conversations_that_all_are_too_long_says_so(sft: SftConfig) -> None:
    plan = build_plan(override(sft, {"batch.sequence_tokens": 8}))
    lines = block_of(render_plan(plan))
    assert lines[0].split()[:3] == ["lengths", "0", "conversations"]
    assert any("30 of 30 (100.0%)" in line for line in lines if line.startswith("  left out"))


@pytest.mark.ray
def test_measure_lengths_of_a_store_are_those_of_the_sample_of_a_small_corpus(
    sft: SftConfig, ray_cluster: str
) -> None:
    inputs = open_data(sft.encoded_data, Path(sft.model.path))
    sample = measure_lengths(inputs, None)
    table = measure_lengths(inputs, build_store(sft.encoded_data, Path(sft.model.path)))
    assert table.bins == sample.bins
    shown = list(render_lengths(sft, table))
    assert shown[0].endswith("conversations in the token store")
    assert shown[1:] == list(render_lengths(sft, sample))[1:]


def test_render_lengths_names_the_field_that_limits(sft: SftConfig) -> None:
    config = override(sft, {"data.chat.max_tokens": 40, "data.chat.truncation": "drop"})
    lines = block_of(render_plan(build_plan(config)))
    assert "40 tokens, data.chat.max_tokens; truncation: drop" in lines[1]


@pytest.mark.parametrize(
    ("packing", "what"),
    [("packed", "nothing is lost"), ("crops", "a step sees a part"), ("seed_blocks", "dropped")],
)
def test_build_plan_of_text_shows_the_share_of_long_documents_and_what_becomes_of_them(
    make_config: MakeConfig, tmp_path: Path, packing: str, what: str
) -> None:
    (tmp_path / "corpus.txt").write_text("fox\n" * 30 + "fox " * 300 + "\n" + "fox " * 400 + "\n")
    config = make_config(
        data__sources=[{"path": str(tmp_path / "corpus.txt")}],
        data__store_dir=str(tmp_path / "store"),
        batch__packing=packing,
        plan=True,
    )
    lines = block_of(render_plan(build_plan(config)))
    assert lines[0].endswith("32 documents in a sample of the sources")
    assert "6.2% have 24 tokens (batch.sequence_tokens) or more" in lines[1]
    assert what in lines[1]
    assert sum(int(line.split()[3]) for line in lines if " to " in line) == 32
