"""Conversations, and the defects that make one unusable for training.

    conversation = Conversation((Turn("user", "1 + 1?"), Turn("assistant", "2")))
    defect = find_defect(conversation)      # None: usable for training

A bad row is data, not an exception: a file with a million rows has some.
"""

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

Role = Literal["system", "user", "assistant"]
"""Role of a turn; results of tools are in the user's. The first system message is not a turn, and
only prompts have further ones."""

DefectReason = Literal[
    "unknown_format",
    "missing_field",
    "unknown_field",
    "unsupported_value",
    "invalid_tools",
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
    """One message of a conversation."""

    role: Role
    """Author of the message."""
    content: str
    """The text, unchanged: never truncated, stripped or normalized."""
    is_trained: bool = True
    """Whether the loss covers the turn, if it is the assistant's; rows can mark turns otherwise."""
    reasoning: str | None = None
    """Reasoning of the assistant before its answer; None if there is none."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns of a user and an assistant; they alternate in training, and may not in a prompt."""

    turns: tuple[Turn, ...]
    """The turns, in order."""
    system: str | None = None
    """System message; None if there is none."""
    id: str | None = None
    """Id of the row in its file; None if it has none."""
    tools: tuple[str, ...] = ()
    """Definitions of the tools that the assistant may call, each in JSON."""
    places: tuple[int, ...] = field(default=(), compare=False)
    """Index of each turn's first message in its request, for error messages; empty in rows."""

    @property
    def texts(self) -> list[str]:
        """Everything that is rendered from it, in order: system message, tools and turns."""
        said = [text for turn in self.turns for text in (turn.reasoning, turn.content)]
        return [text for text in (self.system, *self.tools, *said) if text is not None]


@dataclass(frozen=True, slots=True)
class Defect:
    """Why a row or a conversation cannot be used."""

    reason: DefectReason
    """Category, for counting."""
    detail: str
    """Details, for people."""
    num_tokens: int = 0
    """Length of the conversation in tokens; 0 if it was not encoded."""


def begin_first_turn(conversation: Conversation, text: str) -> Conversation:
    """Return a conversation whose first turn, the user's, begins with a text and a blank line.

    If the first turn is not the user's, the text becomes a turn of the user before it.
    """
    turns = conversation.turns
    if not turns or turns[0].role != "user":
        return insert_user_turn(conversation, text)
    first = replace(turns[0], content=f"{text}\n\n{turns[0].content}")
    return replace(conversation, turns=(first, *turns[1:]))


def insert_user_turn(conversation: Conversation, text: str) -> Conversation:
    """Return a conversation with a turn of the user before its first turn."""
    turns, places = conversation.turns, conversation.places
    if places or not turns:
        # Errors name it as the message that it precedes.
        places = (places[:1] or (0,)) + places
    return replace(conversation, turns=(Turn("user", text), *turns), places=places)


def find_defect(conversation: Conversation) -> Defect | None:
    """Return why a conversation cannot be trained on; None if it can.

    Turns must alternate, the first must be the user's and the last the assistant's, and no answer
    may be blank. A user's turn may be empty.
    """
    if not conversation.turns:
        return Defect("empty_conversation", "the conversation has no turns")
    defect = _find_before_turns(conversation)
    if defect is not None:
        return defect
    before: Role | None = None
    for number, turn in enumerate(conversation.turns):
        defect = _find_in_turn(turn, number, before)
        if defect is not None:
            return defect
        before = turn.role
    last = len(conversation.turns) - 1
    if conversation.turns[last].role != "assistant":
        return Defect("last_not_assistant", f"turn {last} is the user's; there is no answer")
    for number, turn in enumerate(conversation.turns):
        if turn.role == "assistant" and not turn.content.strip():
            return Defect("empty_target", f"turn {number}: the answer is {turn.content[:20]!r}")
    return None


def find_prompt_defect(conversation: Conversation) -> Defect | None:
    """Return why a conversation can't be a prompt; None if a template may render it.

    Turns of any role may follow each other: which sequences can be rendered depends on the
    template. After an assistant's last turn, the answer is continued.
    """
    if not conversation.turns and conversation.system is None:
        return Defect("empty_conversation", "the conversation has no messages")
    defect = _find_before_turns(conversation)
    if defect is not None:
        return defect
    first = int(conversation.system is not None)
    places = conversation.places or range(first, first + len(conversation.turns))
    for place, turn in zip(places, conversation.turns, strict=True):
        defect = _find_in_content(turn, f"messages.{place}")
        if defect is not None:
            return defect
    return None


def _find_before_turns(conversation: Conversation) -> Defect | None:
    if conversation.system is not None:
        defect = find_text_defect(conversation.system, "system")
        if defect is not None:
            return defect
    for tool in conversation.tools:
        defect = find_text_defect(tool, "tools")
        if defect is not None:
            return defect
    return None


def _find_in_turn(turn: Turn, number: int, before: Role | None) -> Defect | None:
    if turn.role == "system":
        detail = f"turn {number} is a system message; only the first message can be one"
        return Defect("late_system", detail)
    defect = _find_in_content(turn, f"turn {number}")
    if defect is not None:
        return defect
    if turn.role == before:
        reason: DefectReason = "user_twice" if turn.role == "user" else "assistant_twice"
        return Defect(reason, f"turns {number - 1} and {number} are both the {turn.role}'s")
    if before is None and turn.role == "assistant":
        return Defect("assistant_first", "turn 0 is the assistant's")
    return None


def _find_in_content(turn: Turn, where: str) -> Defect | None:
    if turn.role not in get_args(Role):
        return Defect("unknown_role", f"{where}: role {turn.role!r}")
    for text in (turn.content, "" if turn.reasoning is None else turn.reasoning):
        defect = find_text_defect(text, where)
        if defect is not None:
            return defect
    if turn.reasoning is not None and turn.role != "assistant":
        return Defect("unsupported_value", f"{where}: reasoning in a turn of the {turn.role}")
    return None


_SPREADSHEET_ERRORS = ("#REF!", "#N/A", "#VALUE!", "#NAME?", "#DIV/0!", "#NULL!", "#NUM!")
_NO_ANSWERS = frozenset({"n/a", "nan", "null", "undefined", "tbd", "todo"})


def find_suspicion(answer: str) -> str | None:
    """Return what makes an answer look like a failed export; None if nothing does.

    Such as a spreadsheet's error value, the escape that Excel writes for a line break, or `n/a`.
    """
    if "_x000D_" in answer:
        return "_x000D_"
    stripped = answer.strip()
    if stripped.casefold() in _NO_ANSWERS:
        return stripped.casefold()
    return next((error for error in _SPREADSHEET_ERRORS if stripped.startswith(error)), None)


def find_text_defect(text: object, name: str) -> Defect | None:
    """Return why a value is not text that can be encoded; None if it is.

    Args:
        text: Value to check.
        name: Name of the value, for the detail.
    """
    if not isinstance(text, str):
        return Defect("wrong_type", f"{name} is {describe_type(text)}, wanted a string")
    if "\0" in text:
        return Defect("nul", f"{name}: NUL at character {text.index(chr(0))}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return Defect("lone_surrogate", f"{name}: lone surrogate at character {error.start}")
    return None


def describe_type(value: object) -> str:
    """Return the type of a JSON value, with its article."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")
