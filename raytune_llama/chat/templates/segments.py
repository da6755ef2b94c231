"""What a template turns a conversation into: text and control tokens, each knowing what it is."""

from dataclasses import dataclass
from typing import Literal, Protocol

from transformers import PreTrainedTokenizerFast

from raytune_llama.chat.conversations import Conversation
from raytune_llama.config.errors import UserError

SegmentKind = Literal["template", "system", "user", "assistant", "control"]
"""What a segment is: the template's own text, somebody's content, or a control token."""

PromptBoundary = Literal["apart", "joint"]
"""How prompt and answer become ids: each encoded as a text of its own, as LLaMA's fine-tuning
scripts do; or the whole stretch between two control tokens as one, as `transformers` does."""


class UnrenderableError(UserError):
    """A conversation that a template cannot write, or not so that its contents are found again."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a rendered conversation."""

    kind: SegmentKind
    """What it is."""
    text: str
    """Its text; of a control token, how the token is spelled."""
    token_id: int | None = None
    """Id of a control token; None for text, in which no control token is ever looked for."""
    is_target: bool = False
    """Whether the model has to say it: answers, and what ends them."""


@dataclass(frozen=True, slots=True)
class ControlTokens:
    """The control tokens that templates of plain text use, as segments that are no targets."""

    bos: Segment | None
    """Begins a text; None where the tokenizer has none."""
    eos: Segment
    """Ends an answer."""


class Template(Protocol):
    """A form in which conversations are written for a model."""

    @property
    def name(self) -> str:
        """The name in configs."""
        ...

    @property
    def sha256(self) -> str:
        """Hash of its behaviour, to be stored with what was trained on it."""
        ...

    @property
    def boundary(self) -> PromptBoundary:
        """How prompt and answer become ids."""
        ...

    @property
    def allows_system(self) -> bool:
        """Whether it has a place for what the system says."""
        ...

    @property
    def needs_system(self) -> bool:
        """Whether it cannot write a conversation without it."""
        ...

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer: what serving stops at."""
        ...

    def render(self, conversation: Conversation) -> list[Segment]:
        """Write a conversation without defects.

        Where the user speaks last, the segments end where the answer is to begin: they are the
        beginning of what the same conversation becomes with an answer.

        Raises:
            UnrenderableError: It can't be written by this template.
        """
        ...


def find_control_tokens(tokenizer: PreTrainedTokenizerFast) -> ControlTokens:
    """Return the tokens that begin and end texts.

    Raises:
        ValueError: The tokenizer has no EOS: a model that learns no end never stops.
    """
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    if not isinstance(eos, int):
        raise UserError(  # the tokenizer is wrong, not an argument's type
            f"tokenizer: {tokenizer.name_or_path} has no EOS, so no answer would ever end; set "
            "eos_token in its tokenizer_config.json"
        )
    begin = None
    if isinstance(bos, int):
        begin = Segment("control", str(tokenizer.convert_ids_to_tokens(bos)), bos)
    return ControlTokens(begin, Segment("control", str(tokenizer.convert_ids_to_tokens(eos)), eos))
