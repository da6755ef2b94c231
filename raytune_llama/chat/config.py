"""Settings for conversations: format, template and length."""

from typing import Annotated, Literal

from pydantic import Field

from raytune_llama.config.settings import settings

FormatName = Literal["alpaca", "conversations", "messages", "completion"]
"""Row formats, named after their characteristic field."""


Truncation = Literal["keep_eos", "drop", "cut_left"]
"""How to truncate a conversation that is too long. `keep_eos`: keep its beginning; a truncated
answer still ends with EOS, a truncated question is removed. `drop`: drop the conversation.
`cut_left`: keep its end, after BOS if it began with BOS."""


TemplateName = Literal["tokenizer", "alpaca", "alpaca_inference", "belle", "llama2"]
"""Names of the templates; `tokenizer` is the tokenizer's own chat template."""


@settings
class ChatConfig:
    """Settings for turning conversations into token ids."""

    template: TemplateName = "tokenizer"
    """Chat template: the tokenizer's own, or the prompt format of a known project."""
    max_tokens: Annotated[int, Field(ge=2)] | None = None
    """Maximum length of a conversation, in tokens. Null: no limit."""
    truncation: Truncation = "keep_eos"
    """Handling of longer conversations. `keep_eos`: keep the beginning; a truncated answer still
    ends with EOS, a truncated question is removed. `drop`: drop them. `cut_left`: keep the end."""
    train_on_prompt: bool = False
    """Whether to train on all tokens instead of only answers and the tokens that end them."""
