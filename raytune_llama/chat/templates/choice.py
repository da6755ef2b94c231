"""Look up templates by their names in configs."""

import logging

from transformers import PreTrainedTokenizerFast

from raytune_llama.chat.config import TemplateName
from raytune_llama.chat.templates.formats import SPECS
from raytune_llama.chat.templates.plain import PlainTemplate
from raytune_llama.chat.templates.segments import Template, find_control_tokens
from raytune_llama.chat.templates.tokenizer import TokenizerTemplate
from raytune_llama.config.errors import UserError

logger = logging.getLogger(__name__)


def build_template(name: TemplateName, tokenizer: PreTrainedTokenizerFast) -> Template:
    """Return a template for a tokenizer from `load_tokenizer`.

    Raises:
        ValueError: The tokenizer has no EOS, or no usable chat template.
    """
    if name == "tokenizer":
        return TokenizerTemplate(tokenizer)
    form, controls = SPECS[name], find_control_tokens(tokenizer)
    if controls.bos is None and form.bos != "none":
        logger.warning("template %s: the tokenizer has no BOS token, rendering without BOS", name)
    return PlainTemplate(form, controls)


def check_roles(template: Template, *, num_conversations: int, num_with_system: int) -> None:
    """Check that a template supports the roles of a corpus, before any work is done.

    Raises:
        ValueError: Some conversations have a system message but the template does not support one,
            or the template requires one and some have none.
    """
    without = num_conversations - num_with_system
    if num_with_system and not template.allows_system:
        raise UserError(
            f"template: {template.name} does not support system messages, but {num_with_system} of "
            f"{num_conversations} conversations have one; set another template, or remove the "
            "system messages from the data"
        )
    if without and template.needs_system:
        raise UserError(
            f"template: {template.name} requires a system message, but {without} of "
            f"{num_conversations} conversations have none; set another template, or add one"
        )
