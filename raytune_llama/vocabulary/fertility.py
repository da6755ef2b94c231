"""How much text a token holds, before and after a vocabulary was grown: figures and a picture."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raytune_llama.tokenizer.reference import ReferenceEncoder


@dataclass(frozen=True, kw_only=True)
class Fertility:
    """What a tokenizer makes of some text."""

    num_characters: int
    """Characters of the text."""
    num_bytes: int
    """Its bytes of UTF-8."""
    num_tokens: int
    """Its tokens, without special ones."""

    @property
    def characters_per_token(self) -> float:
        """Characters that a token stands for, on average."""
        return self.num_characters / self.num_tokens if self.num_tokens else 0.0


def measure_fertility(reference: ReferenceEncoder, texts: Sequence[str]) -> Fertility:
    """Encode texts and count."""
    return Fertility(
        num_characters=sum(map(len, texts)),
        num_bytes=sum(len(text.encode()) for text in texts),
        num_tokens=sum(map(len, reference.encode(texts))),
    )


def render_fertility(table: Mapping[str, tuple[Fertility, Fertility]]) -> str:
    """Return a table of characters a token before and after, one line a text."""
    lines = [
        f"{'text':<12}{'characters':>12}{'tokens before':>16}{'after':>12}{'chars a token':>22}"
    ]
    for name, (before, after) in table.items():
        ratio = f"{before.characters_per_token:.3f} -> {after.characters_per_token:.3f}"
        lines.append(
            f"{name:<12}{before.num_characters:>12,}{before.num_tokens:>16,}"
            f"{after.num_tokens:>12,}{ratio:>22}"
        )
    return "\n".join(lines)


def draw_fertility(table: Mapping[str, tuple[Fertility, Fertility]]) -> bytes:
    """Return a PNG of characters a token before and after."""
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
    axes.set_ylabel("characters a token")
    axes.legend()
    axes.margins(y=0.12)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    return buffer.getvalue()
