"""The package's prose uses the terms of the field, in docstrings, comments and string literals.

Each pattern below stands for a phrase that readers had to guess at, with the words to use instead.
Identifiers and text in backticks are not prose, and neither is text that a model reads.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = next(path for path in Path(__file__).parents if (path / "pyproject.toml").is_file())
PACKAGE = ROOT / "raytune_llama"

_COUNTED = (
    "bits|bytes|documents|elements|GiB|KiB|MiB|once|requests|samples|seconds|sequences|times|tokens|"
    "values"
)
_THINGS = (
    "document|epoch|GPU|key|layer|minute|node|parameter|rank|replica|row|second|sequence|source|"
    "step|tensor|token|weight|worker"
)
_STEMS = (
    "gn|initial|mater|material|neutral|normal|optim|organ|parallel|quant|random|real|serial|special|"
    "summar|synchron|token|util"
)

PHRASES = {
    r"\b(?:go|goes|going|gone|went) on\b": "continue, resume",
    r"\banew\b|\bonce more\b": "again",
    r"\b(?:tell|tells|telling|told)\b": "report, say, return, log; distinguish",
    # What is behind a proxy or an API may be called so.
    r"\bbehind\b(?! (?:an?|the|OpenAI's) (?:API|gateway|HTTP|load|proxy|reverse)\b)": "after",
    r"\b(?:stand|stands)\b(?! (?:alone|for)\b)|\bstanding\b": "be, lie in, contain",
    r"\b(?:is|are) there\b": "exist, be present, be available",
    r"\bmend(?:s|ed|ing)?\b": "fix",
    r"\bas may\b": "at most, up to the limit",
    r"\bfrees? (?:it|them) not\b|\bcom(?:e|es|ing) free\b": "free, release",
    r"\bof ours\b": "our own, or its name",
    r"\bstretch(?:es)?\b": "span, range, chunk",
    r"\bget(?:s|ting)? on\b": "make progress",
    r"\bheap(?:s|ed|ing)? up\b": "accumulate",
    r"\bask(?:s|ed|ing)? for leave\b|\bleave to start\b": "request admission",
    r"\busurpers?\b": "new lease holder",
    rf"\b(?:{_COUNTED}) an? (?:{_THINGS})\b(?! (?:can|has|is|may|must|takes)\b)": "per",
    rf"\b\w*(?:{_STEMS})is(?:e|es|ed|er|ing|ation)\b": "-ize, as in American English",
    r"\b\w*(?:behaviour|colour|licence)\w*": "American spelling",
}
"""Pattern (a space is any white space; case is ignored) to the words to use instead."""

FRAGMENT = re.compile(
    r"(?:After|As|At|Beside|Besides|By|For|From|In|Of|On|That|To|Under|Which|Whose|With) [a-z`]"
)
FRAGMENT_WORDS = 9
"""A docstring that begins so and is shorter than this continues the name of what it documents."""

NO_PROSE = {"chat/templates/formats.py", "chat/tools.py", "tokenizer/hard_texts.py"}
"""Modules whose string literals a model or a tokenizer reads; their docstrings are prose."""

_PATTERNS = {
    re.compile(pattern.replace(" ", r"\s+"), re.IGNORECASE): use for pattern, use in PHRASES.items()
}


class Text(NamedTuple):
    """A docstring, a comment or a string literal, and the lines that it covers."""

    first_line: int
    last_line: int
    text: str
    is_docstring: bool = False


def read_texts(source: str, *, with_literals: bool = True) -> Iterator[Text]:
    """Yield the prose of a module; comments on consecutive lines are one text."""
    tree = ast.parse(source)
    # Attribute docstrings too, which no function of `ast` finds.
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            is_docstring = id(node) in docstrings
            # A literal without a space is a name or a key.
            if is_docstring or (with_literals and " " in node.value.strip()):
                yield Text(node.lineno, node.end_lineno or node.lineno, node.value, is_docstring)
    block: list[tokenize.TokenInfo] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if block and token.start[0] != block[-1].start[0] + 1:
                yield _comment(block)
                block = []
            block.append(token)
    if block:
        yield _comment(block)


def _comment(block: list[tokenize.TokenInfo]) -> Text:
    lines = "\n".join(token.string.lstrip("# ") for token in block)
    return Text(block[0].start[0], block[-1].start[0], lines)


def find_problems(source: str, *, with_literals: bool = True) -> Iterator[tuple[int, str]]:
    """Yield the line and a description of every old phrase and every fragment."""
    for text in read_texts(source, with_literals=with_literals):
        prose = re.sub(r"`[^`]*`", lambda code: re.sub(r"\S", "_", code[0]), text.text)
        for pattern, use in _PATTERNS.items():
            for match in pattern.finditer(prose):
                line = text.first_line + prose.count("\n", 0, match.start())
                found = " ".join(match[0].split())
                yield min(line, text.last_line), f"{found!r}; use: {use}"
        words = text.text.split()
        is_short = len(words) < FRAGMENT_WORDS
        if text.is_docstring and is_short and FRAGMENT.match(" ".join(words)):
            start = " ".join(words[:3])
            yield text.first_line, f"{start!r}: begin with a noun or a verb: it is read alone"


def test_prose_of_the_package_uses_the_terms_of_the_field() -> None:
    problems = [
        f"{path.relative_to(ROOT)}:{line}: {problem}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, problem in sorted(
            find_problems(
                path.read_text(encoding="utf-8"),
                with_literals=path.relative_to(PACKAGE).as_posix() not in NO_PROSE,
            )
        )
    ]
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ('"""Starts.\n\nThe run goes\non from it.\n"""', 3),
        ("x = 1\n# The node behind\ny = 2  # the other", 2),
        ("# The run went\n# on.\n", 1),
        ('x = f"rank {1} was told to stop"', 1),
        ('raise ValueError("8 bytes a token are needed")', 1),
        ('def f():\n    """Initialise the weights."""', 2),
        ('class A:\n    x: int\n    """Of the run."""', 3),
    ],
)
def test_old_phrase_is_found_in_its_line(source: str, line: int) -> None:
    assert [found for found, _ in find_problems(source)] == [line]


@pytest.mark.parametrize(
    "source",
    [
        "def behind(stretch: int) -> str:\n    return 'stands' + anew",
        '"""The endpoint behind a reverse proxy; B stands for batch."""',
        '"""See `told` and `goes on`."""',
        '"""Which tokens a sequence may sample next, as a mask over the vocabulary, or None."""',
    ],
)
def test_identifiers_and_accepted_phrases_are_not_found(source: str) -> None:
    assert not list(find_problems(source))


def test_text_for_a_model_is_no_prose_but_docstrings_are() -> None:
    source = '"""Tells."""\nPROMPT = "You are told to go on."'
    assert [line for line, _ in find_problems(source, with_literals=False)] == [1]
