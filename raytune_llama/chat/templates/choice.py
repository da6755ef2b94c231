"""Look up templates by their names in configs."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from raytune_llama.chat.config import TemplateName
from raytune_llama.chat.templates.formats import SPECS
from raytune_llama.chat.templates.plain import PlainTemplate
from raytune_llama.chat.templates.segments import Template, find_control_tokens
from raytune_llama.chat.templates.tokenizer import TokenizerTemplate
from raytune_llama.config.errors import UserError
from raytune_llama.tokenizer.loader import load_tokenizer

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


def find_stop_ids(recorded: Mapping[str, Any] | None, tokenizer: Path | None) -> frozenset[int]:
    """Return the ids that end an answer in the template that a model was tuned with.

    Args:
        recorded: template in a manifest, see `model.lineage.CHAT_KEY`; None: none is recorded.
        tokenizer: directory of the tokenizer; None: there is none.
    """
    if not recorded or tokenizer is None:
        return frozenset()
    return build_template(recorded["template"], load_tokenizer(tokenizer)).stop_ids


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
