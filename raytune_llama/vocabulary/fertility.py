"""Fertility: characters per token before and after an expansion, as a table and a plot."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raytune_llama.tokenizer.reference import ReferenceEncoder


@dataclass(frozen=True, kw_only=True)
class Fertility:
    """Size of some text in characters, bytes and tokens of a tokenizer."""

    num_characters: int
    """Number of characters."""
    num_bytes: int
    """Number of UTF-8 bytes."""
    num_tokens: int
    """Number of tokens, without special ones."""

    @property
    def characters_per_token(self) -> float:
        """Mean number of characters per token; 0 without tokens."""
        return self.num_characters / self.num_tokens if self.num_tokens else 0.0


def measure_fertility(reference: ReferenceEncoder, texts: Sequence[str]) -> Fertility:
    """Encode texts and return the total counts."""
    return Fertility(
        num_characters=sum(map(len, texts)),
        num_bytes=sum(len(text.encode()) for text in texts),
        num_tokens=sum(map(len, reference.encode(texts))),
    )


def render_fertility(table: Mapping[str, tuple[Fertility, Fertility]]) -> str:
    """Return a table of characters per token before and after, one line per kind of text."""
    lines = [
        f"{'text':<12}{'characters':>12}{'tokens before':>16}{'after':>12}{'chars per token':>22}"
    ]
    for name, (before, after) in table.items():
        ratio = f"{before.characters_per_token:.3f} -> {after.characters_per_token:.3f}"
        lines.append(
            f"{name:<12}{before.num_characters:>12,}{before.num_tokens:>16,}"
            f"{after.num_tokens:>12,}{ratio:>22}"
        )
    return "\n".join(lines)


def draw_fertility(table: Mapping[str, tuple[Fertility, Fertility]]) -> bytes:
    """Return a PNG bar chart of characters per token before and after."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, label in enumerate(("before", "after")):
        values = [pair[number].characters_per_token for pair in table.values()]
        places = [place + 0.4 * number - 0.2 for place in range(len(values))]
        bars = axes.bar(places, values, width=0.38, label=label, color=("0.7", "C0")[number])
        axes.bar_label(bars, fmt="%.2f")
    axes.set_xticks(range(len(table)), list(table))
    axes.set_ylabel("characters per token")
    axes.legend()
    axes.margins(y=0.12)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    return buffer.getvalue()
