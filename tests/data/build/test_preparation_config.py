"""Promise: all mistakes of a data config are told at once, before Ray is asked for anything."""

from pathlib import Path

import pytest

from raytune_llama.config.settings import ConfigError, from_dict, identity, load
from raytune_llama.data.config import DataConfig, PrepareDataConfig
from tests.conftest import train_tokenizer
from tests.data.stores import build_store

REPOSITORY = Path(__file__).parents[3]


def test_prepare_data_many_mistakes_are_reported_together(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(tmp_path / "tokenizer", special=False)
    source = {"path": str(tmp_path / "none.txt")}
    data = {"sources": [source], "store_dir": "ftp://host/store", "bos": True}
    with pytest.raises(ConfigError) as caught:
        build_store(from_dict(DataConfig, data), tokenizer)
    starts = [problem.split(":")[0] for problem in caught.value.problems]
    assert starts == ["data.sources.0.path", "data.store_dir", "data.bos", "data.eos"]


def test_prepare_data_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    data = {"sources": [{"path": str(tmp_path / "a.txt")}], "store_dir": str(tmp_path / "store")}
    with pytest.raises(ConfigError, match=r"^tokenizer: "):
        build_store(from_dict(DataConfig, data), tmp_path)


def test_data_config_moved_paths_and_other_workers_keep_the_identity() -> None:
    data = {"sources": [{"path": "/a/x.txt"}], "store_dir": "/a/store"}
    moved = {"sources": [{"path": "/b/x.txt"}], "store_dir": "/b/store", "num_workers": 3}
    first, second = (identity(from_dict(DataConfig, one)) for one in (data, moved))
    assert first == second
    assert identity(from_dict(DataConfig, {**data, "eos": False})) != first


def test_default_config_of_the_job_is_valid() -> None:
    path = REPOSITORY / "jobs" / "configs" / "prepare_data_smollm2.yaml"
    assert load(PrepareDataConfig, [str(path)]).data.bos == "auto"
