"""Promise: the first signal ends a job in order, the second Ctrl-C at once; nohup stays nohup."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from raytune_llama import signals
from raytune_llama.signals import Interruption, StopSignal, signals_kept
from tests.terminal import Terminal

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Handle signals as a process does that a shell has started, whatever started the tests."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_interruption_first_signal_raises_keyboard_interrupt(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), Interruption():
        signal.raise_signal(number)
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", SIGNALS)
def test_stop_signal_calls_back_once_and_goes_on(number: signal.Signals) -> None:
    calls: list[bool] = []
    with Interruption() as job:
        with StopSignal() as stop:
            stop.set_callback(lambda: calls.append(stop.is_requested))
            signal.raise_signal(number)
            # A closed terminal and `systemctl stop` send more than one.
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGTERM)
            assert stop.wait(60)
        assert calls == [True]
        # It was not for the part alone: from now on, Ctrl-C is the second.
        assert job.is_requested


def test_ctrl_c_that_a_launcher_passes_on_is_not_a_second_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(signals, "REPEAT_SECONDS", 600.0)
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert stop.is_requested


def test_stop_signal_received_before_there_is_a_callback_is_not_lost() -> None:
    calls: list[str] = []
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGHUP)
        stop.set_callback(lambda: calls.append("stop"))
    assert calls == ["stop"]


def test_signal_that_was_ignored_at_the_start_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interruption(), StopSignal() as stop:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGINT)
        assert not stop.is_requested
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_requested


STUCK = """
import time
from raytune_llama.signals import Interruption
print("ready", flush=True)
with Interruption():
    while True:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            print("cleaning up", flush=True)
"""


def test_second_ctrl_c_ends_a_process_that_is_stuck_with_130() -> None:
    with Terminal([sys.executable, "-c", STUCK]) as terminal:
        terminal.wait_until(lambda: "ready" in terminal.printed)
        assert terminal.press_ctrl_c_until_it_ends() < 30
        assert terminal.wait() == 130
        assert terminal.printed.count("cleaning up") == 1
        assert "Traceback" not in terminal.printed


SAVES = """
import sys
from pathlib import Path
from raytune_llama.signals import StopSignal
with StopSignal() as stop:
    print("ready", flush=True)
    stop.wait(60)
    print("saving", flush=True)
    Path(sys.argv[1]).write_text("saved")
    print("saved", file=sys.stderr, flush=True)
sys.exit(75)
"""


SHOWS = """
import signal
import sys
from pathlib import Path
from raytune_llama import cli

def wait(argv, program):
    signal.signal(signal.SIGTERM, lambda *_: None)
    print("ready", flush=True)
    signal.pause()
    cli.demo(["--help"], "raytune demo")
    Path(argv[0]).write_text("shown")
    return 75

cli.VERBS["job"] = wait
cli.run("job")
"""


def test_job_that_outlives_its_terminal_under_nohup_shows_its_result_and_keeps_its_status(
    tmp_path: Path,
) -> None:
    file = tmp_path / "state"
    with Terminal([sys.executable, "-c", SHOWS, str(file)], nohup=True) as terminal:
        terminal.wait_until(lambda: "ready" in terminal.printed)
        terminal.close()
        terminal.process.terminate()
        assert terminal.wait() == 75
    assert file.read_text() == "shown"


@pytest.mark.parametrize("end", ["closed terminal", "ctrl-c"])
def test_process_whose_terminal_is_gone_can_print_save_and_exit(tmp_path: Path, end: str) -> None:
    file = tmp_path / "state"
    with Terminal([sys.executable, "-c", SAVES, str(file)]) as terminal:
        terminal.wait_until(lambda: "ready" in terminal.printed)
        terminal.close() if end == "closed terminal" else terminal.press_ctrl_c()
        assert terminal.wait() == 75
    assert file.read_text() == "saved"


def test_signals_kept_keeps_the_handler_and_blocks_sighup_in_children_alone() -> None:
    code = "import signal; print(signal.SIGHUP in signal.pthread_sigmask(signal.SIG_BLOCK, []))"

    def start_ray() -> None:
        with signals_kept():
            signal.signal(signal.SIGTERM, lambda *_: None)  # as Ray does
            child = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
            assert child.stdout == b"True\n"
            signal.raise_signal(signal.SIGHUP)
            assert not job.is_requested

    with Interruption() as job:
        ours = signal.getsignal(signal.SIGTERM)
        # A terminal that is closed meanwhile is noticed afterwards.
        with pytest.raises(KeyboardInterrupt):
            start_ray()
        assert signal.getsignal(signal.SIGTERM) == ours


def test_signals_kept_raises_at_its_end_since_a_fork_loses_what_a_handler_raises() -> None:
    done: list[str] = []

    def start_ray() -> None:
        with signals_kept():
            signal.raise_signal(signal.SIGINT)
            done.append("started")
        done.append("not reached")

    with pytest.raises(KeyboardInterrupt), Interruption():
        start_ray()
    assert done == ["started"]


def test_stop_signal_within_an_interruption_that_was_lost_is_requested() -> None:
    with Interruption():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGHUP)
        with StopSignal() as stop:
            assert stop.is_requested
