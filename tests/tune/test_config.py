from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raytune_llama.config.command_line import default_config
from raytune_llama.config.settings import ConfigError, load, write_yaml
from raytune_llama.tune.config import SweepConfig, load_base
from raytune_llama.tune.sweep import check_sweep
from tests.tune.conftest import SPACE, MakeSweep


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"space": {}}, "space: got no field"),
        ({"space": {"run_dir": {"choice": ["a"]}}}, r"space\.run_dir: the sweep sets it"),
        (
            {"space": {"scale.num_workers": {"choice": [1, 2]}}},
            r"space\.scale\.num_workers: affects",
        ),
        ({"fixed": {"max_steps": 3}}, r"fixed\.max_steps: the sweep sets it"),
        ({"fixed": {"lora": {"rank": 8}}}, r"fixed\.lora\.rank: also in space"),
        ({"scheduler": {"kind": "pbt"}}, "checkpoints.*use asha, median or none"),
        ({"scheduler": {"kind": "ahsa"}}, "wanted none, asha or median"),
        ({"scheduler": {"grace_steps": 12}}, "a trial has 12 steps"),
        ({"num_trials": None}, "num_trials: required"),
        ({"num_trials": 0}, "num_trials"),
        ({"max_steps": 0}, "max_steps"),
    ],
)
def test_sweep_that_cannot_be_is_refused_by_its_field(
    make_sweep: MakeSweep, fields: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        make_sweep(**fields)


def test_base_has_the_sweeps_steps_and_what_is_fixed(make_sweep: MakeSweep) -> None:
    sweep = make_sweep(fixed={"eval.every_steps": 2, "scale": {"num_workers": 2}})
    base = load_base(sweep)
    assert (base.max_steps, base.num_epochs, base.eval.every_steps) == (12, None, 2)
    assert base.scale.num_workers == 2
    assert base.checkpoint.every_steps == 2  # the file's


def test_demo_sweep_finds_its_base_in_any_folder_and_a_file_there_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    demo = load(SweepConfig, [], default=default_config("sweep_smollm2.yaml"))
    assert load_base(demo).run_dir == "runs/sft"
    write_yaml(replace(load_base(demo), run_dir="runs/own"), tmp_path / demo.base)
    assert load_base(demo).run_dir == "runs/own"


def test_base_that_is_wrong_is_named_with_its_problems(
    make_sweep: MakeSweep, tmp_path: Path
) -> None:
    sweep = make_sweep(fixed={"lora.rnk": 8})
    with pytest.raises(ConfigError, match=r"fixed: lora\.rnk: .*did you mean lora\.rank"):
        load_base(sweep)
    (tmp_path / "base.yaml").write_text("run_dir: x\nmax_steps: many\n")
    with pytest.raises(ConfigError, match=r"base: .*base\.yaml: max_steps: got 'many'"):
        load_base(sweep)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"metric": "eval/accuracy"}, "metric: got eval/accuracy"),
        ({"fixed": {"eval.every_steps": 12}}, "no evaluation could stop it"),
        ({"fixed": {"eval.every_steps": None}}, "no evaluation could stop it"),
        ({"scheduler": {"grace_steps": 4}}, "a multiple of base's eval.every_steps, 3"),
    ],
)
def test_plan_without_a_number_to_compare_is_refused(
    make_sweep: MakeSweep, fields: dict[str, Any], problem: str
) -> None:
    sweep = make_sweep(**fields)
    with pytest.raises(ConfigError, match=problem):
        check_sweep(sweep, load_base(sweep))


def test_plan_of_trials_that_run_to_their_end_needs_no_evaluation_between(
    make_sweep: MakeSweep,
) -> None:
    sweep = make_sweep(fixed={"eval.every_steps": None}, scheduler={"kind": "none"})
    check_sweep(sweep, load_base(sweep))


def test_override_on_the_command_line_reaches_a_dotted_name(
    make_sweep: MakeSweep, tmp_path: Path
) -> None:
    write_yaml(make_sweep(), tmp_path / "sweep.yaml")
    arguments = [str(tmp_path / "sweep.yaml"), "space.lora.rank={choice: [4]}", "num_trials=2"]
    sweep = load(SweepConfig, arguments)
    assert sweep.space["lora.rank"].choice == (4,)
    assert set(sweep.space) == set(SPACE)
    assert sweep.num_trials == 2
