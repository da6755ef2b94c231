"""Promise: the page and the table show every model's scores; the page needs nothing else."""

# ruff: noqa: RUF001  # Chinese punctuation

import io
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

from rich.console import Console

from raytune_llama.evaluate.report import render_report, write_report
from raytune_llama.evaluate.results import ModelOutcome, build_results
from raytune_llama.evaluate.table import build_table, describe_counts, summary_rows
from raytune_llama.evaluate.tasks.config import TaskConfig
from tests.evaluate.conftest import make_outcome

CONFIG = TaskConfig(path="data", format="ceval")
VOID = {"meta", "br", "img", "rect", "line"}


class Page(HTMLParser):
    """Reads a page, and fails if an element is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_page_shows_scores_answers_and_hashes(
    outcomes: Sequence[ModelOutcome], tmp_path: Path
) -> None:
    file = write_report(build_results(CONFIG, outcomes), tmp_path)
    text = "".join(Page(file.read_text(encoding="utf-8")).text)
    for shown in ("42.9 ± ", "+21.4 ± ", "0.872", "(+0.671)", "曹雪芹", "<b>law</b> & 答案："):
        assert shown in text
    assert "谁写了《红楼梦》？<script>" in text
    assert "blake3:" + "cd" * 32 in text


def test_page_needs_no_other_file_and_runs_nothing(outcomes: Sequence[ModelOutcome]) -> None:
    page = Page(render_report(build_results(CONFIG, outcomes)))
    assert not {"script", "link", "iframe", "img"} & {tag for tag, _ in page.tags}
    assert not any({"src", "href", "onload"} & set(attributes) for _, attributes in page.tags)


def test_bars_are_as_long_as_the_scores(outcomes: Sequence[ModelOutcome]) -> None:
    page = Page(render_report(build_results(CONFIG, outcomes)))
    bars = [attributes for tag, attributes in page.tags if tag == "rect"]
    widths = [float(bar["width"] or 0) for bar in bars]
    scores = [0.5, 0.75, 0.5, 0.5, 0.25, 0.5]  # law, logic, physician: base and tuned
    full = widths[0] / scores[0]
    assert [round(width / full, 3) for width in widths] == scores


def test_table_has_models_side_by_side_and_differences(outcomes: Sequence[ModelOutcome]) -> None:
    console = Console(file=io.StringIO(), width=160)
    console.print(build_table(build_results(CONFIG, outcomes)))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    (law,) = [line for line in lines if "ceval/law" in line]
    assert "50.0 ± 18.9" in law
    assert "75.0 ± 16.4 (+25.0 ± 25.0)" in law


def test_change_is_called_so_only_beyond_two_errors(outcomes: Sequence[ModelOutcome]) -> None:
    base, tuned = outcomes
    marks = ("--------", "++------", "+++-----")  # differences of 1.5 and 2.05 standard errors
    none, two, three = (make_outcome("law", one) for one in marks)
    pairs = ((none, three, "better"), (three, none, "worse"), (none, two, ""), (none, none, ""))
    for one, other, verdict in pairs:
        results = build_results(
            CONFIG, [replace(base, tasks=(one,)), replace(tuned, tasks=(other,))]
        )
        (row,) = [row for row in summary_rows(results) if row.name == "ceval/law"]
        assert row.cells[1] is not None
        assert row.cells[1].verdict == verdict
    text_row = summary_rows(build_results(CONFIG, outcomes))[0]
    assert text_row.cells[1] is not None
    assert text_row.cells[1].verdict == "worse"


def test_missing_answers_are_said(outcomes: Sequence[ModelOutcome]) -> None:
    task = make_outcome("law", "+-+-", missing=2)
    results = build_results(CONFIG, [replace(outcomes[0], tasks=(task,))])
    line = "base, ceval/law: 2 of 4 answers are missing, counted as wrong"
    assert list(describe_counts(results)) == [line]
    assert line in "".join(Page(render_report(results)).text)
