"""Logging of drivers and workers: one line per event, on stderr.

    12:03:04 train: step 20 of 200: loss 2.113, 320 tokens/s

Modules log with `logging.getLogger(__name__)`; a process calls `setup_logging` once, at its start.
"""

import contextlib
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator

PACKAGE = "raytune_llama"

# Libraries whose info messages are hidden. Ray resets the level of "ray" in `ray.init`: pass it
# `logging_level=logging.WARNING`.
_QUIET = ("DeepSpeed", "datasets", "huggingface_hub", "matplotlib", "ray", "transformers")

# What libraries say to their own developers, such as that PEFT reads a property that transformers
# renames in its next version.
_DEVELOPER_WARNINGS = (FutureWarning, DeprecationWarning)
_LIBRARIES = r"(accelerate|deepspeed|huggingface_hub|peft|ray|torch|transformers)\b"


# Ray's notice that a local cluster has token authentication, which is as it should be. Its warning
# that a cluster has none comes from the same logger and stays.
_AUTH_LOGGER = "ray._private.authentication.authentication_token_setup"
_AUTH_NOTICE = "Token authentication is enabled"

WAIT_SECONDS = 2.0
"""Seconds after which something that is waited for is logged."""


@contextlib.contextmanager
def waiting(
    logger: logging.Logger, what: str, *, usually: str, seconds: float = WAIT_SECONDS
) -> Iterator[None]:
    """Log one line if the block takes longer than `seconds`, so that no silence looks like a hang.

    Args:
        logger: Logger of the calling module.
        what: What is waited for, such as "starting Ray".
        usually: How long it usually takes, such as "5 to 20 s".
        seconds: Seconds until the line.
    """
    timer = threading.Timer(seconds, logger.info, ("%s; usually takes %s", what, usually))
    timer.name, timer.daemon = "waiting", True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class LineFormatter(logging.Formatter):
    """Formats a record as one line: time, subpackage, level from warnings up, message."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(name)s: %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        """Return the line; a traceback follows on separate lines."""
        names = record.name.split(".")
        part = names[1] if names[0] == PACKAGE and len(names) > 1 else names[0]
        if record.levelno >= logging.WARNING:
            part += f": {record.levelname.lower()}"
        message = " | ".join(line for line in record.message.splitlines() if line.strip())
        return f"{record.asctime} {part}: {message}"


def _is_no_token_notice(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_AUTH_NOTICE)


def setup_logging(level: str = "info") -> None:
    """Log to stderr: this package from `level` up, libraries from warnings up.

    A second call replaces the first. Other handlers on the root logger are kept. Libraries'
    progress bars and warnings about their own future are turned off.

    Args:
        level: "debug", "info", "warning" or "error".

    Raises:
        ValueError: `level` is unknown.
    """
    logging.getLogger(PACKAGE).setLevel(level.upper())
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    for handler in root.handlers[:]:
        if isinstance(handler.formatter, LineFormatter):
            root.removeHandler(handler)
    logging.getLogger(_AUTH_LOGGER).addFilter(_is_no_token_notice)
    for category in _DEVELOPER_WARNINGS:
        warnings.filterwarnings("ignore", category=category, module=_LIBRARIES)
    # Read by transformers and huggingface_hub when they are imported.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter())
    root.addHandler(handler)
