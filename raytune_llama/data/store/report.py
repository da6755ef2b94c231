"""HTML report of a token store: content and dropped rows. A single file without scripts."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from raytune_llama.data.store.lengths import LengthTable, is_length_event, share
from raytune_llama.data.store.manifest import (
    ALIAS,
    IGNORED_FIELD,
    REPAIRED,
    REPEATED_FIELD,
    SPLITS,
    SUSPICIOUS,
    UNKNOWN_FIELD,
    Manifest,
    RowCounts,
    Shard,
    named_events,
)
from raytune_llama.storage.hashes import find_hash, show_hash

REPORT_NAME = "report.html"
"""File name inside a store; not listed in the manifest, from which it is rendered."""

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c2127; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #d8dde3; text-align: right; }
th { color: #56606b; font-weight: 600; } th:first-child, td:first-child { text-align: left; }
td:first-child { white-space: nowrap; } td.bar { width: 35%; text-align: left; }
td.bar div { background: #3b7dd8; height: .9rem; min-width: 1px; }
.bad td.bar div { background: #c8553d; } .none { color: #56606b; } code { font-size: .85em; }
dl { display: grid; grid-template-columns: max-content auto; gap: .2rem 1rem; }
dt { color: #56606b; } dd { margin: 0; }
.texts table { width: auto; } .texts td:nth-child(3), .texts th:nth-child(3) { text-align: left; }
"""

_REASONS = {
    "too_long": "too long (data.chat.truncation is drop)",
    "no_target": "no token of an answer to train on is left (no target)",
}

_ANSWERS = {
    "held_out_answers_in_training": "held-out answers that are in training too: the evaluation "
    "loss is too low",
    "masked_turns": "turns that are marked in their rows as not trained",
    "split_boundaries": "answers encoded apart from their prompt, as one token would span both",
    "suspicious": "conversations with an answer that looks wrong",
}
"""Events about answers, by name."""

_COLUMNS = {
    ALIAS: "read: another name of a known column",
    IGNORED_FIELD: "not used",
    REPEATED_FIELD: "not used, and more than once in a row",
    UNKNOWN_FIELD: "refused: it may carry meaning",
}
"""Events about the columns of rows, by the beginning of their names."""


def render_report(manifest: Manifest, source_names: Sequence[str]) -> str:
    """Render the report as HTML; equal manifests and names give equal pages.

    Args:
        manifest: Manifest of the store.
        source_names: Names of the configured sources, in store order.
    """
    rows, table = manifest.rows, LengthTable.from_manifest(manifest)
    sections = [
        _section("Splits", _splits(manifest)),
        _section("Sources", _sources(manifest, source_names)),
        _section(f"{_things(manifest).capitalize()} by length", _lengths(manifest, table)),
        _section("Skipped rows", _reasons(rows.skipped, rows.total)),
        _section("Quarantined rows", _reasons(rows.quarantined, rows.total), "bad"),
        *_event_sections(rows),
        _section("Inputs", _inputs(manifest)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Token store</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>Token store <code>{manifest.fingerprint[:12]}</code></h1>\n"
        f"{_summary(manifest, table)}\n" + "\n".join(sections) + "\n</body></html>\n"
    )


def _summary(manifest: Manifest, table: LengthTable) -> str:
    rows = manifest.rows
    text = (
        f"{rows.total:,} rows were read: {rows.documents:,} became {_things(manifest)}, "
        f"{sum(rows.skipped.values()):,} were skipped, {rows.num_quarantined:,} are in quarantine."
    )
    if rows.aliased:
        text += f" In {rows.aliased:,} rows the text was under an alias of its field."
    facts = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>" for name, fact in table.facts()
    )
    return f"<p>{text}</p>" + (f"\n<dl>{facts}</dl>" if facts else "")


def _things(manifest: Manifest) -> str:
    """Return what the store holds, in words."""
    return "conversations" if "chat" in manifest.inputs else "documents"


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
    return f"{100 * part / total:.2f}%%" if part else ""


def _splits(manifest: Manifest) -> str:
    head = ["split", _things(manifest), "tokens", "bytes of text", "bytes per token", "shards"]
    splits = {name: manifest.splits[name] for name in SPLITS}
    learned = [_num_targets(split.shards) for split in splits.values()]
    has_targets = any(count is not None for count in learned)
    return _table(
        [*head[:3], "learned", *head[3:]] if has_targets else head,
        [
            [
                name,
                f"{split.documents:,}",
                f"{split.tokens:,}",
                *([share(targets or 0, split.tokens)] if has_targets else []),
                f"{split.text_bytes:,}",
                _ratio(split.text_bytes, split.tokens),
                f"{len(split.shards):,}",
            ]
            for (name, split), targets in zip(splits.items(), learned, strict=True)
        ],
    )


