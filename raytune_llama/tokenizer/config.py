"""Settings of tokenization: the encoder that makes token ids."""

from typing import Literal

EncoderKind = Literal["auto", "reference", "compiled"]
"""Requested encoder: `auto` uses the fast engine if its ids match the reference's and falls back to
the reference otherwise; `compiled` raises an error instead of falling back."""
