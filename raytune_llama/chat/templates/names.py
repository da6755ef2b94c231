"""The names of the templates, for configs that must not import what writes them."""

from typing import Literal

TemplateName = Literal["tokenizer", "alpaca", "alpaca_inference", "belle", "llama2"]
"""What a config may ask for; `tokenizer` is the tokenizer's own chat template."""
