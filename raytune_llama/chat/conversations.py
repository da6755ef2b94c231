"""Conversations, and what is wrong with those that nothing can be learned from.

    conversation = Conversation((Turn("user", "1 + 1?"), Turn("assistant", "2")))
    defect = find_defect(conversation)      # None: it can be trained on

A bad row is data, not an exception: a file of a million rows has some.
"""

from dataclasses import dataclass
from typing import Literal, get_args

Role = Literal["user", "assistant"]
"""Who speaks in a turn; what the system says is no turn."""

DefectReason = Literal[
    "unknown_format",
    "missing_field",
    "ambiguous_field",
    "duplicate_key",
    "wrong_type",
    "unknown_role",
    "late_system",
    "lone_surrogate",
    "nul",
    "empty_conversation",
    "assistant_first",
    "user_twice",
    "assistant_twice",
    "last_not_assistant",
    "last_not_user",
    "empty_target",
    "not_representable",
    "unrenderable",
    "no_boundary",
    "uncuttable",
    "too_long",
    "no_target",
]
"""Why a row or a conversation cannot be used."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says."""

    role: Role
    """Who says it."""
    content: str
    """The text, as it is: never cut, stripped or normalised."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns of a user and an assistant, one after the other."""

    turns: tuple[Turn, ...]
    """In their order."""
    system: str | None = None
    """What is said to the assistant before the first turn."""
    id: str | None = None
    """The row's name in its file."""


@dataclass(frozen=True, slots=True)
class Defect:
    """Why something cannot be used."""

    reason: DefectReason
    """One of few, to be counted."""
    detail: str
    """What exactly, for a person."""


def find_defect(conversation: Conversation) -> Defect | None:
    """Return why a conversation cannot be trained on; None where it can.

    Turns alternate, the user begins, the assistant has the last word, and no answer is blank.
    A user's turn may be empty.
    """
    defect = _find_in_turns(conversation)
    if defect is not None:
        return defect
    last = len(conversation.turns) - 1
    if conversation.turns[last].role != "assistant":
        return Defect("last_not_assistant", f"turn {last} is the user's; there is no answer")
    for number, turn in enumerate(conversation.turns):
        if turn.role == "assistant" and not turn.content.strip():
            return Defect("empty_target", f"turn {number}: the answer is {turn.content[:20]!r}")
    return None


def find_prompt_defect(conversation: Conversation) -> Defect | None:
    """Return why a conversation cannot be answered; None where it can: the user speaks last."""
    defect = _find_in_turns(conversation)
    if defect is not None:
        return defect
    last = len(conversation.turns) - 1
    if conversation.turns[last].role != "user":
        return Defect("last_not_user", f"turn {last} is the assistant's; there is no question")
    return None


def _find_in_turns(conversation: Conversation) -> Defect | None:
    if not conversation.turns:
        return Defect("empty_conversation", "there are no turns")
    if conversation.system is not None:
        defect = find_text_defect(conversation.system, "system")
        if defect is not None:
            return defect
    before: Role | None = None
    for number, turn in enumerate(conversation.turns):
        defect = _find_in_turn(turn, number, before)
        if defect is not None:
            return defect
        before = turn.role
    return None


def _find_in_turn(turn: Turn, number: int, before: Role | None) -> Defect | None:
    if turn.role not in get_args(Role):
        return Defect("unknown_role", f"turn {number}: role {turn.role!r}")
    defect = find_text_defect(turn.content, f"turn {number}")
    if defect is not None:
        return defect
    if turn.role == before:
        reason: DefectReason = "user_twice" if turn.role == "user" else "assistant_twice"
        return Defect(reason, f"turns {number - 1} and {number} are both the {turn.role}'s")
    if before is None and turn.role == "assistant":
        return Defect("assistant_first", "turn 0 is the assistant's")
    return None


def find_text_defect(text: object, name: str) -> Defect | None:
    """Return why a value is no text that can be encoded.

    Args:
        text: The value.
        name: What it is, for the detail.
    """
    if not isinstance(text, str):
        return Defect("wrong_type", f"{name} is {describe_type(text)}, wanted a text")
    if "\0" in text:
        return Defect("nul", f"{name}: a NUL at character {text.index(chr(0))}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return Defect("lone_surrogate", f"{name}: half of a pair at character {error.start}")
    return None


def describe_type(value: object) -> str:
    """Return what a JSON value is, in words."""
    names = {dict: "an object", list: "an array", str: "a text", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")
