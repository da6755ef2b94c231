"""Every page is in the site's navigation, and links lead to the same files as in the repository."""

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docs.make_site import DOCS, ROOT, convert_page, find_foreign, find_pages, name_in_site


def pages_in(navigation: Any) -> Iterator[str]:  # noqa: ANN401  # parsed TOML
    if isinstance(navigation, str):
        yield navigation
        return
    for item in navigation.values() if isinstance(navigation, dict) else navigation:
        yield from pages_in(item)


def test_navigation_has_every_page_once() -> None:
    settings = tomllib.loads((DOCS / "zensical.toml").read_text(encoding="utf-8"))
    listed = list(pages_in(settings["project"]["nav"]))
    assert sorted(listed) == sorted(name_in_site(page).as_posix() for page in find_pages())


def test_links_of_a_page_are_those_of_the_site_and_code_is_kept() -> None:
    linked: set[Path] = set()
    page = DOCS / "reference" / "README.md"
    text = (
        "[a](metrics.md#training) [b](../README.md) [c](../../jobs/configs) [d](../../Makefile)\n"
        "[e](https://example.org/x.md) [f](#here) ![g](../chat.png)\n```\n[h](../README.md)\n```\n"
    )
    assert convert_page(page, text, linked) == (
        "[a](metrics.md#training) [b](../index.md) [c](../repository/jobs/configs.txt) "
        "[d](../repository/Makefile.txt)\n"
        "[e](https://example.org/x.md) [f](#here) ![g](../chat.png)\n```\n[h](../README.md)\n```\n"
    )
    assert linked == {ROOT / "jobs" / "configs", ROOT / "Makefile"}


def test_what_a_page_loads_from_elsewhere_is_found_and_links_are_not() -> None:
    foreign = [
        '<script defer src="https://example.org/a.js">',
        "<img alt=x src=//example.org/b.png>",
    ]
    own = ['<a href="https://example.org">', '<script src="a.js">', '<link href="b.css">']
    assert find_foreign("".join([*foreign, *own])) == foreign
