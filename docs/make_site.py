"""Build the documentation as a site that works without a network.

    python -m docs.make_site     # from the top of the repository; or: make docs
    python -m http.server --directory site/html

The pages can be read from the file system too, where browsers do not allow the search.

The pages are plain Markdown whose links work where the repository is browsed. Here a README becomes
the index of its folder, and files outside docs/ that a page links to are copied beside the pages.
A link or an anchor that does not exist fails the build, and so does a page that
loads anything from elsewhere.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
DOCS: Final = ROOT / "docs"
SITE: Final = ROOT / "site"
SOURCE: Final = SITE / "source"
HTML: Final = SITE / "html"
PICTURES: Final = (".png", ".svg", ".webp")

LINK: Final = re.compile(r"(\]\()([^)\s]+)(\))")
FOREIGN: Final = re.compile(
    r"<(?:script|link(?![^>]*canonical)|img|iframe)\b[^>]*?(?:src|href)=[\"']?(?:https?:)?//[^>]*>"
)
FENCE: Final = re.compile(r"^(```.*?^```)", re.DOTALL | re.MULTILINE)


def find_pages() -> Iterator[Path]:
    """Yield every page of the documentation."""
    yield from sorted(DOCS.rglob("*.md"))


def name_in_site(path: Path) -> Path:
    """Return where a page or a linked file of the repository lies in the site's source."""
    if path.is_relative_to(DOCS):
        inside = path.relative_to(DOCS)
        return inside.with_name("index.md") if inside.name == "README.md" else inside
    # With .txt, a browser shows a program instead of downloading it.
    inside = Path("repository") / path.relative_to(ROOT)
    return inside if path.suffix in PICTURES else inside.with_name(f"{inside.name}.txt")


def convert_page(page: Path, text: str, linked: set[Path]) -> str:
    """Return a page's text with the links of the site.

    Args:
        page: file of the page.
        text: its Markdown.
        linked: files and folders of the repository that pages link to; those of this one are added.
    """
    here = name_in_site(page).parent

    def convert(match: re.Match[str]) -> str:
        target, mark, anchor = match[2].partition("#")
        if not target or ":" in target:
            return match[0]
        path = (page.parent / target).resolve()
        if not path.is_relative_to(ROOT) or not path.exists():
            return match[0]  # the build reports it
        if not path.is_relative_to(DOCS) or path.is_dir():
            linked.add(path)
        return f"{match[1]}{os.path.relpath(name_in_site(path), here)}{mark}{anchor}{match[3]}"

    parts = FENCE.split(text)
    return "".join(part if part.startswith("```") else LINK.sub(convert, part) for part in parts)


def write_source() -> None:
    """Write the pages, their pictures and what they link to as the site's source."""
    shutil.rmtree(SITE, ignore_errors=True)
    linked = {path for path in DOCS.rglob("*") if path.suffix in PICTURES}
    for page in find_pages():
        text = convert_page(page, page.read_text(encoding="utf-8"), linked)
        target = SOURCE / name_in_site(page)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    for path in sorted(linked):
        target = SOURCE / name_in_site(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            names = sorted(f"{inner.name}{'/' * inner.is_dir()}" for inner in path.iterdir())
            target.write_text("\n".join([f"{path.relative_to(ROOT)}/", *names, ""]), "utf-8")
        else:
            shutil.copyfile(path, target)
    settings = (DOCS / "zensical.toml").read_text(encoding="utf-8")
    places = f'[project]\ndocs_dir = "{SOURCE.name}"\nsite_dir = "{HTML.name}"\n'
    (SITE / "zensical.toml").write_text(settings.replace("[project]\n", places, 1), "utf-8")


def find_foreign(html: str) -> list[str]:
    """Return the tags of a page that load something from another host."""
    return FOREIGN.findall(html)


def main() -> int:
    """Build the site; the exit status is 0 if it is whole and loads nothing from elsewhere."""
    write_source()
    command = ["zensical", "build", "--clean", "--strict", "--config-file", "zensical.toml"]
    done = subprocess.run(command, cwd=SITE, check=False)  # noqa: S603
    if done.returncode:
        return done.returncode
    foreign = {
        tag for page in HTML.rglob("*.html") for tag in find_foreign(page.read_text("utf-8"))
    }
    for tag in sorted(foreign):
        print(f"loaded from elsewhere: {tag}")
    if not foreign:
        print(f"built {HTML}; to read it: python -m http.server --directory {HTML}")
    return min(1, len(foreign))


if __name__ == "__main__":
    sys.exit(main())
