"""Promise: a finished run is called so only if it is what is asked for, and says what follows."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raytune_llama.config.settings import ConfigError, override, to_dict
from raytune_llama.config.yaml12 import read_value
from raytune_llama.data.build.preparation import describe_inputs, open_data
from raytune_llama.data.store.manifest import fingerprint_of
from raytune_llama.model.lora import ADAPTER_WEIGHTS
from raytune_llama.storage.files import read_json, write_json_atomic
from raytune_llama.storage.place import Place
from raytune_llama.train.config import PretrainConfig
from raytune_llama.train.export import read_result
from raytune_llama.train.identity import check_run, identify, write_identity
from raytune_llama.train.monitoring.metrics import (
    EVAL_BITS_PER_BYTE,
    EVAL_LOSS,
    EVAL_TEXT_BITS_PER_BYTE,
)
from raytune_llama.train.result import RunResult
from raytune_llama.train.trainer import run_training
from tests.train.conftest import (
    MakeConfig,
    curve,
    make_texts,
    problems_of,
    run_here,
    write_store,
)

MakeFinished = Callable[..., PretrainConfig]


def adopt_store(config: PretrainConfig, tokenizer_dir: Path) -> None:
    """Write a token store that is taken for the one of the config's sources."""
    path = Path(config.data.store_dir)
    texts = make_texts(132, seed=0)
    write_store(path, tokenizer_dir, train=[texts[:120]], validation=[texts[120:]])
    data = open_data(config.data, Path(config.model.tokenizer_path))
    inputs = describe_inputs(config.data, data)
    manifest = read_json(path / "manifest.json")
    manifest |= {"inputs": inputs, "fingerprint": fingerprint_of(inputs)}
    write_json_atomic(path / "manifest.json", manifest)


@pytest.fixture
def make_finished(make: MakeConfig, tokenizer_dir: Path, tmp_path: Path) -> MakeFinished:
    """Train a run to its end, as its driver would have left it."""

    def finish(**fields: Any) -> PretrainConfig:  # noqa: ANN401
        fields = {
            "data__store_dir": str(tmp_path / "store"),
            "data__validation_fraction": 0.1,
            "data__bos": True,
            **fields,
        }
        config = make(**fields)
        adopt_store(config, tokenizer_dir)
        write_identity(config, identify(config))
        run_here(config)
        return config

    return finish


def problems_of_start(config: PretrainConfig) -> list[str]:
    """Return why a run is not started or not called finished."""
    with pytest.raises(ConfigError) as caught:
        run_training(config)
    return caught.value.problems


def overrides_in(problems: list[str]) -> dict[str, Any]:
    """Return the overrides of the command that the last problem ends with."""
    words = shlex.split(problems[-1].rpartition("the same config with ")[2])
    values: dict[str, Any] = {}
    for word in words:
        field, _, text = word.partition("=")
        value, wrong = read_value(text)
        assert not wrong, problems[-1]
        values[field] = value
    return values


def test_finished_run_started_again_says_so_with_step_and_loss_of_the_best(
    make_finished: MakeFinished,
) -> None:
    config = make_finished()
    losses = curve(config, EVAL_LOSS)
    run = run_training(config)
    assert (run.status, run.step, run.result_step) == ("already finished", 6, 6)
    assert (run.loss_before, run.loss_after) == (losses[0], losses[-1])
    best = 3 * losses.index(min(losses))
    assert run.best_step == best
    assert run.result_line is not None
    assert f"{run.result}" in run.result_line
    assert f"{min(losses):.4f}" in run.result_line


def test_finished_run_says_what_became_of_the_held_out_text(
    make_finished: MakeFinished, tokenizer_dir: Path, tmp_path: Path
) -> None:
    texts = make_texts(9, seed=7)
    (tmp_path / "held_out.txt").write_text("\n".join(texts))
    write_store(tmp_path / "texts", tokenizer_dir, train=[texts])
    fields = {
        "eval__texts": [{"path": str(tmp_path / "held_out.txt")}],
        "eval__store_dir": str(tmp_path / "texts"),
    }
    config = make_finished(**fields)
    run = run_training(config)
    values = curve(config, EVAL_TEXT_BITS_PER_BYTE)
    assert (run.text_before, run.text_after) == (values[0], values[-1])
    bits = curve(config, EVAL_BITS_PER_BYTE)
    verdict = "better" if values[-1] < values[0] else "worse"
    assert run.evaluation_line == (
        f"bits per byte: {bits[0]:.4f} -> {bits[-1]:.4f}; text {values[0]:.4f} -> "
        f"{values[-1]:.4f} bits per byte: {verdict} than before tuning"
    )


