"""Which trials trained together in a pack, as a part of the sweep's HTML page."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape

from raytune_llama.storage.place import Place
from raytune_llama.train.monitoring.metrics import INPUT_TOKENS, read_metrics
from raytune_llama.tune.journal import SlotUse, TrialRecord, trial_dir

_WIDTH = 900
_BAR_HEIGHT = 22
_LABEL_WIDTH = 70


def render_packs(sweep_dir: Place, trials: Sequence[TrialRecord]) -> str:
    """Return a timeline of the packs as HTML; empty if no trial was in one.

    Args:
        sweep_dir: directory of the sweep.
        trials: trials of the sweep.
    """
    slot_uses = [(trial, use) for trial in trials for use in trial.slot_uses]
    if not slot_uses:
        return ""
    by_pack: defaultdict[int, list[tuple[TrialRecord, SlotUse]]] = defaultdict(list)
    for trial, use in slot_uses:
        by_pack[use.pack].append((trial, use))
    tokens = {trial.number: _input_tokens(sweep_dir, trial) for trial, _ in slot_uses}
    parts = [_render_pack(pack, found, tokens) for pack, found in sorted(by_pack.items())]
    return "<h2>Packs</h2>\n" + "\n".join(parts)


def _input_tokens(sweep_dir: Place, trial: TrialRecord) -> float:
    records = read_metrics(trial_dir(sweep_dir, trial.number))
    return sum(record.get(INPUT_TOKENS) or 0.0 for record in records)


def _render_pack(
    pack: int, slot_uses: Sequence[tuple[TrialRecord, SlotUse]], tokens: Mapping[int, float]
) -> str:
    """Return a pack's throughput in words, and its slots as rows of bars over time."""
    start = min(use.started for _, use in slot_uses)
    stop = max(use.ended or use.started for _, use in slot_uses)
    seconds = max(stop - start, 1e-9)
    busy = max(_busy_seconds([use for _, use in slot_uses]), 1e-9)
    numbers = {trial.number for trial, _ in slot_uses}
    # A trial that another pack has continued counts there.
    total = sum(tokens[t.number] for t, use in slot_uses if use == t.slot_uses[-1])
    num_slots = max(use.slot for _, use in slot_uses) + 1
    text = (
        f"Pack {pack}: {len(numbers)} trials in {num_slots} slots, {busy:,.0f} s with the start "
        f"of the workers, {total:,.0f} tokens, {total / busy:,.0f} tokens/s"
    )
    bars = [_render_bar(trial, use, start, seconds) for trial, use in slot_uses if use.ended]
    labels = [
        f'<text x="0" y="{slot * _BAR_HEIGHT + 15}">slot {slot}</text>' for slot in range(num_slots)
    ]
    height = num_slots * _BAR_HEIGHT
    return (
        f"<p>{escape(text)}</p>\n"
        f'<svg width="100%" viewBox="0 0 {_LABEL_WIDTH + _WIDTH} {height}" font-size="12">'
        + "".join([*labels, *bars])
        + "</svg>"
    )


def _busy_seconds(slot_uses: Sequence[SlotUse]) -> float:
    """Return the seconds in which at least one slot was used."""
    total, until = 0.0, 0.0
    for use in sorted(slot_uses, key=lambda use: use.started):
        ended = use.ended or use.started
        total += max(0.0, ended - max(use.started, until))
        until = max(until, ended)
    return total


def _render_bar(trial: TrialRecord, use: SlotUse, start: float, seconds: float) -> str:
    assert use.ended is not None
    left = _LABEL_WIDTH + _WIDTH * (use.started - start) / seconds
    width = max(_WIDTH * (use.ended - use.started) / seconds, 2.0)
    top = use.slot * _BAR_HEIGHT
    color = "#7aa6d8" if trial.state == "finished" else "#c9ced6"
    title = f"trial {trial.number}: {trial.state} at step {trial.step}"
    return (
        f'<g><title>{escape(title)}</title><rect x="{left:.1f}" y="{top + 2}" '
        f'width="{width:.1f}" height="{_BAR_HEIGHT - 4}" fill="{color}" stroke="white"/>'
        f'<text x="{left + 4:.1f}" y="{top + 15}">{trial.number}</text></g>'
    )
