"""Names of the files in a run directory that other jobs read; imports nothing heavy."""

from typing import Final

IDENTITY_FILE: Final = "identity.json"
"""File with what a run or sweep was started with: settings, and inputs by hash."""

RUN_CONFIG_FILE: Final = "run.yaml"
"""File with the resolved config of a run's newest start."""

RUN_KEY: Final = "run"
"""Manifest key of a result: last step of its run, best step and loss, and steps without effect."""

EVALUATED_KEY: Final = "evaluated"
"""Key of an identity: what is evaluated besides the token store, by name."""