def test_finished_run_of_the_best_step_describes_the_evaluation_of_that_step(
    make_finished: MakeFinished,
) -> None:
    fields = {"optim__learning_rate": 1.0, "schedule__warmup_ratio": 0.9, "max_steps": 12}
    config = make_finished(**fields, eval__every_steps=1, checkpoint__result="best")
    run = run_training(config)
    assert run.result_step != 12
    assert run.loss_after == run.best_loss != curve(config, EVAL_LOSS)[-1]


def test_finished_run_of_the_best_step_keeps_its_last_step_apart(
    make_finished: MakeFinished,
) -> None:
    fields = {"optim__learning_rate": 1.0, "schedule__warmup_ratio": 0.9, "max_steps": 12}
    config = make_finished(**fields, eval__every_steps=1, checkpoint__result="best")
    run = run_training(config)
    losses = curve(config, EVAL_LOSS)
    best = losses.index(min(losses))
    assert 0 < best < 12
    assert (run.step, run.result_step, run.best_step) == (12, best, best)
    # The other step is no more the result because it is asked for now.
    other = override(config, {"checkpoint.result": "last"})
    (problem,) = problems_of_start(other)
    assert problem.startswith("checkpoint.result: got last, which is step 12, ")
    assert f"step {best}" in problem
    # What the message says makes it so.
    result = config.run_place / config.result_name
    assert f"delete {result}" in problem
    result.delete()
    run_here(other)
    assert run_training(other).result_step == 12


@pytest.mark.parametrize("is_store_kept", [True, False])
def test_finished_run_with_edited_data_is_not_finished(
    make_finished: MakeFinished, *, is_store_kept: bool
) -> None:
    config = make_finished()
    corpus = Path(config.data.sources[0].path)
    text = corpus.read_text()
    corpus.write_text(text + "one more line\n")
    if not is_store_kept:
        Place.local(Path(config.data.store_dir)).delete()
    head, changed, more = problems_of_start(config)
    assert head.startswith(f"run_dir: {config.run_dir} is finished, but its data has changed")
    assert "data.store_dir" in head
    assert (corpus.name in changed) == is_store_kept
    assert config.data.store_dir in changed
    assert overrides_in([more])["adapter"] == str(config.run_place / config.result_name)
    # The same text again is the same data.
    corpus.write_text(text)
    assert run_training(config).status == "already finished"


def test_finished_run_with_other_settings_of_its_data_is_not_finished(
    make_finished: MakeFinished,
) -> None:
    config = make_finished()
    changed = override(config, {"data.eos": False})
    problems = problems_of_start(changed)
    assert "its data has changed" in problems[0]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"train": "full", "lora": None, "optim__learning_rate": 1e-3},
        {"train": "embeddings", "lora": None},
        {"model__rope_scaling": {"type": "linear", "factor": 2.0}},
        {
            "train": "full",
            "lora": None,
            "optim__learning_rate": 1e-3,
            "model__rope_scaling": {"type": "linear", "factor": 2.0},
        },
    ],
)
def test_longer_run_is_refused_with_the_overrides_that_train_its_result_further(
    make_finished: MakeFinished, fields: dict[str, Any]
) -> None:
    config = make_finished(**fields)
    longer = override(config, {"max_steps": 10})
    head, line, more = problems_of_start(longer)
    assert head.startswith("run_dir: ")
    assert line == "config.max_steps: 6 -> 10"
    assert more.startswith("run_dir: to train longer, ")
    values = overrides_in([more])
    assert values["max_steps"] == 4
    following = override(longer, values)
    assert problems_of(following) == []
    check_run(following, identify(following))
    run_here(following)
    losses = curve(following, EVAL_LOSS)
    assert losses[0] == pytest.approx(curve(config, EVAL_LOSS)[-1], rel=1e-5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ({"max_steps": None, "num_epochs": 1.0}, {"num_epochs": 2.5}, {"num_epochs": 1.5}),
        ({"max_steps": 6}, {"max_steps": 0}, {}),
    ],
)
def test_run_of_another_length_is_refused_with_the_steps_that_are_missing(
    make: MakeConfig, before: dict[str, Any], after: dict[str, Any], named: dict[str, Any]
) -> None:
    config = make(**before)
    write_identity(config, identify(config))
    longer = override(config, after)
    with pytest.raises(ConfigError) as caught:
        check_run(longer, identify(longer))
    values = overrides_in(caught.value.problems)
    horizon = {field: values[field] for field in values if "step" in field or "epoch" in field}
    assert horizon == named
    # It has no result yet.
    assert "finish this run" in caught.value.problems[-1]
    if after.get("max_steps") == 0:
        assert "to evaluate its result" in caught.value.problems[-1]


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ({"max_steps": 4, "stop_step": 3}, {"stop_step": None}, {"max_steps": 1}),
        ({"max_steps": 6, "stop_step": 2}, {"stop_step": 3}, {"max_steps": 1, "stop_step": None}),
    ],
)
def test_finished_run_with_another_stop_step_is_refused_with_the_steps_that_are_missing(
    make_finished: MakeFinished,
    before: dict[str, Any],
    after: dict[str, Any],
    named: dict[str, Any],
) -> None:
    config = make_finished(**before)
    values = overrides_in(problems_of_start(override(config, after)))
    assert {field: values[field] for field in values if "step" in field} == named


