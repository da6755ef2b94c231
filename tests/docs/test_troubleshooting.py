"""The messages of docs/troubleshooting.md are those of the code, word for word."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"^### `(.+)`$", PAGE, re.MULTILINE)


def texts_in(tree: ast.AST) -> Iterator[str]:
    """Yield a program's string literals, each value in an f-string as an ellipsis."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"%[sdg]|%\.\d[fg]", "…", node.value)
        elif isinstance(node, ast.JoinedStr):
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values
            )


@cache
def texts_of_the_package() -> str:
    files = sorted((ROOT / "raytune_llama").rglob("*.py"))
    return "\0".join(
        text for file in files for text in texts_in(ast.parse(file.read_text("utf-8")))
    )


def is_message(message: str, texts: str) -> bool:
    """Whether a text contains the message; an ellipsis stands for anything within that text."""
    parts = [re.escape(part) for part in message.split("…")]
    return re.search("[^\0]*?".join(parts), texts) is not None


@pytest.mark.parametrize("message", MESSAGES)
def test_message_on_the_page_occurs_in_the_code(message: str) -> None:
    assert is_message(message, texts_of_the_package())


def test_page_has_at_least_twenty_messages_and_other_ones_are_not_found() -> None:
    assert len(set(MESSAGES)) == len(MESSAGES) >= 20
    assert not is_message("data.max_bad_fraction: … rows are unusual", texts_of_the_package())
