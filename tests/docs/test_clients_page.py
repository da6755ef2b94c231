"""The snippets of docs/clients.md are what the clients' programs run, and its versions theirs."""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.serve.clients.environments import CLIENTS, PROGRAMS, ROOT, Client

PAGE = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
OWN = {"print", "len"}
"""Calls of the page that show a result."""

Call = tuple[str, frozenset[str | None]]


def snippets(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def calls_in(source: str) -> Iterator[Call]:
    """Yield each call: the called name without the variable before it, and its keywords."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = re.sub(r"^\W*\w+(?:\(.*\))?\.", "", ast.unparse(node.func), flags=re.DOTALL)
            yield name, frozenset(keyword.arg for keyword in node.keywords)


@pytest.mark.parametrize("snippet", snippets("python"), ids=lambda text: text.split("\n")[0])
def test_calls_of_a_python_snippet_are_those_of_a_program(snippet: str) -> None:
    tested = {call for file in PROGRAMS.glob("*.py") for call in calls_in(file.read_text("utf-8"))}
    calls = {call for call in calls_in(snippet) if call[0] not in OWN}
    assert calls
    assert not calls - tested


@pytest.mark.parametrize("snippet", snippets("js"), ids=lambda text: text.split("\n")[0])
def test_calls_of_a_js_snippet_are_those_of_a_program(snippet: str) -> None:
    programs = [file.read_text("utf-8") for file in PROGRAMS.glob("*.mjs")]
    called = set(re.findall(r"([\w.]+)\(", snippet)) - {"console.log", "provider"}
    assert called
    assert [name for name in called if not any(f"{name}(" in text for text in programs)] == []


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_page_names_the_version_that_is_tested(client: Client) -> None:
    registry = r"(?: \(\w+\))?"
    assert re.search(
        rf"^\| `{client.package}`{registry} \| {client.version} \|", PAGE, re.MULTILINE
    )
