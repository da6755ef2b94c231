"""prepare-data builds the store of its own config, and the one that a training config describes."""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raytune_llama.config.settings import ConfigError, from_dict, load
from raytune_llama.config.yaml12 import dump
from raytune_llama.data.config import ChatDataConfig, DataConfig
from raytune_llama.train.config import PretrainConfig, SftConfig
from raytune_llama.train.data_section import load_preparation

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"


def write(tmp_path: Path, data: dict[str, Any]) -> str:
    (tmp_path / "job.yaml").write_text(dump(data))
    return str(tmp_path / "job.yaml")


def training(path: str = "rows.jsonl", **fields: Any) -> dict[str, Any]:  # noqa: ANN401
    data = {"sources": [{"path": path}], "store_dir": "store"}
    return {"run_dir": "run", "model": {"path": "base"}, "data": data, **fields}


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("sft_*.yaml")), ids=lambda path: path.stem)
def test_load_preparation_of_every_sft_config_has_the_data_of_its_run(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without these folders, models/llama-7b-chat could be a model on the hub.
    for folder in ("models", "demo"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path)
    job = load_preparation([str(file)])
    run = load(SftConfig, [str(file)])
    assert job.resolve_data() == run.encoded_data
    assert job.config.data == run.encoded_data
    assert job.config.tokenizer == run.model.tokenizer_path


@pytest.mark.parametrize(
    "file", sorted(CONFIGS.glob("pretrain_*.yaml")), ids=lambda path: path.stem
)
def test_load_preparation_of_every_pretrain_config_has_the_data_of_its_run(file: Path) -> None:
    job = load_preparation([str(file), "preview=true"])
    run = load(PretrainConfig, [str(file)])
    assert job.config.data == run.encoded_data
    assert job.config.tokenizer == run.model.tokenizer_path
    assert job.config.preview


def test_load_preparation_caps_conversations_as_the_run_does(tmp_path: Path) -> None:
    data = training(batch={"sequence_tokens": 77}, allow_other_template=True)
    job = load_preparation([write(tmp_path, data)])
    assert isinstance(job.config.data, ChatDataConfig)
    assert job.config.data.chat.max_tokens == 77
    with pytest.raises(ConfigError, match=r"data\.chat\.max_tokens: got 99.*sequence_tokens, 77"):
        load_preparation([write(tmp_path, data), "data.chat.max_tokens=99"])


def test_load_preparation_ignores_other_sections_and_names_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # None of these would start a run: both lora and adapter, no steps, a typo.
    data = training(
        lora={"rnk": 1},
        adapter="x",
        optim={"learning_rate": -1},
        data={
            "sources": [{"path": "a.jsonl"}],
            "store_dir": "store",
            "chat": {"template": "alpaca"},
        },
    )
    with caplog.at_level(logging.INFO, logger="raytune_llama"):
        job = load_preparation([write(tmp_path, data)])
    assert isinstance(job.config.data, ChatDataConfig)
    (line,) = caplog.messages
    assert "`raytune sft`" in line
    assert line.endswith("not used: run_dir, lora, adapter, optim")


def test_load_preparation_reports_mistakes_of_the_data_section(tmp_path: Path) -> None:
    data = training()
    data["data"] = {"sources": [{"path": "a.jsonl", "fields": {"answer": "b"}}], "stor_dir": "s"}
    data["model"] = {}
    with pytest.raises(ConfigError) as caught:
        load_preparation([write(tmp_path, data), "rows=conversations", "batch.sequence_tokens=1"])
    named = {problem.partition(":")[0] for problem in caught.value.problems}
    assert named >= {"data.stor_dir", "data.store_dir", "model.path", "batch.sequence_tokens"}


def test_load_preparation_refuses_a_tokenizer_beside_that_of_the_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer: got 'other'.*model\.tokenizer"):
        load_preparation([write(tmp_path, training()), "tokenizer=other"])


def own(data: dict[str, Any]) -> dict[str, Any]:
    return {"tokenizer": "base", "data": {"store_dir": "store", **data}}


@pytest.mark.parametrize(
    ("data", "cls"),
    [
        ({"sources": [{"path": "a.jsonl"}], "chat": {}}, ChatDataConfig),
        ({"sources": [{"path": "a.jsonl"}], "validation": [{"path": "b.jsonl"}]}, ChatDataConfig),
        ({"sources": [{"path": "a.jsonl", "format": "alpaca"}]}, ChatDataConfig),
        ({"sources": [{"path": "a.jsonl", "format": "jsonl"}]}, DataConfig),
        ({"sources": [{"path": "a.jsonl"}], "eos": False}, DataConfig),
        ({"sources": [{"path": "none/*.jsonl"}]}, DataConfig),
    ],
)
def test_load_preparation_chooses_the_kind_of_rows_by_the_fields(
    tmp_path: Path, data: dict[str, Any], cls: type
) -> None:
    job = load_preparation([write(tmp_path, own(data))])
    assert type(job.config.data) is cls
    assert job.resolve_data() == from_dict(cls, own(data)["data"])


@pytest.mark.parametrize(
    ("row", "cls"),
    [
        ('{"instruction": "a", "output": "b"}', ChatDataConfig),
        ('{"text": "a", "question": "b", "answer": "c"}', DataConfig),
        ('{"text": "a"}', DataConfig),
    ],
)
@pytest.mark.parametrize("is_run", [False, True])
def test_load_preparation_chooses_the_kind_of_rows_by_the_first_one_if_fields_fit_both(
    tmp_path: Path, row: str, cls: type, *, is_run: bool
) -> None:
    (tmp_path / "rows.jsonl").write_text(f"\n{row}\n")
    path = str(tmp_path / "rows.jsonl")
    data = training(path) if is_run else own({"sources": [{"path": path}]})
    assert type(load_preparation([write(tmp_path, data)]).config.data) is cls
    assert type(load_preparation([write(tmp_path, data), "preview=true"]).config.data) is cls
    other, name = (
        (DataConfig, "text") if cls is ChatDataConfig else (ChatDataConfig, "conversations")
    )
    assert type(load_preparation([write(tmp_path, data), f"rows={name}"]).config.data) is other


def test_load_preparation_of_conversations_with_a_typo_names_its_field(tmp_path: Path) -> None:
    data = own({"sources": [{"path": "a.jsonl"}], "chat": {"tempalte": "alpaca"}})
    with pytest.raises(ConfigError) as caught:
        load_preparation([write(tmp_path, data)])
    (problem,) = caught.value.problems
    assert problem.startswith("data.chat.tempalte: no such field; did you mean")


@pytest.mark.parametrize("section", ["data.chat", "data.validation", "data.cleaning"])
def test_load_preparation_help_has_the_fields_of_both_kinds(
    section: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        load_preparation(["--help", section])
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith((section, " ")) for line in lines if line)
    assert len(lines) > 5


def test_prepare_data_of_a_training_config_names_a_missing_model(tmp_path: Path) -> None:
    file = tmp_path / "sft.yaml"
    file.write_text(
        f"model: {{path: {tmp_path}/missing}}\nrun_dir: r\ndata:\n  store_dir: {tmp_path}/store\n"
        f"  sources: [{{path: {file}}}]\n"
    )
    program = "from raytune_llama.cli import main; main()"
    command = [sys.executable, "-c", program, "prepare-data", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"{tmp_path}/missing" in done.stderr
    assert "this is a config of" not in done.stderr
