"""Real Chinese and English text for benchmarks, unique line by line, from what Linux can install.

The text of Debian's documentation packages (downloaded with apt-get, unpacked, not installed) and
of the demo corpus. A line that was met before is left out, so that an engine that caches what it
has seen gains nothing from the corpus itself.
"""

import gzip
import hashlib
import html
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "benchmarks" / ".cache"

PACKAGES = [
    "debian-reference-zh-cn", "debian-faq-zh-cn", "debian-edu-doc-zh-cn", "gimp-help-zh-cn",
    "libreoffice-help-zh-cn", "libreoffice-help-zh-tw", "kicad-doc-zh", "linuxcnc-doc-zh-cn",
    "manpages-zh", "fortunes-zh", "libreoffice-help-en-us", "gimp-help-en", "manpages-dev",
    "debian-reference-en", "debian-handbook", "perl-doc", "postgresql-doc-15", "python3.11-doc",
    "lilypond-doc-html", "linux-doc-6.1", "openjdk-17-doc",
]  # fmt: skip
"""Debian 12's; those that cannot be had are named and left out."""

_TAGS = re.compile(r"<(script|style)\b.*?</\1>|<!--.*?-->|<[^>]*>", re.DOTALL | re.IGNORECASE)
_BLOCKS = re.compile(r"</?(p|div|li|tr|td|th|h\d|br|pre|dt|dd|title)\b[^>]*>", re.IGNORECASE)
_ROFF = re.compile(r"^\.(\\\"|[A-Za-z]{1,2}).*$|\\f.|\\[&-]", re.MULTILINE)
_CHINESE = re.compile("[\u4e00-\u9fff]")
_MIN_CHARACTERS = 20


@dataclass(frozen=True)
class Corpus:
    """One text file; a document is a line."""

    path: Path
    """Where it is."""
    num_bytes: int
    """Its size."""
    chinese_bytes: int
    """Bytes of the lines with Chinese characters."""

    def describe(self) -> str:
        """Return its size in words."""
        return (
            f"{self.num_bytes / 1e6:.1f} MB in lines, "
            f"{self.chinese_bytes / self.num_bytes:.0%} of it Chinese"
        )


def make_corpus() -> Corpus:
    """Return the corpus; download and put it together where it is not there yet."""
    path = CACHE / "unique.txt"
    if not path.exists():
        CACHE.mkdir(exist_ok=True)
        _download(CACHE / "debs")
        temporary = path.with_suffix(".tmp")
        seen: set[bytes] = set()
        with temporary.open("w") as file:
            for line in _lines():
                digest = hashlib.blake2b(line.encode(), digest_size=8).digest()
                if digest not in seen:
                    seen.add(digest)
                    file.write(line + "\n")
        temporary.replace(path)
    chinese = 0
    with path.open("rb") as file:
        for line in file:
            chinese += len(line) if _CHINESE.search(line.decode()) else 0
    return Corpus(path, path.stat().st_size, chinese)


def write_repeated(corpus: Corpus, target: Path, num_bytes: int) -> Corpus:
    """Write the corpus again and again until it is large enough."""
    times = -(-num_bytes // corpus.num_bytes)
    with target.open("wb") as file:
        for _ in range(times):
            with corpus.path.open("rb") as source:
                shutil.copyfileobj(source, file, 1 << 22)
    return Corpus(target, times * corpus.num_bytes, times * corpus.chinese_bytes)


def _download(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        print("no apt-get here: the demo corpus is all the text there is", file=sys.stderr)
        return
    for name in PACKAGES:
        if not list(folder.glob(f"{name}_*.deb")):
            command = ["apt-get", "download", "-qq", name]
            if subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode:
                print(f"the package {name} cannot be had: left out", file=sys.stderr)


def _lines() -> Iterator[str]:
    for file in sorted((ROOT / "demo" / "corpus").glob("*.txt")):
        yield from _long_enough(file.read_text())
    for package in sorted((CACHE / "debs").glob("*.deb")):
        with subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                for member in archive:
                    content = archive.extractfile(member) if member.isfile() else None
                    if content is not None:
                        yield from _long_enough(_text(member.name, content.read()))


def _text(name: str, data: bytes) -> str:
    """Return the text of a page, a manual or a plain file; nothing for other files."""
    if name.endswith(".gz"):
        name, data = name.removesuffix(".gz"), gzip.decompress(data)
    suffix = Path(name).suffix
    text = data.decode(errors="ignore")
    if suffix in (".html", ".htm", ".xhtml"):
        text = _TAGS.sub("", _BLOCKS.sub("\n", text))
        return html.unescape(text)
    if "/man/" in name:
        return _ROFF.sub("", text)
    return text if suffix in (".txt", ".rst", ".pod") or "fortunes" in name else ""


def _long_enough(text: str) -> Iterator[str]:
    for line in text.split("\n"):
        short = " ".join(line.split()).replace("\0", "")
        if len(short) >= _MIN_CHARACTERS:
            yield short
