"""Jobs on Ray: every row once and in order, whatever happens to the driver."""

import json
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import ConfigError, to_yaml
from raytune_llama.generate.batch import generate, identify, resolve_paths
from raytune_llama.generate.config import GenerateConfig
from raytune_llama.generate.prompts import read_prompts
from raytune_llama.generate.worker import describe_model
from raytune_llama.storage.place import Place
from tests.generate.conftest import MakeConfig, Record, TinyModel, answer
from tests.pipeline.conftest import own_cluster
from tests.terminal import ROOT, Terminal

NUM_ROWS = 80


def mixed_rows() -> str:
    """Return rows of mixed lengths, one of them too long and one without a prompt."""
    rows: list[Record] = [
        {"id": f"r{number}", "instruction": "the fox " * (number % 5 + 1), "output": "dog"}
        for number in range(23)
    ]
    rows[7]["instruction"] = "the lazy dog " * 200
    del rows[11]["instruction"]
    return "".join(json.dumps(row) + "\n" for row in rows)


def read_output(config: GenerateConfig) -> list[Record]:
    assert config.run_dir is not None
    text = (Path(config.run_dir) / "outputs.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def num_kept(config: GenerateConfig) -> int:
    assert config.run_dir is not None
    files = (Path(config.run_dir) / "parts").glob("*.jsonl")
    return sum(file.read_bytes().count(b"\n") for file in files)


@pytest.mark.ray
def test_output_of_two_workers_is_in_the_order_of_the_input(
    ray_cluster: str, make_config: MakeConfig
) -> None:
    scale = {"num_workers": 2, "cpus_per_worker": 1}
    config = make_config(mixed_rows(), suffix="jsonl", model={"max_context": 128}, scale=scale)
    summary = generate(config)
    records = read_output(config)
    assert [record["index"] for record in records] == list(range(23))
    assert [record.get("id") for record in records if record["index"] != 11] == [
        f"r{number}" for number in range(23) if number != 11
    ]
    assert records == answer(config)
    assert {record["finish_reason"] for record in (records[7], records[11])} == {
        "too_long",
        "unusable",
    }
    counts = summary.manifest["counts"]
    assert sum(counts["finish_reasons"].values()) == 23
    assert (counts["rows"], counts["too_long"], counts["unusable"]) == (23, 1, 1)
    assert counts["output_tokens"] == sum(record["num_output_tokens"] for record in records)
    assert [row["index"] for row in summary.manifest["unanswered"]] == [7, 11]
    assert summary.manifest["files"]["outputs.jsonl"] == summary.output.hash()
    assert not (Path(str(config.run_dir)) / "parts").exists()
    # The same command again: nothing is generated, and nothing is written.
    before = summary.output.status()
    assert generate(config).manifest == summary.manifest
    assert summary.output.status() == before


@pytest.mark.ray
def test_sampled_output_does_not_depend_on_the_number_of_workers(
    ray_cluster: str, make_config: MakeConfig
) -> None:
    sampling = {"temperature": 1.0, "top_p": 0.9, "max_new_tokens": 8}
    text = "\n".join(f"the fox {number}" for number in range(20))
    config = make_config(
        text, sampling=sampling, scale={"num_workers": 2, "cpus_per_worker": 1, "slots": 3}
    )
    generate(config)
    assert read_output(config) == answer(config)


@pytest.mark.ray
def test_mistake_that_only_a_worker_sees_is_the_users(
    ray_cluster: str, make_config: MakeConfig, tiny: TinyModel, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for file in tiny.adapter.iterdir():
        if file.name != "manifest.json":
            (adapter / file.name).write_bytes(file.read_bytes())
    weights = load_file(adapter / "adapter_model.safetensors")
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, adapter / "adapter_model.safetensors")
    config = make_config("the fox\n", model={"adapter": str(adapter)})
    with pytest.raises(UserError, match=r"(?i)nan|finite"):
        generate(config)


@pytest.mark.ray
def test_worker_that_no_node_can_hold_is_refused(ray_cluster: str, make_config: MakeConfig) -> None:
    config = make_config("the fox\n", scale={"cpus_per_worker": 1000})
    with pytest.raises(ConfigError, match=r"^scale\.cpus_per_worker: a worker needs 1000 CPU"):
        generate(config)


def start_recorded(config: GenerateConfig) -> None:
    """Write the identity of a job, as its start does."""
    config = resolve_paths(config)
    assert config.input is not None
    prompts = read_prompts(config.input, with_prompt=config.with_prompt, system=config.system)
    known = identify(config, describe_model(config), prompts, {})
    (Place.local(Path(str(config.run_dir))) / "identity.json").write_json(known)


@pytest.mark.parametrize(
    ("fields", "text", "named"),
    [
        ({"sampling": {"seed": 2}}, "a\nb\n", r"config\.sampling\.seed: 1 -> 2"),
        ({"preset": "belle"}, "a\nb\n", r"config\.preset: None -> 'belle'"),
        ({}, "a\nc\n", r"input\.input\.txt: "),
        ({"model": {"template": "belle"}}, "a\nb\n", r"template\.name: 'tokenizer' -> 'belle'"),
        ({"with_prompt": False}, "a\nb\n", r"config\.with_prompt: True -> False"),
        ({"scale": {"engine": "transformers"}}, "a\nb\n", r"engine: 'auto' -> 'transformers'"),
    ],
)
def test_resume_with_other_settings_or_input_is_refused_before_ray_starts(
    make_config: MakeConfig, fields: dict[str, Any], text: str, named: str
) -> None:
    start_recorded(make_config("a\nb\n"))
    with pytest.raises(ConfigError, match="was started with other settings or inputs") as caught:
        generate(make_config(text, **fields))
    assert any(re.match(named, problem) for problem in caught.value.problems), str(caught.value)


def test_directory_of_another_job_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"run_dir: .* has the output of another job"):
        generate(make_config("a\n"))


