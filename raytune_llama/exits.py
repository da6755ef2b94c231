"""Exit statuses of jobs, beside 0 (done) and 1 (failed)."""

from typing import Final

EXIT_MISTAKE: Final = 2
"""The user has something to mend."""

EXIT_STOPPED: Final = 75
"""Stopped, after what there was has been saved: the same command goes on. It is EX_TEMPFAIL of
sysexits.h."""
