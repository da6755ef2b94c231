"""Promise: a config that makes no sense is refused by field, with all that is wrong in it."""

from pathlib import Path
from typing import Any

import pytest

from raytune_llama.config.fields import walk_fields
from raytune_llama.config.settings import (
    ConfigError,
    changeable_fields,
    describe,
    from_dict,
    identity,
    load,
    to_dict,
)
from raytune_llama.train.config import PretrainConfig, SftConfig


def values(**fields: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return a config of three steps; keywords replace its fields by dotted path."""
    plain: dict[str, Any] = {
        "run_dir": "/runs/a",
        "model": {"path": "/models/a"},
        "data": {"sources": [{"path": "/corpus"}], "store_dir": "/stores/a"},
        "lora": {},
        "max_steps": 3,
    }
    for field, value in fields.items():
        *parents, last = field.split("__")
        place = plain
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return plain


def problems_of(**fields: Any) -> list[str]:  # noqa: ANN401
    try:
        from_dict(PretrainConfig, values(**fields))
    except ConfigError as error:
        return error.problems
    return []


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_steps": None, "num_epochs": 0.5},
        {"lora": None, "adapter": "/adapters/a"},
        {"lora": None, "train": "full"},
        {"lora": None, "train": "embeddings"},
        {"lora": None, "train": "embeddings", "embeddings": {"new_rows_only": True}},
        {"batch__sequences_per_step": 6, "batch__micro_batch_sequences": 3},
        {"scale__num_workers": 4, "batch__micro_batch_sequences": 2},
        {"scale__num_workers": {"min": 1, "max": 8}},
        {"scale__num_workers": {"min": 2, "max": 2}},
        {"engine__zero_stage": 3, "engine__offload_parameters": True},
        {"engine__zero_stage": 1, "engine__offload_optimizer": True},
        {"engine__precision": "fp16", "engine__strategy": "ddp"},
        {"engine__precision": "fp16", "engine__strategy": "fsdp"},
        {"engine__strategy": "fsdp", "engine__offload_parameters": True},
        {"engine__precision": "fp16", "scale__use_gpu": True},
        {"batch__packing": "packed", "batch__isolate_documents": False},
        {"batch__packing": "crops", "batch__isolate_documents": True},
        {"batch__packing": "seed_blocks", "batch__isolate_documents": False},
        {"data__sources": [{"path": "/a", "weight": 3}, {"path": "/b", "weight": 0.1}]},
        {"data__sources": [{"path": "/a", "weight": 1}]},
    ],
)
def test_pretrain_config_sensible_relations_are_accepted(fields: dict[str, Any]) -> None:
    assert problems_of(**fields) == []


@pytest.mark.parametrize(
    ("fields", "start"),
    [
        ({"max_steps": None}, "max_steps: "),
        ({"num_epochs": 1}, "max_steps: "),
        ({"train": "full"}, "train: "),
        ({"train": "full", "lora": None, "adapter": "/adapters/a"}, "train: "),
        ({"train": "embeddings"}, "train: embeddings"),
        ({"train": "embeddings", "lora": None, "adapter": "/adapters/a"}, "train: embeddings"),
        ({"embeddings__lm_head": True}, "embeddings: train is lora"),
        ({"train": "full", "lora": None, "embeddings__new_rows_only": True}, "embeddings: "),
        ({"lora": None}, "lora: "),
        ({"adapter": "/adapters/a"}, "lora: "),
        ({"batch__micro_batch_sequences": 3}, "batch.micro_batch_sequences: 3 "),
        ({"scale__num_workers": 9}, "scale.num_workers: 9 "),
        (
            {"scale__num_workers": 4, "batch__micro_batch_sequences": 4},
            "scale.num_workers: 4 workers with micro-batches of 4 ",
        ),
        ({"scale__num_workers": {"min": 1, "max": 9}}, "scale.num_workers.max: 9 "),
        ({"scale__num_workers": {"min": 3, "max": 2}}, "scale.num_workers.max: got 2"),
        ({"scale__num_workers": {"min": 1, "mox": 2, "max": 2}}, "scale.num_workers.mox: no such"),
        ({"scale__num_workers": {"min": 0, "max": 2}}, "scale.num_workers.min: got 0"),
        ({"scale__num_workers": "2"}, "scale.num_workers: got '2', wanted "),
        ({"engine__precision": "fp16"}, "engine.precision: "),
        ({"run_dir": ""}, "run_dir: "),
        ({"optim__learning_rate": 0}, "optim.learning_rate: "),
        ({"optim__learning_rat": 1}, "optim.learning_rat: "),
        ({"schedule__warmup_ratio": 1.0}, "schedule.warmup_ratio: "),
        ({"batch__sequence_tokens": 1}, "batch.sequence_tokens: "),
        ({"batch__packing": "crop"}, "batch.packing: "),
        (
            {"batch__packing": "seed_blocks", "batch__isolate_documents": True},
            "batch.isolate_documents: got true",
        ),
        (
            {"batch__packing": "crops", "batch__isolate_documents": False},
            "batch.isolate_documents: got false",
        ),
        ({"data__sources": [{"path": "/a", "name": "a/b"}]}, "data.sources.0.name: "),
        ({"data__sources": [{"path": "/a", "weight": 0}]}, "data.sources.0.weight: "),
        ({"data__sources": [{"path": "/x/a"}, {"path": "/y/a"}]}, "data.sources.1.name: 'a'"),
        (
            {"data__sources": [{"path": "/a"}, {"path": "/b", "weight": 1}]},
            "data.sources.0.weight: got null",
        ),
        # Three steps of eight sequences.
        (
            {"data__sources": [{"path": "/a", "weight": 1}, {"path": "/b", "weight": 0.01}]},
            "data.sources.1.weight: 0.01 of 1.01 is less than one sequence per block of 24",
        ),
        (
            {
                "data__sources": [{"path": "/a", "weight": 1}],
                "max_steps": None,
                "num_epochs": 1,
            },
            "num_epochs: got 1",
        ),
    ],
)
def test_pretrain_config_broken_relation_is_refused_by_field(
    fields: dict[str, Any], start: str
) -> None:
    (problem,) = problems_of(**fields)
    assert problem.startswith(start)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"zero_stage": 2, "offload_parameters": True}, "offload_parameters"),
        ({"zero_stage": 0}, "zero_stage"),
        ({"offload_parameters": True}, "offload_parameters"),
        ({"strategy": "ddp", "zero_stage": 2}, "zero_stage"),
        ({"strategy": "fsdp", "zero_stage": 3}, "zero_stage"),
        ({"strategy": "ddp", "offload_parameters": True}, "offload_parameters"),
        ({"strategy": "ddp", "offload_optimizer": True}, "offload_optimizer"),
        ({"strategy": "fsdp", "offload_optimizer": True}, "offload_optimizer"),
        ({"strategy": "ddp", "deepspeed": {"wall_clock_breakdown": True}}, "deepspeed"),
        ({"strategy": "fsdp", "deepspeed": {"wall_clock_breakdown": True}}, "deepspeed"),
    ],
)
def test_pretrain_config_setting_that_the_stage_would_ignore_is_refused(
    fields: dict[str, Any], field: str
) -> None:
    (problem,) = problems_of(engine=fields)
    assert problem.startswith("engine")
    assert field in problem


def test_pretrain_config_all_broken_relations_are_reported_together() -> None:
    problems = problems_of(
        max_steps=None, lora=None, scale__num_workers=99, engine__precision="fp16"
    )
    assert [problem.partition(":")[0] for problem in problems] == [
        "max_steps",
        "lora",
        "scale.num_workers",
        "engine.precision",
    ]


def test_pretrain_config_micro_batch_message_names_what_divides() -> None:
    fields = {"batch__sequences_per_step": 12, "batch__micro_batch_sequences": 5}
    (problem,) = problems_of(**fields)
    assert "1, 2, 3, 4, 6, 12" in problem


@pytest.mark.parametrize(
    ("packing", "isolate", "form", "evaluation_form"),
    [
        ("packed", None, "isolated", "isolated"),
        ("packed", False, "joined", "joined"),
        ("crops", None, "crops", "isolated"),
        ("seed_blocks", None, "seed_blocks", "joined"),
    ],
)
def test_batch_config_form_follows_packing_and_isolation(
    packing: str,
    isolate: bool | None,  # noqa: FBT001
    form: str,
    evaluation_form: str,
) -> None:
    fields = values(batch__packing=packing, batch__isolate_documents=isolate)
    batch = from_dict(PretrainConfig, fields).batch
    assert (batch.form, batch.evaluation_form) == (form, evaluation_form)


def test_pretrain_config_survives_plain_data() -> None:
    config = from_dict(PretrainConfig, values())
    assert from_dict(PretrainConfig, to_dict(config)) == config


def test_describe_pretrain_config_explains_every_field() -> None:
    lines = describe(PretrainConfig).splitlines()
    paths = [path for path, _ in walk_fields(PretrainConfig)]
    assert len(paths) > 50
    for path, field in walk_fields(PretrainConfig):
        (at,) = [i for i, line in enumerate(lines) if line.startswith(f"{path}: ")]
        assert field.description
        assert lines[at + 1].strip() == field.description.splitlines()[0].strip()


def test_pretrain_config_identity_holds_what_decides_the_result_and_nothing_else() -> None:
    kept = identity(from_dict(PretrainConfig, values()))
    assert set(kept) == {
        "train",
        "lora",
        "embeddings",
        "model",
        "batch",
        "optim",
        "schedule",
        "max_steps",
        "num_epochs",
        "stop_step",
        "seed",
        "engine",
    }
    assert set(kept["batch"]) == {
        "sequence_tokens",
        "sequences_per_step",
        "packing",
        "isolate_documents",
    }
    assert set(kept["engine"]) == {"precision"}


def test_pretrain_config_result_name_says_what_was_trained() -> None:
    assert from_dict(PretrainConfig, values()).result_name == "pt_lora_model"
    for train in ("full", "embeddings"):
        whole = values(train=train, lora=None)
        assert from_dict(PretrainConfig, whole).result_name == "pt_model"


@pytest.mark.parametrize("name", ["pretrain_smollm2", "pretrain_stage1_smollm2"])
def test_pretrain_config_files_of_the_jobs_are_valid(name: str) -> None:
    path = Path(__file__).parents[2] / "jobs" / "configs" / f"{name}.yaml"
    assert load(PretrainConfig, [str(path)]).model.path == "demo/model"


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("scale__num_workers", 2, "scale.num_workers to 2 at most"),
        ("batch__micro_batch_sequences", 2, "batch.micro_batch_sequences=2"),
        ("batch__sequences_per_step", 16, "batch.sequences_per_step=16"),
    ],
)
def test_pretrain_config_more_workers_than_micro_batches_names_what_to_set(
    field: str, value: int, named: str
) -> None:
    fields = {"scale__num_workers": 4, "batch__micro_batch_sequences": 4}
    (problem,) = problems_of(**fields)
    assert named in problem
    assert problems_of(**{**fields, field: value}) == []


def test_fields_that_may_change_on_resume_are_inherited_but_not_through_what_is_fingerprinted() -> (
    None
):
    placed = set(changeable_fields(SftConfig))
    assert {"scale.watch.factor", "run_dir", "data.sources.N.path", "data.store_dir"} <= placed
    assert {"eval.every_steps", "checkpoint.keep_last", "eval.tasks.N.path"} <= placed
    fixed = {"optim.learning_rate", "batch.sequence_tokens", "seed", "data.sources.N.weight"}
    fixed |= {
        "data",
        "data.chat.template",
        "eval.texts",
        "eval.texts.N.weight",
        "eval.tasks.N.shots",
    }
    assert not fixed & placed
    marked = [line for line in describe(SftConfig).splitlines() if "may change on resume" in line]
    assert {line.partition(":")[0] for line in marked} == placed


def test_relations_are_checked_although_other_fields_are_wrong() -> None:
    either = "max_steps: set either max_steps or num_epochs, and the other to null"
    assert problems_of(lora__rnk=16, max_steps=None) == [
        "lora.rnk: no such field; did you mean lora.rank?",
        either,
    ]
    problems = problems_of(optim__learning_rate="fast", max_steps=None)
    assert problems == ["optim.learning_rate: got 'fast', wanted a valid number", either]


def test_relations_of_a_field_that_is_wrong_itself_are_not_guessed() -> None:
    assert problems_of(max_steps="fast") == ["max_steps: got 'fast', wanted a valid integer"]
    assert problems_of(max_steps=None, max_stpes=24) == [
        "max_stpes: no such field; did you mean max_steps?"
    ]
    assert problems_of(batch__sequences_per_step="many", scale__num_workers=16) == [
        "batch.sequences_per_step: got 'many', wanted a valid integer"
    ]
