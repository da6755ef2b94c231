"""The plain text formats of known projects: Chinese-LLaMA-Alpaca, BELLE and CALM, LLaMA 2.

`plain.py` renders them. A new one is a `PlainTemplateSpec` here, in `SPECS`, and its name in
`chat/config.py`.
"""

from raytune_llama.chat.templates.plain import PlainTemplateSpec, PromptContent
from raytune_llama.chat.templates.segments import Segment

ALPACA_HEADER = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
"""First line of the first Alpaca prompt."""

LLAMA2_DEFAULT_SYSTEM = "You are a helpful assistant. 你是一个乐于助人的助手。"
"""System message of a LLaMA 2 conversation without one, from Chinese-LLaMA-Alpaca-2's training."""


def _write_alpaca(question: PromptContent) -> list[Segment]:
    """Write the format that Chinese-LLaMA-Alpaca trains with.

    It has no section for an input, which is part of the instruction. Upstream trains on single
    exchanges; here further ones follow after a blank line, without the header.
    """
    header = ALPACA_HEADER if question.is_first_exchange else ""
    return [
        Segment("template", header + "\n\n### Instruction:\n"),
        Segment("user", question.user),
        # The trailing space is a separate token.
        Segment("template", "\n\n### Response: "),
    ]


def _write_alpaca_inference(question: PromptContent) -> list[Segment]:
    """Write the format of Chinese-LLaMA-Alpaca's inference: with blank lines training lacks."""
    header = ALPACA_HEADER if question.is_first_exchange else ""
    return [
        Segment("template", header + "\n\n### Instruction:\n\n"),
        Segment("user", question.user),
        Segment("template", "\n\n### Response:\n\n"),
    ]


def _write_belle(question: PromptContent) -> list[Segment]:
    """Write BELLE's format: Human and Assistant on separate lines, without BOS.

    The line break after the colon matters: a space there would merge into the first token of the
    answer, and the mask would be off by one.
    """
    return [
        Segment("template", "Human: \n"),
        Segment("user", question.user),
        Segment("template", "\n\nAssistant: \n"),
    ]


def _write_llama2(question: PromptContent) -> list[Segment]:
    """Write LLaMA 2's format: the system message is inside the first instruction."""
    start = [Segment("template", "[INST] ")]
    if question.is_first_exchange:
        system = Segment("template", LLAMA2_DEFAULT_SYSTEM)
        if question.system is not None:
            system = Segment("system", question.system)
        end = Segment("template", "\n<</SYS>>\n\n")
        start = [Segment("template", "[INST] <<SYS>>\n"), system, end]
    return [*start, Segment("user", question.user), Segment("template", " [/INST]")]


ALPACA = PlainTemplateSpec(
    "alpaca", 1, bos="first", allows_system=False, write_prompt=_write_alpaca
)
"""Template that Chinese-LLaMA-Alpaca trains with."""

ALPACA_INFERENCE = PlainTemplateSpec(
    "alpaca_inference", 1, bos="first", allows_system=False, write_prompt=_write_alpaca_inference
)
"""Template of the inference scripts of Chinese-LLaMA-Alpaca."""

BELLE = PlainTemplateSpec("belle", 1, bos="none", allows_system=False, write_prompt=_write_belle)
"""Template of BELLE and CALM."""

LLAMA2 = PlainTemplateSpec("llama2", 1, bos="each", allows_system=True, write_prompt=_write_llama2)
"""Template of LLaMA 2; each exchange begins with BOS and ends with EOS."""

SPECS = {spec.name: spec for spec in (ALPACA, ALPACA_INFERENCE, BELLE, LLAMA2)}
"""Every plain template by its name."""
