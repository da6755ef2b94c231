"""Counts of a job that makes data: what came of its requests, in a progress line and a table."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

from raytune_llama.generate.make_data.config import MakeDataConfig

NEAR_DUPLICATE = "near_duplicate"
"""Reason of a row whose instruction is too similar to one that is kept."""


@dataclass(frozen=True)
class RequestRecord:
    """One request and all that came of it."""

    number: int
    """Number of the request, from 1; it determines the prompt."""

    base_url: str
    """Base URL of the endpoint."""

    model: str | None
    """Model that the endpoint names as the author; None if it gave no answer."""

    finish_reason: str | None
    """Why generation ended."""

    form: str
    """How the reply was read, see `ParsedReply.form`; `unusable` if it has no row at all."""

    prompt_tokens: int | None
    """Number of prompt tokens; None if the endpoint does not report it."""

    completion_tokens: int | None
    """Number of completion tokens; None if the endpoint does not report it."""

    retries: dict[str, int]
    """Number of failed tries before the answer, by cause."""

    rows: list[dict[str, str]]
    """Rows that are kept."""

    rejected: list[dict[str, Any]]
    """Items that are not kept, or the reply: each with `reason`, `detail` and `item` or `reply`."""

    ignored_fields: dict[str, int]
    """Number of kept rows by the name of a field that is not part of a row and was left out."""

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON data; the class's constructor takes it back."""
        return asdict(self)


@dataclass
class Counts:
    """Sums over all requests of a job."""

    requests: int = 0
    """Number of requests."""

    rows: int = 0
    """Number of rows kept."""

    prompt_tokens: int = 0
    """Number of prompt tokens that the endpoint reported."""

    completion_tokens: int = 0
    """Number of completion tokens that the endpoint reported."""

    without_usage: int = 0
    """Number of answers for which the endpoint reported no tokens."""

    forms: Counter[str] = field(default_factory=Counter)
    """Number of replies by the form in which they were read."""

    rejected: Counter[str] = field(default_factory=Counter)
    """Number of items and replies that are not kept, by reason."""

    retries: Counter[str] = field(default_factory=Counter)
    """Number of failed tries that were repeated, by cause."""

    ignored_fields: Counter[str] = field(default_factory=Counter)
    """Number of kept rows by the name of a field that was left out."""

    models: Counter[str] = field(default_factory=Counter)
    """Number of replies by the model that the endpoint named."""

    base_urls: Counter[str] = field(default_factory=Counter)
    """Number of requests by the endpoint's base URL."""

    def add(self, record: RequestRecord) -> None:
        """Add a request."""
        self.requests += 1
        self.rows += len(record.rows)
        self.prompt_tokens += record.prompt_tokens or 0
        self.completion_tokens += record.completion_tokens or 0
        has_answer = record.model is not None or record.finish_reason is not None
        self.without_usage += has_answer and record.completion_tokens is None
        self.forms[record.form] += 1
        self.rejected.update(item["reason"] for item in record.rejected)
        self.retries.update(record.retries)
        self.ignored_fields.update(record.ignored_fields)
        self.models.update([record.model] if record.model else [])
        self.base_urls[record.base_url] += 1

    @property
    def tokens(self) -> int:
        """Number of prompt and completion tokens."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def duplicates(self) -> int:
        """Number of near duplicates."""
        return self.rejected[NEAR_DUPLICATE]

    @property
    def quarantined(self) -> int:
        """Number of items and replies that are not kept for another reason."""
        return self.rejected.total() - self.duplicates

    def to_json(self) -> dict[str, Any]:
        """Return the counts as JSON data."""
        return dict(vars(self))  # a Counter is a dict


def format_progress(
    config: MakeDataConfig, counts: Counts, *, num_new_rows: int, seconds: float
) -> str:
    """Return a progress line.

    Args:
        config: Config of the job, with its budgets.
        counts: Counts of the job.
        num_new_rows: Rows kept since the job was started.
        seconds: Seconds since then.
    """
    wanted = f" of {config.num_rows}" if config.num_rows else ""
    rate = 60 * num_new_rows / seconds if seconds > 0 else 0.0
    parts = [
        f"{counts.rows}{wanted} rows",
        f"{counts.requests}{f' of {config.max_requests}' if config.max_requests else ''} requests",
        f"{counts.tokens}{f' of {config.max_tokens}' if config.max_tokens else ''} tokens",
        f"{counts.duplicates} near duplicates",
        f"{counts.quarantined} quarantined",
        f"{rate:.1f} rows/min",
    ]
    if config.num_rows and rate:
        left = max(0, config.num_rows - counts.rows) / rate
        parts.append(f"{timedelta(seconds=round(60 * left))} to go for all rows")
    return ", ".join(parts)


def format_table(counts: Counts) -> list[str]:
    """Return the counts as lines of a table: name, number, and its parts."""
    tokens = {"prompt": counts.prompt_tokens, "completion": counts.completion_tokens}
    reasons = {name: n for name, n in counts.rejected.items() if name != NEAR_DUPLICATE}
    lines: list[tuple[str, int, dict[str, int]]] = [
        ("rows kept", counts.rows, {}),
        ("near duplicates", counts.duplicates, {}),
        ("quarantined", counts.quarantined, reasons),
        ("requests", counts.requests, dict(counts.forms)),
        ("repeated tries", counts.retries.total(), dict(counts.retries)),
        ("tokens", counts.tokens, {name: n for name, n in tokens.items() if n}),
    ]
    if counts.without_usage:
        lines.append(("replies without token counts", counts.without_usage, {}))
    if counts.ignored_fields:
        fields = dict(counts.ignored_fields)
        lines.append(("fields left out of rows", counts.ignored_fields.total(), fields))
    return [f"{name:<28} {number:>10,}   {_list(parts)}".rstrip() for name, number, parts in lines]


def _list(parts: dict[str, int]) -> str:
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {number:,}" for name, number in ordered)