def test_interrupted_run_may_end_at_another_step_and_equals_one_that_was_to_end_there(
    make_config: MakeConfig,
) -> None:
    alone = make_config("alone", max_steps=8, stop_step=5)
    run_here(alone)
    config = make_config("early", max_steps=8)
    write_identity(config, identify(config))
    run_here(config, stop_after=4)
    early = override(config, {"stop_step": 5})
    check_run(early, identify(early))
    write_identity(early, identify(early))
    assert run_here(early) == RunResult("finished", 5)
    weights = [Path(one.run_dir, one.result_name, ADAPTER_WEIGHTS) for one in (early, alone)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert curve(early, EVAL_LOSS) == curve(alone, EVAL_LOSS)
    # It has ended now.
    with pytest.raises(ConfigError, match="to train longer"):
        check_run(config, identify(config))


def test_run_that_was_killed_between_its_last_checkpoint_and_its_result_is_resumed(
    make_config: MakeConfig,
) -> None:
    config = make_config(max_steps=8, stop_step=4)
    write_identity(config, identify(config))
    run_here(config, stop_after=4)
    shutil.rmtree(Path(config.run_dir, config.result_name))
    check_run(config, identify(config))
    assert run_here(config) == RunResult("finished", 4)


def test_run_cannot_end_before_its_newest_checkpoint(make_config: MakeConfig) -> None:
    config = make_config(max_steps=8)
    write_identity(config, identify(config))
    run_here(config, stop_after=4)
    early = override(config, {"stop_step": 4})
    with pytest.raises(ConfigError) as caught:
        check_run(early, identify(early))
    assert caught.value.problems == [
        "stop_step: got 4, but the run's newest checkpoint is of step 4; set it to 5 or more"
    ]


def test_shorter_run_is_refused_without_a_way_to_continue(make: MakeConfig) -> None:
    config = make()
    write_identity(config, identify(config))
    shorter = override(config, {"max_steps": 3})
    with pytest.raises(ConfigError) as caught:
        check_run(shorter, identify(shorter))
    assert caught.value.problems[1:] == ["config.max_steps: 6 -> 3"]


def test_finished_run_whose_last_evaluation_is_not_finite_does_not_hide_it(
    make_finished: MakeFinished,
) -> None:
    config = make_finished()
    file = Path(config.run_dir, "metrics.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    last = [record for record in records if EVAL_LOSS in record][-1]
    last |= {name: None for name in last if name.startswith("eval/")}
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    run = run_training(config)
    assert run.evaluation_line is not None
    assert run.evaluation_line.endswith("-> nan")


def test_result_of_an_earlier_version_is_finished_without_facts_of_the_best(
    make_finished: MakeFinished,
) -> None:
    config = make_finished()
    file = config.run_place / config.result_name / "manifest.json"
    manifest = read_result(config)
    assert manifest is not None
    file.write_json({key: value for key, value in manifest.items() if key != "run"})
    run = run_training(override(config, {"checkpoint.result": "best"}))
    assert (run.status, run.step, run.best_step) == ("already finished", 6, None)
    assert run.result_line == f"result: {run.result} (step 6)"
    assert to_dict(config)["checkpoint"]["result"] == "last"
