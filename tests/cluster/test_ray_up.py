"""Promise: Ray's launcher accepts the configs of cluster/ray-up, and `ray start` their options."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts import scripts

from raytune_llama.config.settings import from_dict
from raytune_llama.train.orchestration.config import ScaleConfig
from raytune_llama.train.orchestration.resources import find_shortage

FOLDER = Path(__file__).parents[2] / "cluster" / "ray-up"
FILES = sorted(FOLDER.glob("*.yaml"))
CLOUDS = [path for path in FILES if path.stem != "local"]


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def start_commands(config: dict[str, Any]) -> list[str]:
    """Return the command lines that start a head and a worker."""
    commands = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    return [command for command in commands if "ray start" in command]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_is_valid_by_the_schema_of_ray(path: Path) -> None:
    validate_config(prepare_config(load(path)))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_with_an_unknown_key_is_not(path: Path) -> None:
    with pytest.raises(Exception, match="setup_comands"):
        validate_config(prepare_config(load(path) | {"setup_comands": []}))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nodes_start_with_token_and_a_dashboard_for_the_head_alone(path: Path) -> None:
    config = load(path)
    head, worker = start_commands(config)
    known = {option for parameter in scripts.start.params for option in parameter.opts}
    for command in (head, worker):
        options = {word.partition("=")[0] for word in shlex.split(command) if word.startswith("--")}
        assert options - known == set()
        assert "RAY_AUTH_MODE=token" in command
    assert "--dashboard-host=127.0.0.1" in head
    mounts = config["file_mounts"]
    assert [mounts[path] for path in mounts if path == "~/.ray/auth_token"] == [*mounts][:1]


@pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.stem)
def test_run_with_what_the_files_name_fits_on_the_spot_nodes(path: Path) -> None:
    """The head runs no worker; nodes with GPUs start from none, on spot instances."""
    config = load(path)
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"]["CPU"] == 0
    (spot,) = types.values()
    assert spot["min_workers"] == 0
    assert re.search(r"spot", str(spot["node_config"]), re.IGNORECASE)
    (named,) = re.findall(r"# What (scale\..*) asks for\.", path.read_text(encoding="utf-8"))
    values = dict(word.removeprefix("scale.").split("=") for word in shlex.split(named))
    scale = from_dict(ScaleConfig, {key: yaml.safe_load(text) for key, text in values.items()})
    nodes = [
        {
            "Alive": True,
            "NodeManagerAddress": "10.0.0.1",
            "Resources": spot["resources"],
            "Labels": spot["labels"],
        }
    ]
    assert find_shortage(nodes, scale) is None
