"""Ray-distributed training for LLaMA-family models, from raw text to a served endpoint."""

__version__ = "0.1.0"
"""The version, which `pyproject.toml` and `raytune --version` read from here."""
