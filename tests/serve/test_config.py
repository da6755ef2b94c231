"""What the arguments of `serve run` and of an application's YAML become."""

from pathlib import Path

import pytest

from raytune_llama.config.settings import ConfigError
from raytune_llama.config.yaml12 import read_mapping
from raytune_llama.serve.config import (
    ServedModelConfig,
    read_arguments,
    read_gateway_arguments,
)

REPOSITORY = Path(__file__).resolve().parents[2]


def test_arguments_of_a_command_line_are_numbers_where_numbers_are_wanted() -> None:
    config = read_arguments(
        {"model_dir": "some/model", "replicas.max": "3", "replicas.cpus": "0.5"}
    )
    assert config.models == (ServedModelConfig(path="some/model"),)
    assert (config.replicas.max, config.replicas.cpus) == (3, 0.5)


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


def test_several_models_in_the_delivered_file_are_read_once_uncommented(tmp_path: Path) -> None:
    text = (REPOSITORY / "serve" / "config.yaml").read_text(encoding="utf-8")
    head, _, commented = text.partition("\n# Several models:")
    lines = commented.split("\n#\n", 1)[1].splitlines()
    file = tmp_path / "config.yaml"
    applications = "\n".join(line.removeprefix("# ") for line in lines)
    file.write_text(head.partition("applications:")[0] + "applications:\n" + applications)
    data, problems = read_mapping(file)
    assert data is not None
    assert not problems
    *models, front = data["applications"]
    names = read_gateway_arguments(front["args"]).models
    for name, one in zip(names, models, strict=True):
        config = read_arguments(one["args"])
        assert one["route_prefix"] == f"/{name}"
        assert [model.served_name for model in config.models] == [name]
        assert config.shared_limits_app == front["name"]


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
