"""Segments of a rendered conversation, and the `Template` protocol that renders them."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Protocol

from transformers import PreTrainedTokenizerFast

from raytune_llama.chat.conversations import Conversation
from raytune_llama.config.errors import UserError

SegmentKind = Literal["template", "system", "user", "assistant", "control"]
"""Kind of a segment: template text, the content of a message by its role, or a control token."""

PromptBoundary = Literal["apart", "joint"]
"""How prompt and answer are encoded. `apart`: separately, as LLaMA's fine-tuning scripts do.
`joint`: all text between two control tokens together, as `transformers` does."""

NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})
"""Options of a template whose variables have no values, as in training."""


class UnrenderableError(UserError):
    """A template can't render a conversation, or the contents can't be located in the result."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a rendered conversation."""

    kind: SegmentKind
    """Kind of the segment."""
    text: str
    """Text of the segment; for a control token, its spelling."""
    token_id: int | None = None
    """Id of a control token; None for text, which is never searched for control tokens."""
    is_target: bool = False
    """Whether it is an answer or ends one, which the loss covers."""
    is_masked: bool = False
    """Whether the loss leaves it out all the same: its turn is marked as not trained."""


@dataclass(frozen=True, slots=True)
class ControlTokens:
    """Control tokens of the plain-text templates, as segments that are not targets."""

    bos: Segment | None
    """BOS, begins a text; None if the tokenizer has none."""
    eos: Segment
    """EOS, ends an answer."""


class Template(Protocol):
    """Renders conversations in the format that a model expects."""

    @property
    def name(self) -> str:
        """Name of the template in configs."""
        ...

    def hash(self, like: str | None = None) -> str:
        """Return the hash of the template's behavior, stored with the models trained on it.

        Args:
            like: Recorded hash whose algorithm to use; see `storage.hashes`.
        """
        ...

    @property
    def boundary(self) -> PromptBoundary:
        """How prompt and answer are encoded."""
        ...

    @property
    def allows_system(self) -> bool:
        """Whether a conversation may have a system message."""
        ...

    @property
    def needs_system(self) -> bool:
        """Whether a conversation must have a system message."""
        ...

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer; serving stops at them."""
        ...

    @property
    def variables(self) -> frozenset[str]:
        """Names of the variables that options of a prompt may set, such as `enable_thinking`."""
        ...

    def render(
        self, conversation: Conversation, options: Mapping[str, Any] = NO_OPTIONS
    ) -> list[Segment]:
        """Render a conversation without defects.

        If the last turn is not the assistant's, the segments end where the answer begins: they are
        a prefix of the segments of the same conversation with an answer.

        Args:
            conversation: Conversation to render.
            options: Values of `variables`, in plain JSON; empty in training.

        Raises:
            UnrenderableError: This template can't render the conversation.
            UserError: A value of an option can't be rendered.
        """
        ...


def find_control_tokens(tokenizer: PreTrainedTokenizerFast) -> ControlTokens:
    """Return the BOS and EOS of a tokenizer.

    Raises:
        ValueError: The tokenizer has no EOS, without which a model never learns to stop.
    """
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    if not isinstance(eos, int):
        raise UserError(  # the tokenizer is wrong, not an argument's type
            f"tokenizer: {tokenizer.name_or_path} has no EOS token, so answers never end; set "
            "eos_token in its tokenizer_config.json"
        )
    begin = None
    if isinstance(bos, int):
        begin = Segment("control", str(tokenizer.convert_ids_to_tokens(bos)), bos)
    return ControlTokens(begin, Segment("control", str(tokenizer.convert_ids_to_tokens(eos)), eos))