def _sources(manifest: Manifest, names: Sequence[str]) -> str:
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    total = sum(shard.tokens for shard in shards)
    has_targets = _num_targets(shards) is not None
    rows: list[list[str]] = []
    for number, name in enumerate(names):
        mine = [shard for shard in shards if shard.source == number]
        tokens = sum(shard.tokens for shard in mine)
        text_bytes = sum(shard.text_bytes for shard in mine)
        documents = sum(shard.documents for shard in mine)
        numbers = [f"{documents:,}", f"{tokens:,}"]
        if has_targets:
            numbers.append(share(_num_targets(mine) or 0, tokens))
        numbers += [_ratio(text_bytes, tokens), share(tokens, total)]
        rows.append([name, *numbers, _bar(tokens, total)])
    head = ["source", _things(manifest), "tokens", *(["learned"] if has_targets else [])]
    return _table([*head, "bytes per token", "share of tokens", ""], rows)


def _num_targets(shards: Iterable[Shard]) -> int | None:
    targets = [shard.targets for shard in shards if shard.targets is not None]
    return sum(targets) if targets else None


def _lengths(manifest: Manifest, table: LengthTable) -> str:
    """Return a table of lengths; the shares of longer ones are for any length of a sequence."""
    bins = table.bins
    if not bins:
        return '<p class="none">none</p>'
    is_chat = "chat" in manifest.inputs
    most, left = max(row.documents for row in bins) or 1, table.num_documents
    rows: list[list[str]] = []
    for row in bins:
        longer = [share(left, table.num_documents)]
        moved = [f"{row.cut:,}", f"{row.left_out:,}"] if is_chat else []
        kept = f"{row.documents:,}"
        rows.append([row.label, kept, *longer, *moved, _bar(row.documents, most)])
        left -= row.documents
    if not is_chat:
        return _table(["tokens, without BOS and EOS", "documents", "this long or longer", ""], rows)
    head = ["tokens", "in the store", "this long or longer", "cut from", "left out", ""]
    return f"<p>{_limit(manifest.inputs['chat'])}</p>{_table(head, rows)}"


def _limit(chat: Mapping[str, Any]) -> str:
    most = chat.get("max_tokens")
    if most is None:
        return "Conversations of any length are in the store."
    words = {"keep_eos": "are cut at their end", "cut_left": "are cut at their beginning"}
    done = words.get(str(chat.get("truncation")), "are left out")
    return (
        f"Conversations of more than {most:,} tokens (<code>data.chat.max_tokens</code>, by "
        f"default <code>batch.sequence_tokens</code>) {done}."
    )


def _reasons(counts: Mapping[str, int], total: int) -> str:
    found = {reason: count for reason, count in counts.items() if count}
    if not found:
        return '<p class="none">none</p>'
    rows = [
        [
            _REASONS.get(name, name.replace("_", " ")),
            f"{count:,}",
            f"{count / total:.3%}",
            _bar(count, total),
        ]
        for name, count in sorted(found.items(), key=lambda pair: -pair[1])
    ]
    return _table(["reason", "rows", "share of all rows", ""], rows)


def _event_sections(rows: RowCounts) -> Iterator[str]:
    """Yield a section for each group of events that were counted."""
    left = {name: count for name, count in rows.events.items() if not is_length_event(name)}
    answers = [
        [meaning, f"{left.pop(name):,}", ""] for name, meaning in _ANSWERS.items() if name in left
    ]
    kinds = _take(left, SUSPICIOUS)
    answers += [["of these: like a failed export", f"{n:,}", kind] for kind, n in kinds.items()]
    if answers:
        yield _section("Answers", _table(["what", "count", "text"], answers), "texts")
    columns = [
        [name, f"{count:,}", meaning]
        for prefix, meaning in _COLUMNS.items()
        for name, count in _take(left, prefix).items()
    ]
    if columns:
        yield _section("Columns", _table(["column", "count", "what was done"], columns), "texts")
    repairs = _take(left, REPAIRED)
    if repairs:
        lines = [[name, f"{count:,}"] for name, count in repairs.items()]
        yield _section("Repairs", _table(["repair", "conversations"], lines), "texts")
    if left:
        lines = [[name.replace("_", " "), f"{count:,}"] for name, count in left.items()]
        yield _section("Other events", _table(["event", "count"], lines), "texts")


def _take(events: dict[str, int], prefix: str) -> dict[str, int]:
    """Remove the events with a prefix; return their counts by the rest of their names."""
    found = named_events(events, prefix)
    for name in found:
        del events[prefix + name]
    return found


def _inputs(manifest: Manifest) -> str:
    rows = [
        [f"{section}: {name.replace('_', ' ')}", _value(value)]
        for section in ("tokenizer", "chat")
        for name, value in manifest.inputs.get(section, {}).items()
    ]
    rows += [
        [
            f"{file['source']}: {file['name']}",
            f"{file['format']}, {show_hash(find_hash(file) or '')}",
        ]
        for file in manifest.inputs.get("sources", [])[:200]
    ]
    more = len(manifest.inputs.get("sources", [])) - 200
    if more > 0:
        rows.append([f"and {more:,} more files", "see manifest.json"])
    return _table(["", ""], rows)


def _value(value: object) -> str:
    """Return a setting for people: of several switches, those that are on."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        value = [name for name, is_on in value.items() if is_on]
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return "none" if value in (None, "") else str(value)


def _ratio(part: int, total: int) -> str:
    return f"{part / total:.2f}" if total else "-"
