"""Plain-text templates: fixed text around the contents, optional BOS, and EOS after each answer."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from raytune_llama.chat.conversations import Conversation, Role, Turn
from raytune_llama.chat.templates.segments import (
    NO_OPTIONS,
    ControlTokens,
    PromptBoundary,
    Segment,
    UnrenderableError,
)
from raytune_llama.storage.hashes import hash_bytes

BosPolicy = Literal["none", "first", "each"]
"""Placement of BOS: nowhere, before the first exchange, or before each exchange."""


@dataclass(frozen=True, slots=True)
class PromptContent:
    """Contents from which a prompt is rendered."""

    user: str
    """Content of the user's turn."""
    system: str | None
    """System message; None after the first exchange."""
    is_first_exchange: bool
    """Whether the prompt belongs to the first exchange."""


@dataclass(frozen=True)
class PlainTemplateSpec:
    """Definition of a plain-text template."""

    name: str
    """Name of the template in configs."""
    version: int
    """Version, incremented with each change of behavior."""
    bos: BosPolicy
    """Placement of BOS."""
    allows_system: bool
    """Whether a conversation may have a system message."""
    write_prompt: Callable[[PromptContent], list[Segment]]
    """Renders everything between BOS and the answer, as text."""


@dataclass(frozen=True)
class PlainTemplate:
    """A `Template` built from a spec; prompt and answer are encoded separately."""

    spec: PlainTemplateSpec
    """Definition of the template."""
    controls: ControlTokens
    """The tokenizer's BOS and EOS."""

    boundary: PromptBoundary = "apart"
    needs_system: bool = False
    variables: frozenset[str] = frozenset()

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

    def hash(self, like: str | None = None) -> str:
        """Return the hash of name, version and two rendered conversations; see `Template.hash`.

        The conversations reveal changes for which the version was not incremented.
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
        return hash_bytes(json.dumps(content, ensure_ascii=False).encode(), like)

    def render(
        self, conversation: Conversation, options: Mapping[str, Any] = NO_OPTIONS
    ) -> list[Segment]:
        """See `Template.render`."""
        assert not options, "a plain template has no variables"
        if conversation.system is not None and not self.allows_system:
            raise UnrenderableError(f"template {self.name} does not support system messages")
        self._check_order(conversation)
        written: list[Segment] = []
        for number, turn in enumerate(conversation.turns):
            if turn.reasoning is not None:
                raise UnrenderableError(f"template {self.name} has no place for reasoning")
            if turn.role == "assistant":
                is_masked = not turn.is_trained
                answer = Segment("assistant", turn.content, is_target=True, is_masked=is_masked)
                written.append(answer)
                written.append(replace(self.controls.eos, is_target=True, is_masked=is_masked))
                continue
            is_first = number == 0
            if self.controls.bos and self._needs_bos(is_first=is_first):
                written.append(self.controls.bos)
            system = conversation.system if is_first else None
            written += self.spec.write_prompt(PromptContent(turn.content, system, is_first))
        return written

    def _check_order(self, conversation: Conversation) -> None:
        roles = [turn.role for turn in conversation.turns]
        alternating: tuple[Role, Role] = ("user", "assistant")
        if not roles or roles != [alternating[number % 2] for number in range(len(roles))]:
            raise UnrenderableError(
                f"template {self.name} needs turns of the user and the assistant that alternate, "
                "the user's first"
            )

    def _needs_bos(self, *, is_first: bool) -> bool:
        """Whether BOS precedes an exchange."""
        return self.spec.bos == "each" or (is_first and self.spec.bos == "first")
