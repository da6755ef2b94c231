"""Links of the documents point to files, and the glossary names modules that exist."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = next(path for path in Path(__file__).parents if (path / "pyproject.toml").is_file())
DIRECTORY_READMES = sorted(ROOT.glob("*/README.md"))
PLACES = ("*.md", "[a-z]*/README.md", "examples/*/README.md", "docs/**/*.md", ".github/**/*.md")
DOCUMENTS = sorted({path for place in PLACES for path in ROOT.glob(place)})

LINK = re.compile(r"\[([^\]\n]*)\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+?) *#*$", re.MULTILINE)
ANCHOR = re.compile(r"<a id=\"([^\"]+)\"></a>")
MAX_README_LINES = 40


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def read_prose(path: Path) -> str:
    """Return a document without its fenced blocks."""
    return re.sub(
        r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )


def relative_links(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield label, file and anchor of each link; the file is empty for the page itself."""
    for label, target in LINK.findall(read_prose(path)):
        if "://" not in target and not target.startswith("mailto:"):
            file, _, anchor = target.partition("#")
            yield label, file, anchor


def anchors_of(path: Path) -> set[str]:
    """Return the anchors of a page: its own, and those of headings, as GitHub makes them."""
    prose = read_prose(path)
    found = set(ANCHOR.findall(prose))
    for heading in HEADING.findall(prose):
        text = re.sub(r"[^\w\- ]", "", LINK.sub(r"\1", heading).lower()).replace(" ", "-")
        repeats = sum(re.fullmatch(rf"{re.escape(text)}(-\d+)?", old) is not None for old in found)
        found.add(f"{text}-{repeats}" if repeats else text)
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_relative_links_point_to_existing_files(path: Path) -> None:
    targets = {file for _, file, _ in relative_links(path)}
    missing = [target for target in targets if not (path.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_anchors_of_links_are_those_of_headings(path: Path) -> None:
    missing = [
        f"{file}#{anchor}"
        for _, file, anchor in relative_links(path)
        if anchor and anchor not in anchors_of(path.parent / file if file else path)
    ]
    assert not missing


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_label_that_is_a_file_name_is_that_of_the_target(path: Path) -> None:
    differing = [
        (label, target)
        for label, target, _ in relative_links(path)
        if label.endswith(".py") and not f"/{target}".endswith(f"/{label}")
    ]
    assert not differing


def test_glossary_is_sorted_and_every_term_names_a_module() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    entries = re.findall(r"^- \*\*(.+?)\*\*:(.+?)(?=^- |\Z)", text, re.MULTILINE | re.DOTALL)
    assert len(entries) == text.count("\n- ")
    terms = [term for term, _ in entries]
    assert terms == sorted(terms)
    for term, entry in entries:
        targets = [target for _, target in LINK.findall(entry)]
        assert targets, term
        assert all((ROOT / "docs" / target).is_file() for target in targets), term
        assert all(target.startswith("../raytune_llama/") for target in targets), term


def test_modules_that_the_upgrade_page_names_exist() -> None:
    text = (ROOT / "docs" / "upgrading.md").read_text(encoding="utf-8")
    modules = re.findall(
        r"^\| `[a-z].*\| `([\w.]+)` \|$", text.partition("### Modules")[2], re.MULTILINE
    )
    assert len(modules) > 50
    paths = [ROOT / "raytune_llama" / f"{module.replace('.', '/')}.py" for module in modules]
    assert not [name(path) for path in paths if not path.is_file()]


@pytest.mark.parametrize("path", DIRECTORY_READMES, ids=name)
def test_readme_of_a_directory_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_README_LINES