@pytest.fixture
def long_config(make_config: MakeConfig, endless_dir: Path) -> GenerateConfig:
    """A job of some seconds per block; a block has a row."""
    return make_config(
        "".join(f"the fox {number}\n" for number in range(NUM_ROWS)),
        model={"path": str(endless_dir)},
        sampling={"max_new_tokens": 400},
        scale={"slots": 2, "cpus_per_worker": 1},
    )


def command_of(config: GenerateConfig, folder: Path) -> list[str]:
    file = folder / "job.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    return [sys.executable, str(ROOT / "jobs" / "generate.py"), str(file)]


@pytest.mark.ray
@pytest.mark.slow  # Two Ray clusters.
def test_killed_job_is_locked_while_it_runs_and_resumes_without_a_lost_or_doubled_row(
    long_config: GenerateConfig, tmp_path: Path
) -> None:
    command = command_of(long_config, tmp_path)
    with Terminal(command, environment=own_cluster()) as terminal:
        terminal.wait_until(lambda: num_kept(long_config) > 3)
        with pytest.raises(ConfigError, match="is locked by another driver"):
            generate(long_config)
        terminal.process.send_signal(signal.SIGKILL)
        terminal.process.wait()
    kept = num_kept(long_config)
    assert 0 < kept < NUM_ROWS
    done = subprocess.run(
        command, capture_output=True, text=True, env=own_cluster(), check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert f"{kept} of {NUM_ROWS} rows are finished" in done.stderr
    assert read_output(long_config) == answer(replace(long_config))


@pytest.mark.ray
@pytest.mark.slow  # Two Ray clusters.
def test_ctrl_c_exits_75_and_the_same_command_resumes(
    long_config: GenerateConfig, tmp_path: Path
) -> None:
    command = command_of(long_config, tmp_path)
    with Terminal(command, environment=own_cluster()) as terminal:
        terminal.wait_until(lambda: num_kept(long_config) > 0)
        terminal.press_ctrl_c()
        assert terminal.wait() == 75
    assert "stopped: finished rows are kept" in terminal.printed
    assert "to resume: python " in terminal.printed
    assert "Traceback" not in terminal.printed
    kept = num_kept(long_config)
    with Terminal(command, environment=own_cluster()) as terminal:
        assert terminal.wait() == 0, terminal.printed
    assert f"{kept} of {NUM_ROWS} rows are finished" in terminal.printed
    assert [record["index"] for record in read_output(long_config)] == list(range(NUM_ROWS))
