"""Promise: the page about a store says what is in it and what is not, and shows no text as code."""

import re
from dataclasses import replace
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
        hash="blake3:00",
        file_bytes=1,
        documents=documents,
        tokens=tokens,
        text_bytes=3 * tokens,
    )


def manifest() -> Manifest:
    inputs = {"sources": [{"source": 0, "name": "<b>.txt", "format": "txt", "hash": "blake3:ab"}]}
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
        ["4 to 7", "4", "100.0%"],
        ["8 to 15", "11", "73.3%"],
        ["blank", "2", "10.000%"],
        ["invalid json", "3", "15.000%"],
    ):
        assert row in cells.rows
    assert "20 rows were read: 15 became documents, 2 were skipped" in page
    assert "<script" not in page
    assert re.search(r"width: 75\.00%", page)
    assert render_report(manifest(), ["news", "<script>"]) == page


CHAT = {
    "template": "alpaca",
    "max_tokens": 16,
    "truncation": "keep_eos",
    "repairs": {"trim": True, "join_same_role": False},
}
EVENTS = {
    "alias: <b>": 3,
    "answers_without_prompt": 1,
    "cut from 16 to 31 tokens": 2,
    "cut_tokens": 9,
    "held_out_answers_in_training": 4,
    "ignored field: score": 15,
    "left out with 32 to 63 tokens": 2,
    "masked_turns": 5,
    "new_event": 6,
    "repaired: same role joined": 7,
    "suspicious": 1,
    "suspicious answer: n/a": 1,
    "truncated": 2,
}


def chat_manifest() -> Manifest:
    made = manifest()
    shards = [replace(shard(0, 10, 1500), targets=600), replace(shard(1, 5, 500), targets=100)]
    rows = replace(made.rows, skipped={"no_target": 2}, events=EVENTS)
    splits = {**made.splits, "train": SplitManifest.from_shards(shards)}
    return replace(made, inputs={**made.inputs, "chat": CHAT}, rows=rows, splits=splits)


def test_report_of_conversations_has_every_event_in_words() -> None:
    page = render_report(chat_manifest(), ["news", "chats"])
    cells = Cells()
    cells.feed(page)
    assert cells.open == []
    for row in (
        ["split", "conversations", "tokens", "learned"],
        ["train", "15", "2,000", "35.0%", "6,000", "3.00", "2"],
        ["news", "10", "1,500", "40.0%", "3.00", "75.0%"],
        ["8 to 15", "11", "73.3%", "0", "0"],
        ["16 to 31", "0", "0.0%", "2", "0"],
        ["32 to 63", "0", "0.0%", "0", "2"],
        ["turns that are marked in their rows as not trained", "5"],
        ["of these: like a failed export", "1", "n/a"],
        ["score", "15", "not used"],
        ["<b>", "3", "read: another name of a known column"],
        ["same role joined", "7"],
        ["new event", "6"],
        ["chat: template", "alpaca"],
        ["chat: repairs", "trim"],
    ):
        assert row in [found[: len(row)] for found in cells.rows]
    assert "20 rows were read: 15 became conversations, 2 were skipped" in page
    assert "2 of 17 (11.8%): 9 tokens lost" in page
    assert "more than 16 tokens" in page
    assert "held-out answers that are in training too" in page
    assert "<b>" not in page.replace("<b>.txt", "")
    # Each event is in one place: the events of lengths are in the table of lengths only.
    assert "cut from 16" not in page
    assert "under an alias" not in page


def test_report_of_text_has_no_column_of_conversations() -> None:
    page = render_report(manifest(), ["news", "chats"])
    assert "learned" not in page
    assert "cut from" not in page
