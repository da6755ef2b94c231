"""What the arguments of `serve run` and of an application's YAML become."""

from pathlib import Path

import pytest

from raytune_llama.config.settings import ConfigError
from raytune_llama.config.yaml12 import read_mapping
from raytune_llama.serve.config import ServedModelConfig, read_arguments

REPOSITORY = Path(__file__).resolve().parents[2]


def test_arguments_of_a_command_line_are_numbers_where_numbers_are_wanted() -> None:
    config = read_arguments({"model_dir": "some/model", "replicas.max": "3", "gateways": "1"})
    assert config.models == (ServedModelConfig(path="some/model"),)
    assert (config.replicas.max, config.gateways) == (3, 1)


def test_arguments_of_a_file_may_be_nested() -> None:
    models = [{"path": "a", "name": "x"}, {"path": "b", "max_context": 64}]
    config = read_arguments({"models": models, "replicas": {"min": 0, "max": 2}, "keys_file": None})
    assert [model.served_name for model in config.models] == ["x", "b"]
    assert (config.models[1].max_context, config.replicas.min) == (64, 0)


def test_the_file_that_is_delivered_is_read() -> None:
    data, problems = read_mapping(REPOSITORY / "serve" / "config.yaml")
    assert data is not None
    assert not problems
    config = read_arguments(data["applications"][0]["args"])
    assert [model.served_name for model in config.models] == ["smollm2"]
    assert data["http_options"]["host"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "models"),
        ({"model_dir": "a", "models": [{"path": "b"}]}, "model_dir"),
        ({"models": [{"path": "x/a"}, {"path": "y/a"}]}, "duplicate name a"),
        ({"models": [{"path": "a", "name": "a:b"}]}, "name"),
        ({"model_dir": "a", "replicas.min": "3", "replicas.max": "2"}, "more than max"),
        ({"model_dir": "a", "replicas.slots": "many"}, "slots"),
        ({"model_dir": "a", "colour": "red"}, "colour"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_arguments(arguments)
