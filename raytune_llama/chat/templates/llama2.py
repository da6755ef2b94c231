"""LLaMA 2's form, with the system's message that Chinese-LLaMA-Alpaca-2 trains with by default."""

from raytune_llama.chat.templates.plain import PlainTemplateSpec, PromptContent
from raytune_llama.chat.templates.segments import Segment

DEFAULT_SYSTEM = "You are a helpful assistant. 你是一个乐于助人的助手。"
"""What the system says where a conversation does not tell."""


def _write_prompt(question: PromptContent) -> list[Segment]:
    start = [Segment("template", "[INST] ")]
    if question.is_first_exchange:
        system = Segment("template", DEFAULT_SYSTEM)
        if question.system is not None:
            system = Segment("system", question.system)
        end = Segment("template", "\n<</SYS>>\n\n")
        start = [Segment("template", "[INST] <<SYS>>\n"), system, end]
    return [*start, Segment("user", question.user), Segment("template", " [/INST]")]


LLAMA2 = PlainTemplateSpec("llama2", 1, bos="each", allows_system=True, write_prompt=_write_prompt)
"""Each exchange begins with BOS, and ends with EOS."""
