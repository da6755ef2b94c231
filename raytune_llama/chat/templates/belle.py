"""BELLE's form: Human and Assistant, on lines of their own, without BOS.

The line break behind the colon is no detail: a space there would merge into the first token of the
answer, and the mask would be off by one.
"""

from raytune_llama.chat.templates.plain import PlainTemplateSpec, PromptContent
from raytune_llama.chat.templates.segments import Segment


def _write_prompt(question: PromptContent) -> list[Segment]:
    return [
        Segment("template", "Human: \n"),
        Segment("user", question.user),
        Segment("template", "\n\nAssistant: \n"),
    ]


BELLE = PlainTemplateSpec("belle", 1, bos="none", allows_system=False, write_prompt=_write_prompt)
"""BELLE's and CALM's form."""
