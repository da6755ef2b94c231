"""Templates that are text around what is said, with BOS before and EOS behind each answer."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from raytune_llama.chat.conversations import Conversation, Turn
from raytune_llama.chat.templates.segments import (
    ControlTokens,
    PromptBoundary,
    Segment,
    UnrenderableError,
)

BosPolicy = Literal["none", "first", "each"]
"""Where BOS stands: nowhere, before the first exchange, or before each."""


@dataclass(frozen=True, slots=True)
class PromptContent:
    """What a prompt is written from."""

    user: str
    """The user's content."""
    system: str | None
    """What the system says; None behind the first exchange."""
    is_first_exchange: bool
    """Whether it is the first exchange."""


@dataclass(frozen=True)
class PlainTemplateSpec:
    """What such a template is."""

    name: str
    """Its name in configs."""
    version: int
    """Changes with its behaviour."""
    bos: BosPolicy
    """Where BOS stands."""
    allows_system: bool
    """Whether it has a place for what the system says."""
    write_prompt: Callable[[PromptContent], list[Segment]]
    """Writes all between BOS and the answer, as text."""


@dataclass(frozen=True)
class PlainTemplate:
    """See `Template`; prompt and answer are encoded apart."""

    spec: PlainTemplateSpec
    """What is written."""
    controls: ControlTokens
    """The tokenizer's BOS and EOS."""

    boundary: PromptBoundary = "apart"
    needs_system: bool = False

    @property
    def name(self) -> str:
        """See `Template.name`."""
        return self.spec.name

    @property
    def allows_system(self) -> bool:
        """See `Template.allows_system`."""
        return self.spec.allows_system

    @property
    def stop_ids(self) -> frozenset[int]:
        """See `Template.stop_ids`."""
        assert self.controls.eos.token_id is not None
        return frozenset({self.controls.eos.token_id})

    @property
    def sha256(self) -> str:
        """Hash of name and version, and of what is written for two conversations.

        The second part tells of a change of which the version does not.
        """
        symbols = ControlTokens(Segment("control", "BOS", 0), Segment("control", "EOS", 1))
        plain = replace(self, controls=symbols)
        turns = (Turn("user", "A"), Turn("assistant", "B"), Turn("user", "C"))
        systems = (None, "S") if self.allows_system else (None,)
        written = [
            [(part.kind, part.text, part.is_target) for part in plain.render(conversation)]
            for conversation in (Conversation(turns, system) for system in systems)
        ]
        content = [self.name, self.spec.version, self.boundary, written]
        return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()

    def render(self, conversation: Conversation) -> list[Segment]:
        """See `Template.render`."""
        if conversation.system is not None and not self.allows_system:
            raise UnrenderableError(f"template {self.name} has no place for what the system says")
        written: list[Segment] = []
        for number, turn in enumerate(conversation.turns):
            if turn.role == "assistant":
                written.append(Segment("assistant", turn.content, is_target=True))
                written.append(replace(self.controls.eos, is_target=True))
                continue
            is_first = number == 0
            if self.controls.bos and self._needs_bos(is_first=is_first):
                written.append(self.controls.bos)
            system = conversation.system if is_first else None
            written += self.spec.write_prompt(PromptContent(turn.content, system, is_first))
        return written

    def _needs_bos(self, *, is_first: bool) -> bool:
        """Whether BOS stands before an exchange."""
        return self.spec.bos == "each" or (is_first and self.spec.bos == "first")
