"""Promise: the page about a store says what is in it and what is not, and shows no text as code."""

import re
from html.parser import HTMLParser

from raytune_llama.data.store.manifest import (
    STORE_FORMAT_VERSION,
    Manifest,
    RowCounts,
    Shard,
    SplitManifest,
    fingerprint_of,
)
from raytune_llama.data.store.report import render_report


def shard(source: int, documents: int, tokens: int) -> Shard:
    return Shard(
        name=f"train-{source}",
        source=source,
        sha256="00",
        file_bytes=1,
        documents=documents,
        tokens=tokens,
        text_bytes=3 * tokens,
    )


def manifest() -> Manifest:
    inputs = {"sources": [{"source": 0, "name": "<b>.txt", "format": "txt", "sha256": "ab"}]}
    return Manifest(
        format_version=STORE_FORMAT_VERSION,
        fingerprint=fingerprint_of(inputs),
        inputs=inputs,
        token_dtype="uint16",  # noqa: S106 - a type's name
        splits={
            "train": SplitManifest.from_shards([shard(0, 10, 1500), shard(1, 5, 500)]),
            "validation": SplitManifest.from_shards([]),
        },
        rows=RowCounts(
            total=20, documents=15, skipped={"blank": 2}, quarantined={"invalid_json": 3}
        ),
        quarantine=None,
        lengths=[0, 0, 4, 11],
    )


class Cells(HTMLParser):
    """Collects the text of a page and checks that its tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:  # noqa: ARG002
        if tag != "meta":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)


def test_report_has_a_row_for_everything_that_is_counted() -> None:
    page = render_report(manifest(), ["news", "<script>"])
    cells = Cells()
    cells.feed(page)
    assert cells.open == []
    for row in (
        ["train", "15", "2,000", "6,000", "3.00", "2"],
        ["news", "10", "1,500", "3.00", "75.0%"],
        ["<script>", "5", "500", "3.00", "25.0%"],
        ["4 to 7", "4"],
        ["8 to 15", "11"],
        ["blank", "2", "10.000%"],
        ["invalid json", "3", "15.000%"],
    ):
        assert row in cells.rows
    assert "20 rows were read: 15 became documents, 2 were skipped" in page
    assert "<script" not in page
    assert re.search(r"width: 75\.00%", page)
    assert render_report(manifest(), ["news", "<script>"]) == page
