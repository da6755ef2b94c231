"""Fields, verbs and options that the pages on clusters, GPUs and stuck runs name exist."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml
from ray.scripts.scripts import cli as ray_cli

from raytune_llama.cli import VERBS
from raytune_llama.config.fields import walk_fields
from raytune_llama.config.settings import from_dict
from raytune_llama.train.config import PretrainConfig
from raytune_llama.train.orchestration.config import ScaleConfig

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs" / f"{name}.md" for name in ("clusters", "gpus", "stuck")]
PAGES.append(ROOT / "cluster" / "ray-up" / "README.md")

SECTIONS = "scale|engine|batch|data|checkpoint|eval|model|optim|logging"
FIELDS = {path for path, _ in walk_fields(PretrainConfig)}


def commands_in(text: str) -> Iterator[list[str]]:
    """Yield the words of each command of `ray` or `raytune`, in code blocks and in prose."""
    blocks = re.findall(r"^    ((?:ray|raytune|export) .*(?:(?<=\\)\n.*)*)$", text, re.MULTILINE)
    inline = re.findall(r"`((?:ray|raytune) [^`]*)`", text)
    for command in [*blocks, *inline]:
        yield shlex.split(command.replace("\\\n", " "), comments=True)


def ray_command(words: list[str]) -> tuple[click.Command, list[str]]:
    """Return what a command line of `ray` calls, and the words after its name."""
    command: click.Command = ray_cli
    while isinstance(command, click.Group) and words:
        assert words[0] in command.commands, f"ray has no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    return command, words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_fields_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(rf"(?<![\w./-])((?:{SECTIONS})\.[a-z_]+(?:\.[a-z_]+)*)", text))
    assert named
    assert named - FIELDS == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_that_a_page_names_exist(page: Path) -> None:
    found = list(commands_in(page.read_text(encoding="utf-8")))
    assert found
    for program, *words in found:
        if program == "raytune":
            assert words[0] in VERBS, words
        elif program == "ray":
            command, rest = ray_command(words)
            own = rest[: rest.index("--")] if "--" in rest else rest
            known = {option for parameter in command.params for option in parameter.opts}
            options = {word.partition("=")[0] for word in own if word.startswith("--")}
            assert options - known == set(), words


def test_settings_that_the_page_on_clusters_shows_are_accepted() -> None:
    text = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(snippets) > 1
    for snippet in snippets:
        from_dict(ScaleConfig, yaml.safe_load(snippet)["scale"])
