"""Generation settings of known projects, by name. Imports nothing heavy."""

from dataclasses import dataclass
from typing import Literal

from raytune_llama.chat.config import TemplateName

PresetName = Literal["chinese-alpaca", "belle", "calm"]
"""Names of the presets."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings of a project's own inference script."""

    template: TemplateName
    """Chat template that its script writes."""

    temperature: float
    """Sampling temperature."""

    top_p: float
    """Probability mass of nucleus sampling."""

    top_k: int
    """Number of most likely tokens to sample from."""

    repetition_penalty: float
    """Penalty of tokens that have already occurred, the prompt's included."""

    max_new_tokens: int
    """Maximum number of generated tokens."""


PRESETS: dict[PresetName, Preset] = {
    "chinese-alpaca": Preset(
        template="alpaca_inference",
        temperature=0.2,
        top_p=0.9,
        top_k=40,
        repetition_penalty=1.1,
        max_new_tokens=400,
    ),
    "belle": Preset(
        template="belle",
        temperature=0.9,
        top_p=0.6,
        top_k=30,
        repetition_penalty=1.2,
        max_new_tokens=128,
    ),
    "calm": Preset(
        template="belle",
        temperature=0.001,
        top_p=0.85,
        top_k=30,
        repetition_penalty=1.2,
        max_new_tokens=1024,
    ),
}
"""The presets.

chinese-alpaca: `scripts/inference/inference_hf.py` of Chinese-LLaMA-Alpaca, newest version. Version
3.1 has the same numbers but a repetition penalty of 1.3.
belle: `inference.py` of BELLE, newest version.
calm: `inference.py` of CALM, which is a copy of BELLE's with another temperature, top-p and length;
top-k and repetition penalty are BELLE's.
"""
