"""The templates by their names in configs."""

import logging

from transformers import PreTrainedTokenizerFast

from raytune_llama.chat.templates.alpaca import ALPACA
from raytune_llama.chat.templates.alpaca_inference import ALPACA_INFERENCE
from raytune_llama.chat.templates.belle import BELLE
from raytune_llama.chat.templates.llama2 import LLAMA2
from raytune_llama.chat.templates.names import TemplateName
from raytune_llama.chat.templates.plain import PlainTemplate
from raytune_llama.chat.templates.segments import Template, find_control_tokens
from raytune_llama.chat.templates.tokenizer import TokenizerTemplate
from raytune_llama.config.errors import UserError

logger = logging.getLogger(__name__)


_SPECS = {form.name: form for form in (ALPACA, ALPACA_INFERENCE, BELLE, LLAMA2)}


def build_template(name: TemplateName, tokenizer: PreTrainedTokenizerFast) -> Template:
    """Return a template for a tokenizer from `load_tokenizer`.

    Raises:
        ValueError: The tokenizer has no EOS, or no chat template that can be used.
    """
    if name == "tokenizer":
        return TokenizerTemplate(tokenizer)
    form, controls = _SPECS[name], find_control_tokens(tokenizer)
    if controls.bos is None and form.bos != "none":
        logger.warning("template %s: the tokenizer has no BOS, so none is written", name)
    return PlainTemplate(form, controls)


def check_roles(template: Template, *, num_conversations: int, num_with_system: int) -> None:
    """Refuse a template that does not fit the roles of a corpus, before any work is done.

    Raises:
        ValueError: Some conversations have a system's message and the template no place for it, or
            the template needs one and some have none.
    """
    without = num_conversations - num_with_system
    if num_with_system and not template.allows_system:
        raise UserError(
            f"template: {template.name} has no place for what the system says, which is part of "
            f"{num_with_system} of {num_conversations} conversations; name another template, or "
            "leave it out of the data"
        )
    if without and template.needs_system:
        raise UserError(
            f"template: {template.name} needs what the system says, which {without} of "
            f"{num_conversations} conversations lack; name another template, or add it"
        )
