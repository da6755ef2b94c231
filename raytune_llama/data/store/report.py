"""HTML report of a token store: content and dropped rows. A single file without scripts."""

from collections.abc import Iterable, Sequence
from html import escape

from raytune_llama.data.store.manifest import SPLITS, Manifest, Shard

REPORT_NAME = "report.html"
"""File name inside a store; not listed in the manifest, from which it is rendered."""

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c2127; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #d8dde3; text-align: right; }
th { color: #56606b; font-weight: 600; } th:first-child, td:first-child { text-align: left; }
td.bar { width: 40%; text-align: left; }
td.bar div { background: #3b7dd8; height: .9rem; min-width: 1px; }
.bad td.bar div { background: #c8553d; } .none { color: #56606b; } code { font-size: .85em; }
"""


def render_report(manifest: Manifest, source_names: Sequence[str]) -> str:
    """Render the report as HTML; equal manifests and names give equal pages.

    Args:
        manifest: Manifest of the store.
        source_names: Names of the configured sources, in store order.
    """
    rows = manifest.rows
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    sections = [
        _section("Splits", _splits(manifest)),
        _section("Sources", _sources(shards, source_names)),
        _section("Document lengths", _lengths(manifest.lengths)),
        _section("Skipped rows", _reasons(rows.skipped, rows.total)),
        _section("Quarantined rows", _reasons(rows.quarantined, rows.total), "bad"),
        *([_section("Other events", _events(rows.events))] if rows.events else []),
        _section("Inputs", _inputs(manifest)),
    ]
    summary = (
        f"{rows.total:,} rows were read: {rows.documents:,} became documents, "
        f"{sum(rows.skipped.values()):,} were skipped, {rows.num_quarantined:,} are in "
        f"quarantine. In {rows.aliased:,} rows the text was under an alias of its field."
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Token store</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>Token store <code>{manifest.fingerprint[:12]}</code></h1>\n<p>{summary}</p>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def _section(title: str, body: str, kind: str = "") -> str:
    return f'<section class="{kind}"><h2>{title}</h2>\n{body}</section>'


def _table(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table as HTML; a cell that ends with %% becomes a bar of that width."""
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in rows)
    return f"<table><thead><tr>{names}</tr></thead><tbody>\n{lines}</tbody></table>"


def _cell(text: str) -> str:
    if text.endswith("%%"):
        return f'<td class="bar"><div style="width: {text[:-1]}"></div></td>'
    return f"<td>{escape(text)}</td>"


def _bar(part: float, total: float) -> str:
    return f"{100 * part / total if total else 0:.2f}%%"


def _splits(manifest: Manifest) -> str:
    head = ["split", "documents", "tokens", "bytes of text", "bytes per token", "shards"]
    splits = {name: manifest.splits[name] for name in SPLITS}
    return _table(
        head,
        [
            [
                name,
                f"{split.documents:,}",
                f"{split.tokens:,}",
                f"{split.text_bytes:,}",
                _ratio(split.text_bytes, split.tokens),
                f"{len(split.shards):,}",
            ]
            for name, split in splits.items()
        ],
    )


def _sources(shards: list[Shard], names: Sequence[str]) -> str:
    total = sum(shard.tokens for shard in shards)
    rows: list[list[str]] = []
    for number, name in enumerate(names):
        mine = [shard for shard in shards if shard.source == number]
        tokens = sum(shard.tokens for shard in mine)
        text_bytes = sum(shard.text_bytes for shard in mine)
        documents = sum(shard.documents for shard in mine)
        share = f"{tokens / total:.1%}" if total else "-"
        numbers = [f"{documents:,}", f"{tokens:,}", _ratio(text_bytes, tokens), share]
        rows.append([name, *numbers, _bar(tokens, total)])
    return _table(["source", "documents", "tokens", "bytes per token", "share of tokens", ""], rows)


def _lengths(lengths: list[int]) -> str:
    if not lengths:
        return '<p class="none">none</p>'
    first = next(power for power, count in enumerate(lengths) if count)
    rows = [
        [f"{2**power:,} to {2 ** (power + 1) - 1:,}", f"{count:,}", _bar(count, max(lengths))]
        for power, count in enumerate(lengths)
        if power >= first
    ]
    return _table(["tokens, without BOS and EOS", "documents", ""], rows)


def _reasons(counts: dict[str, int], total: int) -> str:
    found = {reason: count for reason, count in counts.items() if count}
    if not found:
        return '<p class="none">none</p>'
    rows = [
        [reason.replace("_", " "), f"{count:,}", f"{count / total:.3%}", _bar(count, total)]
        for reason, count in sorted(found.items(), key=lambda pair: -pair[1])
    ]
    return _table(["reason", "rows", "share of all rows", ""], rows)


def _events(events: dict[str, int]) -> str:
    return _table(["event", "count"], [[name, f"{count:,}"] for name, count in events.items()])


def _inputs(manifest: Manifest) -> str:
    tokenizer = manifest.inputs.get("tokenizer", {})
    rows = [[f"tokenizer: {name}", str(value)] for name, value in tokenizer.items()]
    rows += [
        [f"{file['source']}: {file['name']}", f"{file['format']}, {file['sha256'][:16]}"]
        for file in manifest.inputs.get("sources", [])[:200]
    ]
    more = len(manifest.inputs.get("sources", [])) - 200
    if more > 0:
        rows.append([f"and {more:,} more files", "see manifest.json"])
    return _table(["", ""], rows)


def _ratio(part: int, total: int) -> str:
    return f"{part / total:.2f}" if total else "-"
