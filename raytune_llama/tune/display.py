"""Progress of a sweep's trials: a live table in a terminal, else one log line per change."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta

from rich.console import Console
from rich.live import Live
from rich.table import Table

from raytune_llama.tune.config import SweepConfig
from raytune_llama.tune.constraints import Constraint, find_violations
from raytune_llama.tune.findings import count_states
from raytune_llama.tune.journal import Journal, TrialRecord
from raytune_llama.tune.space import format_sample

logger = logging.getLogger(__name__)

REFRESH_SECONDS = 1.0
MAX_ROWS = 30


class ProgressDisplay:
    """Shows the progress of one sweep's trials."""

    def __init__(self, sweep: SweepConfig, journal: Journal) -> None:
        self._sweep, self._journal = sweep, journal
        self._live: Live | None = None
        self._drawn = 0.0
        self._logged = dict(journal.trials)

    @contextlib.contextmanager
    def show(self) -> Iterator[None]:
        """Show the progress while the block runs."""
        if not sys.stderr.isatty():
            yield
            self._log_changes()
            return
        console = Console(stderr=True)
        with Live(console=console, auto_refresh=False, transient=True) as live:
            self._live = live
            yield
        self._live = None

    def refresh(self) -> None:
        """Show what has changed; may be called often, redraws at most once per second."""
        now = time.monotonic()
        if now - self._drawn < REFRESH_SECONDS:
            return
        self._drawn = now
        if self._live is not None:
            # A terminal that is closed fails a moment before SIGHUP says so.
            with contextlib.suppress(OSError):
                self._live.update(build_trial_table(self._sweep, self._journal), refresh=True)
        else:
            self._log_changes()

    def _log_changes(self) -> None:
        for number, trial in self._journal.trials.items():
            if trial != self._logged.get(number):
                logger.info("%s", format_trial_line(self._sweep, trial))
                self._logged[number] = trial


def format_trial_line(sweep: SweepConfig, trial: TrialRecord) -> str:
    """Return the status of a trial as one line."""
    value = "" if trial.value is None else f", {sweep.metric} {trial.value:.4f}"
    cause = f": {trial.cause}" if trial.cause else ""
    violations = find_violations(sweep.constraints, trial.others.get(trial.step, {}))
    if value and violations:
        value += f", violates {'; '.join(map(str, violations))}"
    head = f"trial {trial.number} {trial.state}, step {trial.step}/{sweep.max_steps}{value}"
    return f"{head}{_remaining_steps(sweep, trial)}{cause} ({format_sample(trial.sample)})"


def build_trial_table(sweep: SweepConfig, journal: Journal) -> Table:
    """Return the trials as a table: running ones first, then the newest."""
    trials = sorted(journal.trials.values(), key=lambda t: (t.has_ended, -t.number))
    table = Table(title=f"{sweep.sweep_dir}: {count_states(sweep, trials)}")
    heads = ["trial", "state", "step", sweep.metric, *sweep.constraints, "to go"]
    is_packed = any(trial.slot_uses for trial in trials)
    for head in heads + is_packed * ["slot"]:
        table.add_column(head, justify="right")
    table.add_column("sample")
    for trial in trials[:MAX_ROWS]:
        value = "" if trial.value is None else f"{trial.value:.4f}"
        step = f"{trial.step}/{sweep.max_steps}"
        others = trial.others.get(trial.step, {})
        limited = [_limited_cell(name, each, others) for name, each in sweep.constraints.items()]
        to_go = _remaining_steps(sweep, trial).removeprefix(", ").removesuffix(" to go")
        slot = is_packed * [_slot_cell(trial)]
        table.add_row(
            *(str(trial.number), trial.state, step, value),
            *(*limited, to_go, *slot, format_sample(trial.sample)),
        )
    if len(trials) > MAX_ROWS:
        table.caption = f"and {len(trials) - MAX_ROWS} more"
    return table


def _slot_cell(trial: TrialRecord) -> str:
    """Return the pack and the slot in it that a trial trains or has last trained in."""
    return f"{trial.slot_uses[-1].pack}/{trial.slot_uses[-1].slot}" if trial.slot_uses else ""


def _limited_cell(name: str, constraint: Constraint, values: Mapping[str, float | None]) -> str:
    """Return the value of a metric that has a constraint, and whether it violates it."""
    value = values.get(name)
    if value is None:
        return ""
    return f"{value:.4f}{' (violates)' if constraint.violation(value) else ''}"


def _remaining_steps(sweep: SweepConfig, trial: TrialRecord) -> str:
    if trial.has_ended or not trial.step:
        return ""
    seconds = trial.seconds / trial.step * (sweep.max_steps - trial.step)
    return f", {timedelta(seconds=round(seconds))} to go"
