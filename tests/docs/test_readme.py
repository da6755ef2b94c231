"""The README is one screen whose config, error message and links to tests are real."""

import re
import shlex
from pathlib import Path

import pytest

from raytune_llama.config.settings import ConfigError, load
from raytune_llama.train.config import SftConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUARANTEES = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")

TEST_LINK = re.compile(r"\]\((?:\.\./)?(tests/[^)]*test_\w+\.py)\)")
MAX_LINES = 150
MAX_CONFIG_LINES = 5


def section(text: str, title: str) -> str:
    """Return what is below a heading, up to the next one of its level."""
    return text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def table_rows(text: str) -> list[str]:
    """Return the lines of tables without their heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    heads = {n + k for n, line in enumerate(lines) if set(line) <= set("|-") for k in (-1, 0)}
    return [line for n, line in enumerate(lines) if n not in heads]


@pytest.fixture
def five_lines(tmp_path: Path) -> Path:
    """The config of the README, as a file."""
    block = re.search(r"^```yaml\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert block
    assert len(block[1].splitlines()) <= MAX_CONFIG_LINES
    file = tmp_path / "reviews.yaml"
    file.write_text(block[1], encoding="utf-8")
    return file


def commands(verb: str) -> list[list[str]]:
    """Return the arguments of each command with the README's own config."""
    lines = re.findall(rf"^    raytune {verb} reviews\.yaml(.*)$", README, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def test_readme_is_one_screen() -> None:
    assert len(README.splitlines()) <= MAX_LINES


def test_config_of_five_lines_is_accepted_with_what_the_command_overrides(five_lines: Path) -> None:
    train, _ = commands("sft")
    config = load(SftConfig, [str(five_lines), *train])
    assert config.run_dir == "runs/reviews"
    assert not config.plan


def test_quoted_mistakes_are_what_the_command_prints(five_lines: Path) -> None:
    _, mistaken = commands("sft")
    with pytest.raises(ConfigError) as raised:
        load(SftConfig, [str(five_lines), *mistaken])
    assert f"```\n{raised.value}\n```" in README


def test_each_thing_that_others_lack_names_its_test() -> None:
    rows = table_rows(section(README, "What you get that others don't"))
    assert len(rows) >= 8
    assert [row for row in rows if not TEST_LINK.search(row)] == []


def test_each_guarantee_names_its_test() -> None:
    rows = table_rows(GUARANTEES)
    assert len(rows) >= 66
    assert [row for row in rows if not TEST_LINK.search(row)] == []


@pytest.mark.parametrize("text", [README, GUARANTEES], ids=["README", "guarantees"])
def test_named_tests_exist(text: str) -> None:
    files = set(TEST_LINK.findall(text))
    assert files
    assert sorted(file for file in files if not (ROOT / file).is_file()) == []
