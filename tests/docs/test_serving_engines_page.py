"""The feature table of docs/serving-engines.md and the tests of both engines name each other."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving-engines.md").read_text(encoding="utf-8")
TESTS = ROOT / "tests" / "serve" / "vllm"


def features() -> dict[str, list[str]]:
    """Return the tests of each feature."""
    table = PAGE.split("## Features", 1)[1].split("\n## ", 1)[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")][2:]
    return {row[0].strip(): re.findall(r"`(test_\w+)`", row[-1]) for row in rows}


def names_in_files() -> set[str]:
    """Return the names of the tests that run with the real vLLM."""
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in TESTS.glob("test_*.py")]
    functions = (node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef))
    return {node.name for node in functions if node.name.startswith("test_")}


def test_every_feature_is_shown_by_tests_that_exist() -> None:
    named = features()
    assert len(named) > 10
    assert all(named.values()), named
    assert {test for tests in named.values() for test in tests} == names_in_files()
