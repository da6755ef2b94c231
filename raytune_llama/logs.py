"""Logging of drivers and workers: one line for each event, on stderr.

    12:03:04 train: step 20 of 200: loss 2.113, 320 tokens/s

Modules log with `logging.getLogger(__name__)`; a process calls `setup_logging` once, at its start.
"""

import logging
import sys

PACKAGE = "raytune_llama"

# Their news are not the run's news. Ray sets the level of "ray" again in `ray.init`: pass it
# `logging_level=logging.WARNING`.
_QUIET = ("DeepSpeed", "datasets", "huggingface_hub", "matplotlib", "ray", "transformers")


class LineFormatter(logging.Formatter):
    """Formats a record as one line: time, part of the package, level if it warns, message."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(name)s: %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        """Return the line; a traceback follows it on lines of its own."""
        names = record.name.split(".")
        part = names[1] if names[0] == PACKAGE and len(names) > 1 else names[0]
        if record.levelno >= logging.WARNING:
            part += f": {record.levelname.lower()}"
        message = " | ".join(line for line in record.message.splitlines() if line.strip())
        return f"{record.asctime} {part}: {message}"


def setup_logging(level: str = "info") -> None:
    """Send log lines to stderr: ours from `level` on, those of libraries from warnings on.

    A second call replaces the first. Handlers that others put on the root logger stay.

    Args:
        level: "debug", "info", "warning" or "error".

    Raises:
        ValueError: There is no such level.
    """
    logging.getLogger(PACKAGE).setLevel(level.upper())
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    for handler in root.handlers[:]:
        if isinstance(handler.formatter, LineFormatter):
            root.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter())
    root.addHandler(handler)
