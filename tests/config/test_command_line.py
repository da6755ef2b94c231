"""Promise: a file of another job is named as such, and overrides never fill the demo's outputs."""

import logging
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from raytune_llama.cli import config_classes
from raytune_llama.config.command_line import describe_other_job, split_arguments
from raytune_llama.config.settings import ConfigError, from_dict, load, settings
from raytune_llama.config.yaml12 import read_mapping
from raytune_llama.data.config import PrepareDataConfig
from raytune_llama.train.config import PretrainConfig, SftConfig
from raytune_llama.tune.config import SweepConfig, load_base
from raytune_llama.vocabulary.config import ExpandVocabConfig

CONFIGS = next(
    path for path in Path(__file__).parents if (path / "pyproject.toml").is_file()
) / "jobs" / "configs"  # fmt: skip
JOBS = {
    "prepare_data": "prepare-data",
    "expand_vocab": "expand-vocab",
    "make_data": "make-data",
}


def job_of(file: Path) -> str:
    """Return the job that a shipped config is named after."""
    start = next((job for job in JOBS if file.name.startswith(job)), file.name.partition("_")[0])
    return JOBS.get(start, start)


def other_job(data: dict[str, Any], job: str) -> str | None:
    """Return what is said of a file that a job refuses, in place of the job's problems."""
    try:
        from_dict(config_classes()[job], data)
    except ConfigError as error:
        return describe_other_job(data, error.problems, job, config_classes())
    return describe_other_job(data, [], job, config_classes())


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_describe_other_job_of_a_shipped_config_names_its_job(file: Path) -> None:
    data, _ = read_mapping(file)
    assert data is not None
    assert other_job(data, job_of(file)) is None
    for job in {"pretrain", "sft", "sweep", "prepare-data", "merge"} - {job_of(file)}:
        line = other_job(data, job)
        # What has no field of its own may be either's.
        if line is None:
            assert {job, job_of(file)} == {"pretrain", "sft"}
            load({"pretrain": PretrainConfig, "sft": SftConfig}[job], [str(file)])
        else:
            assert f"`raytune {job_of(file)}`" in line
            assert "\n" not in line


def test_describe_other_job_names_what_does_not_fit() -> None:
    data, _ = read_mapping(CONFIGS / "sft_smollm2.yaml")
    assert data is not None
    line = other_job(data, "pretrain")
    assert line is not None
    assert "data.chat" in line
    line = other_job(data, "sweep")
    assert line is not None
    assert "sweep_dir" in line


def test_describe_other_job_of_a_later_problem_is_none() -> None:
    """What a job accepted is not questioned because one of its files is missing."""
    data, _ = read_mapping(CONFIGS / "sft_smollm2.yaml")
    assert data is not None
    problems = ["data.sources.0.path: demo/instructions/*.jsonl matches no file"]
    assert describe_other_job(data, problems, "prepare-data", config_classes()) is None


@pytest.mark.parametrize("change", [{"lora": {"rnk": 4}}, {"run_dir": None}, {}])
def test_describe_other_job_of_a_typo_or_an_own_config_is_none(change: dict[str, object]) -> None:
    data, _ = read_mapping(CONFIGS / "sft_smollm2.yaml")
    assert data is not None
    data |= change
    if data["run_dir"] is None:
        del data["run_dir"]
    assert other_job(data, "sft") is None


def test_sweep_base_of_another_job_is_named(tmp_path: Path) -> None:
    values = {
        "sweep_dir": str(tmp_path),
        "job": "pretrain",
        "base": str(CONFIGS / "sft_smollm2.yaml"),
        "space": {"optim.learning_rate": {"choice": [1e-4, 1e-3]}},
        "max_steps": 8,
        "num_trials": 2,
    }
    with pytest.raises(ConfigError) as caught:
        load_base(from_dict(SweepConfig, values))
    (problem,) = caught.value.problems
    assert problem.startswith("base: ")
    assert "`raytune sft`" in problem


def test_split_arguments_file_comes_first() -> None:
    assert split_arguments(["a.yaml", "b.c=1"]) == (Path("a.yaml"), ["b.c=1"])
    assert split_arguments(["trials/lr=1/run.yaml"]) == (Path("trials/lr=1/run.yaml"), [])
    assert split_arguments(["b.c=1"]) == (None, ["b.c=1"])
    assert split_arguments([]) == (None, [])


@pytest.mark.parametrize(
    ("cls", "name", "overrides", "fields", "outputs"),
    [
        (
            PretrainConfig,
            "pretrain_smollm2.yaml",
            ["data.sources=[{path: mine.txt}]"],
            ["data.sources"],
            ["run_dir=runs/mine", "data.store_dir=stores/mine"],
        ),
        (
            PretrainConfig,
            "pretrain_smollm2.yaml",
            ["data.sources.0.path=mine.txt", "data.store_dir=stores/own"],
            ["data.sources"],
            ["run_dir=runs/mine"],
        ),
        (
            SftConfig,
            "sft_smollm2.yaml",
            ["data.sources=[{path: mine.jsonl}]", "model.path=llama"],
            ["data.sources", "model.path"],
            ["run_dir=runs/mine", "data.store_dir=stores/mine"],
        ),
        (
            PrepareDataConfig,
            "prepare_data_smollm2.yaml",
            ["tokenizer=mine"],
            ["tokenizer"],
            ["data.store_dir=stores/mine"],
        ),
        (SweepConfig, "sweep_smollm2.yaml", ["base=my.yaml"], ["base"], ["sweep_dir=runs/mine"]),
        (
            ExpandVocabConfig,
            "expand_vocab_smollm2.yaml",
            ["model=llama"],
            ["model"],
            ["target=models/mine"],
        ),
    ],
)
def test_load_inputs_over_the_demos_outputs_are_refused_with_the_command(
    cls: type[object], name: str, overrides: list[str], fields: list[str], outputs: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(cls, overrides, default=CONFIGS / name, program="raytune verb")
    assert [problem.partition(":")[0] for problem in caught.value.problems] == fields
    command = caught.value.problems[-1].rpartition("raytune verb ")[2]
    for word in (*outputs, *(override.partition("=")[0] for override in overrides)):
        assert word in command
    # What the message says is accepted.
    accepted = load(cls, [*overrides, *outputs], default=CONFIGS / name, program="raytune verb")
    assert isinstance(accepted, cls)


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim.learning_rate=1e-4"],
        ["model.path=runs/stage1/pt_model", "run_dir=runs/stage2"],
        ["data.sources=[{path: mine.txt}]", "plan=true"],
    ],
)
def test_load_overrides_that_mix_nothing_name_the_config_that_is_used(
    overrides: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    default = CONFIGS / "pretrain_smollm2.yaml"
    load(PretrainConfig, overrides, default=default)
    (message,) = caplog.messages
    assert str(default) in message
    for override in overrides:
        assert override.partition("=")[0] in message


def test_load_named_file_says_nothing_of_the_default(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    @settings
    class Job:
        """A job."""

        tokenizer: str = "a"
        """An input."""
        run_dir: Annotated[str, Field(min_length=1)] = "runs/demo"
        """An output."""

    caplog.set_level(logging.INFO)
    (tmp_path / "own.yaml").write_text("tokenizer: b\n")
    (tmp_path / "demo.yaml").write_text("run_dir: runs/demo\n")
    argv = [str(tmp_path / "own.yaml"), "tokenizer=c"]
    assert load(Job, argv, default=tmp_path / "demo.yaml") == Job(tokenizer="c")
    assert caplog.messages == []
