"""One line an event, on stderr, with the package's own news and only the warnings of others."""

import logging
import re
import threading
from collections.abc import Iterator

import pytest
from ray._private.authentication import authentication_token_setup

from raytune_llama.logs import setup_logging, waiting


@pytest.fixture(autouse=True)
def _restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("raytune_llama").setLevel(logging.NOTSET)


def test_event_of_a_module_is_one_line_with_time_and_part(
    capsys: pytest.CaptureFixture[str],
) -> None:
    setup_logging()
    logging.getLogger("raytune_llama.train.loop").info("step %d of %d:\n\nloss %.1f", 3, 9, 2.5)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"\d\d:\d\d:\d\d train: step 3 of 9: \| loss 2\.5\n", err)


def test_warnings_carry_their_level(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    logging.getLogger("raytune_llama.data.store.token_store").warning("2 rows quarantined")
    assert capsys.readouterr().err.endswith(" data: warning: 2 rows quarantined\n")


@pytest.mark.parametrize(
    ("level", "heard"), [("debug", ["d", "i", "w"]), ("info", ["i", "w"]), ("warning", ["w"])]
)
def test_level_selects_own_events(
    level: str, heard: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging(level)
    logger = logging.getLogger("raytune_llama.model.lora")
    logger.debug("d")
    logger.info("i")
    logger.warning("w")
    assert [line[-1] for line in capsys.readouterr().err.splitlines()] == heard


@pytest.mark.parametrize("library", ["ray.train", "transformers.modeling", "DeepSpeed", "any.one"])
def test_libraries_are_heard_from_warnings_on(
    library: str, capsys: pytest.CaptureFixture[str]
) -> None:
    logging.getLogger("ray").setLevel(logging.INFO)
    setup_logging("debug")
    logging.getLogger(library).info("news")
    assert capsys.readouterr().err == ""


def test_notice_that_ray_asks_for_tokens_is_hidden_and_the_warning_that_it_does_not_stays(
    caplog: pytest.LogCaptureFixture,
) -> None:
    setup_logging()
    authentication_token_setup._warn_token_auth_enabled()
    assert not caplog.records
    authentication_token_setup._warn_token_auth_disabled()
    assert "Token authentication is disabled" in caplog.text


def test_second_setup_replaces_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    setup_logging()
    logging.getLogger("raytune_llama.data").info("once")
    assert capsys.readouterr().err.count("once") == 1


def test_handlers_of_others_stay(caplog: pytest.LogCaptureFixture) -> None:
    setup_logging()
    logging.getLogger("raytune_llama.data").info("also for pytest")
    assert "also for pytest" in caplog.messages


def test_traceback_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    try:
        _ = 1 / 0
    except ZeroDivisionError:
        logging.getLogger("raytune_llama.data").exception("write failed")
    err = capsys.readouterr().err
    assert "write failed" in err.splitlines()[0]
    assert "ZeroDivisionError" in err


def test_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="LOUD"):
        setup_logging("loud")


class _Heard(logging.Handler):
    """Keeps messages, and says when there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []
        self.is_logged = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
        self.is_logged.set()


@pytest.fixture
def heard() -> Iterator[_Heard]:
    handler, logger = _Heard(), logging.getLogger("raytune_llama.waits")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)


def test_waiting_for_something_slow_is_one_line_while_it_lasts(heard: _Heard) -> None:
    logger = logging.getLogger("raytune_llama.waits")
    with waiting(logger, "starting Ray", usually="5 to 20 s", seconds=0.01):
        assert heard.is_logged.wait(60)
    (message,) = heard.messages
    assert "starting Ray" in message
    assert "5 to 20 s" in message


def test_waiting_for_something_fast_or_failed_leaves_no_line_and_no_thread(heard: _Heard) -> None:
    logger = logging.getLogger("raytune_llama.waits")
    before = set(threading.enumerate())
    with pytest.raises(KeyError), waiting(logger, "a disk", usually="1 s", seconds=600):
        raise KeyError
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
    assert set(threading.enumerate()) <= before
    assert heard.messages == []
