"""The form in which Chinese-LLaMA-Alpaca asks its models: with blank lines that training lacks."""

from raytune_llama.chat.templates.alpaca import HEADER
from raytune_llama.chat.templates.plain import PlainTemplateSpec, PromptContent
from raytune_llama.chat.templates.segments import Segment


def _write_prompt(question: PromptContent) -> list[Segment]:
    return [
        Segment(
            "template", (HEADER if question.is_first_exchange else "") + "\n\n### Instruction:\n\n"
        ),
        Segment("user", question.user),
        Segment("template", "\n\n### Response:\n\n"),
    ]


ALPACA_INFERENCE = PlainTemplateSpec(
    "alpaca_inference", 1, bos="first", allows_system=False, write_prompt=_write_prompt
)
"""Inference's form, as the scripts of the seeds have it."""
