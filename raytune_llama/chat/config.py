"""Settings for conversations: format, template and length."""

from typing import Annotated, Literal

from pydantic import Field

from raytune_llama.config.settings import settings

FormatName = Literal["alpaca", "conversations", "messages", "completion"]
"""Row formats, named after their characteristic field."""


FieldName = Literal[
    "id",
    "system",
    "history",
    "tools",
    "instruction",
    "input",
    "output",
    "prompt",
    "completion",
    "conversations",
    "messages",
]
"""Fields of a row that carry meaning."""


Truncation = Literal["keep_eos", "drop", "cut_left"]
"""How to truncate a conversation that is too long. `keep_eos`: keep its beginning; a truncated
answer still ends with EOS, a truncated question is removed. `drop`: drop the conversation.
`cut_left`: keep its end, after BOS if it began with BOS."""


TemplateName = Literal["tokenizer", "alpaca", "alpaca_inference", "belle", "llama2"]
"""Names of the templates; `tokenizer` is the tokenizer's own chat template."""


@settings
class RepairConfig:
    """Repairs of conversations with defects, all off by default; each is counted."""

    drop_leading_answer: bool = False
    """Whether to drop answers at the beginning of a conversation; if not, such a row is unusable.
    Counted, as all repairs are."""
    drop_trailing_question: bool = False
    """Whether to drop questions at the end that have no answer; if not, such a row is unusable."""
    join_same_role: bool = False
    """Whether to join consecutive turns of one author by a line break; if not, such a row is
    unusable."""
    trim: bool = False
    """Whether to remove whitespace at both ends of every message."""


@settings
class ChatConfig(RepairConfig):
    """Settings for turning conversations into token ids."""

    template: TemplateName = "tokenizer"
    """Chat template: the tokenizer's own, or the prompt format of a known project."""
    max_tokens: Annotated[int, Field(ge=2)] | None = None
    """Maximum length of a conversation, in tokens. Null: no limit."""
    truncation: Truncation = "keep_eos"
    """Handling of longer conversations. `keep_eos`: keep the beginning; a truncated answer still
    ends with EOS, a truncated question is removed. `drop`: drop them. `cut_left`: keep the end."""
    ignore_fields: tuple[str, ...] = ()
    """Names of fields to ignore in rows and in their turns. Unlisted fields that are neither used
    nor known to be metadata stop the job: they may carry meaning, such as a loss weight."""
    train_on_prompt: bool = False
    """Whether to train on all tokens instead of only answers and the tokens that end them."""
