"""The form in which Chinese-LLaMA-Alpaca trains on instructions.

It has no section for an input: that is a part of the instruction. Upstream trains on single
exchanges; a further one follows here behind a blank line, without the header.
"""

from raytune_llama.chat.templates.plain import PlainTemplateSpec, PromptContent
from raytune_llama.chat.templates.segments import Segment

HEADER = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
"""The first line of the first prompt."""


def _write_prompt(question: PromptContent) -> list[Segment]:
    return [
        Segment(
            "template", (HEADER if question.is_first_exchange else "") + "\n\n### Instruction:\n"
        ),
        Segment("user", question.user),
        # With the space at the end, as a token of its own.
        Segment("template", "\n\n### Response: "),
    ]


ALPACA = PlainTemplateSpec(
    "alpaca", 1, bos="first", allows_system=False, write_prompt=_write_prompt
)
"""Training's form."""
