"""Promise: what is wrong with a run is said before it starts, all at once, by field."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from raytune_llama.config.settings import ConfigError, override
from raytune_llama.storage.place import Place
from raytune_llama.train.identity import (
    check_identity,
    identify,
    placement_changes,
    write_identity,
)
from raytune_llama.train.preflight import resolve_places
from tests.faulty_s3 import FaultyServer
from tests.train.conftest import MakeConfig, fields_of, problems_of, write_model


def test_resolve_places_relative_becomes_absolute(
    make: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = make(
        run_dir="runs/a",
        model__path="m",
        model__tokenizer="t",
        data__store_dir="s",
        data__sources=[{"path": "c/*.txt"}, {"path": "/d"}],
    )
    resolved = resolve_places(config, in_job=False)
    assert resolved.run_dir == str(tmp_path / "runs/a")
    assert (resolved.model.path, resolved.model.tokenizer) == (
        str(tmp_path / "m"),
        str(tmp_path / "t"),
    )
    assert resolved.data.store_dir == str(tmp_path / "s")
    assert [source.path for source in resolved.data.sources] == [str(tmp_path / "c/*.txt"), "/d"]
    adapter = make(lora=None, adapter="a")
    assert resolve_places(adapter, in_job=False).adapter == str(tmp_path / "a")


def test_resolve_places_in_a_job_outputs_have_to_be_absolute(make: MakeConfig) -> None:
    inputs = {"model__path": "m", "data__sources": [{"path": "c"}]}
    absolute = make(**inputs)
    assert Path(resolve_places(absolute, in_job=True).model.path).is_absolute()
    relative = make(**inputs, run_dir="runs/a", data__store_dir="stores/b")
    with pytest.raises(ConfigError) as caught:
        resolve_places(relative, in_job=True)
    first, second = caught.value.problems
    assert first.startswith("run_dir: ")
    assert "run_dir=/shared/runs/a" in first
    assert second.startswith("data.store_dir: ")
    assert "data.store_dir=/shared/stores/b" in second


def test_resolve_places_in_a_job_home_is_absolute(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    resolved = resolve_places(make(run_dir="~/runs/a"), in_job=True)
    assert resolved.run_dir == "/home/someone/runs/a"


@pytest.mark.parametrize("in_job", [True, False])
def test_resolve_places_object_storage_is_kept_where_it_can_be_read(
    make: MakeConfig, *, in_job: bool
) -> None:
    options = "?endpoint_override=host:1&scheme=http"
    places = {
        "run_dir": f"s3://b/r{options}",
        "data__store_dir": "gs://b/s",
        "data__sources": [{"path": f"s3://b/**/*.txt{options}"}],
        "model__path": "gs://b/m",
        "model__tokenizer": f"s3://b/t{options}",
    }
    config = make(**places)
    assert resolve_places(config, in_job=in_job) == config
    adapter = make(**places, lora=None, adapter="s3://b/a")
    assert resolve_places(adapter, in_job=in_job) == adapter
    misspelled = {"data__cache_dir": "s3://b/c", "lora": None, "adapter": "s3:/b/a"}
    with pytest.raises(ConfigError) as caught:
        resolve_places(make(**(places | misspelled)), in_job=in_job)
    assert sorted(fields_of(caught.value.problems)) == ["adapter", "data.cache_dir"]


def test_resolve_places_in_a_job_relative_cache_is_refused(make: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"^data\.cache_dir: .*data\.cache_dir=/local/copies"):
        resolve_places(make(data__cache_dir="copies"), in_job=True)
    resolved = resolve_places(make(data__cache_dir="copies"), in_job=False)
    assert resolved.data.cache_dir is not None
    assert Path(resolved.data.cache_dir).is_absolute()


def test_check_run_sound_config_passes(make: MakeConfig) -> None:
    assert problems_of(make()) == []


def test_check_run_reports_all_problems_at_once(
    make: MakeConfig, tmp_path: Path, tokenizer_dir: Path
) -> None:
    run_dir = tmp_path / "foreign"
    run_dir.mkdir()
    (run_dir / "thesis.tex").write_text("")
    config = make(
        "foreign",
        lora__targets=["q_proj", "qproj"],
        lora__modules_to_save=["wte"],
        data__sources=[{"path": str(tmp_path / "no" / "*.txt")}],
    )
    problems = problems_of(config)
    assert [p.split(": ")[0] for p in problems] == [
        "lora.targets",
        "lora.modules_to_save",
        "data.sources.0.path",
        "run_dir",
    ]
    assert "'qproj'" in problems[0]
    assert "q_proj" in problems[0]
    lost = override(config, {"model.path": str(tmp_path / "no"), "model.tokenizer": None})
    assert fields_of(problems_of(lost)) == [
        "model.path",
        "data.sources.0.path",
        "tokenizer",
        "run_dir",
    ]


def test_check_run_missing_tokenizer_is_said_once(make: MakeConfig, tmp_path: Path) -> None:
    bare = write_model(tmp_path / "bare")
    problems = problems_of(make(model__path=str(bare)))
    assert fields_of(problems) == ["tokenizer"]


@pytest.mark.parametrize("text", ["{", "{}", '{"model_type": "nope"}', '{"model_type": "t5"}'])
def test_check_run_config_that_is_no_causal_lm_is_a_problem_of_its_path(
    make: MakeConfig, model_dir: Path, tmp_path: Path, text: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model_dir, broken)
    (broken / "config.json").write_text(text)
    problems = problems_of(make(model__path=str(broken), lora__targets=["qproj"]))
    assert "model.path" in fields_of(problems)


def test_check_run_adapter_without_weights_is_refused(make: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    config = make(lora=None, adapter=str(tmp_path / "adapter"))
    assert fields_of(problems_of(config)) == ["adapter"]


def test_check_run_run_dir_that_is_a_file_is_refused(make: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    (problem,) = problems_of(make())
    assert problem.startswith(f"run_dir: {tmp_path / 'run'} is a file")


def test_check_run_folder_of_an_interrupted_start_passes(make: MakeConfig, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    (run_dir / ".probe-0123").mkdir(parents=True)
    (run_dir / "data" / "store").mkdir(parents=True)
    assert problems_of(make(data__store_dir=str(run_dir / "data" / "store"))) == []
    (run_dir / "store.partial-0123").mkdir()
    assert fields_of(problems_of(make(data__store_dir=str(run_dir / "store")))) == ["run_dir"]
    shutil.rmtree(run_dir / "data")
    assert problems_of(make(data__store_dir=str(run_dir / "store"))) == []


def test_check_run_in_object_storage_only_a_run_or_nothing_passes(
    make: MakeConfig, s3_path: Place
) -> None:
    config = make(run_dir=str(s3_path / "run"), data__store_dir=str(s3_path / "run/data/store"))
    assert problems_of(config) == []
    (s3_path / "run/.probe-0123/driver").write_bytes(b"")
    (s3_path / "run/data/store/train.arrow").write_bytes(b"")
    assert problems_of(config) == []
    (s3_path / "run/thesis.tex").write_bytes(b"")
    assert fields_of(problems_of(config)) == ["run_dir"]
    (s3_path / "run/identity.json").write_json({})
    assert problems_of(config) == []


def test_check_run_missing_bucket_is_a_problem_of_each_field(make: MakeConfig, s3: Place) -> None:
    missing = Place(s3.scheme, "no-such-bucket", s3.options)
    config = make(run_dir=str(missing / "run"), data__store_dir=str(missing / "store"))
    problems = problems_of(config)
    assert sorted(fields_of(problems)) == ["data.store_dir", "run_dir"]
    assert all("there is no bucket no-such-bucket" in problem for problem in problems)


def test_check_run_wrong_credentials_are_a_problem_of_each_field(
    make: MakeConfig, s3_path: Place, faulty_s3: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0)
    place = faulty_s3.front_of(s3_path)
    problems = problems_of(make(run_dir=str(place / "run"), data__store_dir=str(place / "store")))
    assert sorted(fields_of(problems)) == ["data.store_dir", "run_dir"]
    assert all("credentials" in problem for problem in problems)


def test_check_identity_changed_learning_rate_is_refused_with_both_values(
    make: MakeConfig, run_dir: Place
) -> None:
    config = make(run_dir=str(run_dir))
    write_identity(config, identify(config))
    check_identity(config.run_place, identify(config))
    changed = make(run_dir=str(run_dir), optim__learning_rate=0.02, seed=7)
    with pytest.raises(ConfigError) as caught:
        check_identity(config.run_place, identify(changed))
    head, *lines = caught.value.problems
    assert head.startswith("run_dir: ")
    assert lines == ["config.optim.learning_rate: 0.01 -> 0.02", "config.seed: 1 -> 7"]


def test_check_identity_changed_weight_is_refused_by_field(
    make: MakeConfig, source: dict[str, Any]
) -> None:
    config = make(data__sources=[{**source, "weight": 1}])
    write_identity(config, identify(config))
    changed = make(data__sources=[{**source, "weight": 2}])
    with pytest.raises(ConfigError, match=r"data\.sources\.0\.weight: 1\.0 -> 2\.0"):
        check_identity(config.run_place, identify(changed))
    renamed = make(data__sources=[{**source, "weight": 1, "name": "other"}])
    check_identity(config.run_place, identify(renamed))


def test_check_identity_placement_may_change(make: MakeConfig) -> None:
    config = make()
    write_identity(config, identify(config))
    changed = make(
        scale__num_workers=2,
        engine__strategy="fsdp",
        batch__micro_batch_sequences=1,
        checkpoint__every_steps=3,
        eval__every_steps=None,
        data__store_dir="/elsewhere",
    )
    check_identity(config.run_place, identify(changed))
    elastic = make(scale__num_workers={"min": 1, "max": 2}, batch__micro_batch_sequences=1)
    check_identity(config.run_place, identify(elastic))


def test_check_identity_new_run_dir_passes(make: MakeConfig) -> None:
    config = make()
    check_identity(config.run_place, identify(config))


def test_check_identity_moved_model_is_the_same_and_other_weights_are_not(
    make: MakeConfig, model_dir: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(model_dir, first)
    config = make(model__path=str(first))
    write_identity(config, identify(config))
    first.rename(second)
    moved = make(model__path=str(second))
    check_identity(config.run_place, identify(moved))
    write_model(second, seed=1)
    with pytest.raises(ConfigError, match=r"model\.model\.safetensors: "):
        check_identity(config.run_place, identify(moved))


def test_check_identity_part_that_came_later_is_compared(make: MakeConfig) -> None:
    config = make()
    write_identity(config, {**identify(config), "store": "a" * 64})
    with pytest.raises(ConfigError, match="store: "):
        check_identity(config.run_place, {**identify(config), "store": "b" * 64})


def test_write_identity_makes_the_folder_a_run(make: MakeConfig, run_dir: Place) -> None:
    config = make(run_dir=str(run_dir))
    write_identity(config, identify(config))
    assert problems_of(config) == []
    assert (run_dir / "identity.json").read_json() == identify(config)
    assert placement_changes(config, config.run_place / "run.yaml") == []


def test_placement_changes_names_field_and_both_values(make: MakeConfig) -> None:
    config = make()
    write_identity(config, identify(config))
    changed = make(scale__num_workers=2, logging__every_steps=3)
    assert placement_changes(changed, config.run_place / "run.yaml") == [
        "scale.num_workers: 1 -> 2",
        "logging.every_steps: 10 -> 3",
    ]
    elastic = make(scale__num_workers={"min": 1, "max": 2})
    assert placement_changes(elastic, config.run_place / "run.yaml") == [
        "scale.num_workers: 1 -> (not given)",
        "scale.num_workers.min: (not given) -> 1",
        "scale.num_workers.max: (not given) -> 2",
        "scale.num_workers.grow_seconds: (not given) -> 30.0",
    ]


@pytest.mark.parametrize("text", ["{", "- a", "no_such_field: 1\n", ""])
def test_write_identity_unreadable_run_yaml_is_written_anew(make: MakeConfig, text: str) -> None:
    config = make()
    write_identity(config, identify(config))
    file = config.run_place / "run.yaml"
    file.write_bytes(text.encode())
    assert len(placement_changes(config, file)) == 1
    write_identity(config, identify(config))
    assert placement_changes(config, file) == []
