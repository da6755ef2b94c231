"""Rows of files and conversations, in both directions, in the four formats that data comes in.

    alpaca         {"instruction": ..., "input": ..., "output": ...}
    conversations  {"id": ..., "conversations": [{"from": "human", "value": ...}, ...]}
    messages       {"messages": [{"role": "user", "content": ...}, ...]}
    completion     {"prompt": ..., "completion": ...}

Names are matched without case, and without spaces and colons around them: real files hold
`"instruction : "`. Each field has aliases that real files use. A row in which two names of one
field hold different texts is refused. What was read under an alias, and what has no meaning here,
is counted by name.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from raytune_llama.chat.conversations import (
    Conversation,
    Defect,
    Role,
    Turn,
    describe_type,
    find_defect,
    find_text_defect,
)
from raytune_llama.storage.files import RepeatedKeys

FormatName = Literal["alpaca", "conversations", "messages", "completion"]
"""The formats, each by what marks it."""

_ID = ("id",)
_SYSTEM = ("system",)
_TURNS = {"conversations": ("conversations",), "messages": ("messages",)}
# In the Chinese Alpaca file of 51,000 rows some have Chinese names, and one keeps the text that
# the instruction is about under "news article". Its "note" is a remark about the row, no text.
_INSTRUCTION = ("instruction", "指令", "指示")
_INPUT = ("input", "输入", "context", "news article")
_OUTPUT = ("output", "输出", "response")
_PROMPT = ("prompt", "question", "query")
_COMPLETION = ("completion", "response", "answer")

_ROLE_NAMES = {"conversations": ("from", "role"), "messages": ("role", "from")}
_CONTENT_NAMES = {
    "conversations": ("value", "content", "message", "text"),
    "messages": ("content", "message", "value", "text"),
}
_ROLES: dict[str, Role | Literal["system"]] = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
}
_WRITTEN_ROLES = {
    "conversations": {"user": "human", "assistant": "assistant", "system": "system"},
    "messages": {"user": "user", "assistant": "assistant", "system": "system"},
}


@dataclass(slots=True)
class KeyCounts:
    """Names of fields that rows have, other than the format's own."""

    aliased: Counter[str] = field(default_factory=Counter)
    """How many times a field was read under each other name."""
    ignored: Counter[str] = field(default_factory=Counter)
    """How many times each name was met that has no meaning in its format."""
    repeated: Counter[str] = field(default_factory=Counter)
    """How many times each such name stood twice in one object."""


def detect_row_format(row: Mapping[str, Any]) -> FormatName | None:
    """Return the format of a row by its names; None where they are of none.

    A list of turns wins over single fields, which rows of chats often hold beside it.
    """
    names = {_plain_name(name) for name in row}
    if "conversations" in names:
        return "conversations"
    if "messages" in names:
        return "messages"
    if names.intersection(_INSTRUCTION):
        return "alpaca"
    if names.intersection(_PROMPT) and names.intersection(_COMPLETION):
        return "completion"
    return None


def read_row(
    row: Mapping[str, Any],
    row_format: FormatName,
    counts: KeyCounts,
    *,
    input_separator: str = "\n",
) -> Conversation | Defect:
    """Read a row of a known format as a conversation that can be trained on, or say what is wrong.

    Args:
        row: A JSON object.
        row_format: How it is read.
        counts: Names that it has are added here.
        input_separator: What stands between instruction and input of an `alpaca` row with input.
    """
    fields = _Fields(row, counts)
    try:
        if row_format in ("conversations", "messages"):
            read = _read_turns(fields, row_format, counts)
        elif row_format == "alpaca":
            read = _read_alpaca(fields, input_separator)
        else:
            user, answer = fields.text(_PROMPT), fields.text(_COMPLETION)
            read = _exchange(fields, user, answer)
    except _DefectError as error:
        return error.defect
    fields.count_rest()
    return find_defect(read) or read


def write_row(conversation: Conversation, row_format: FormatName) -> dict[str, Any] | Defect:
    """Return a conversation as a row of a format; its id comes first if it has one.

    In `alpaca` a user's turn is the instruction, and input is empty: where it was divided is not
    known any more.
    """
    row: dict[str, Any] = {} if conversation.id is None else {"id": conversation.id}
    if row_format in ("conversations", "messages"):
        return row | {row_format: _written_turns(conversation, row_format)}
    if len(conversation.turns) != 2:
        detail = f"{len(conversation.turns)} turns, a row of {row_format} holds 2"
        return Defect("not_representable", detail)
    if conversation.system is not None:
        row["system"] = conversation.system
    user, answer = (turn.content for turn in conversation.turns)
    if row_format == "alpaca":
        return row | {"instruction": user, "input": "", "output": answer}
    return row | {"prompt": user, "completion": answer}


def _written_turns(conversation: Conversation, row_format: FormatName) -> list[dict[str, str]]:
    role_name, content_name = _ROLE_NAMES[row_format][0], _CONTENT_NAMES[row_format][0]
    said = [(turn.role, turn.content) for turn in conversation.turns]
    if conversation.system is not None:
        said = [("system", conversation.system), *said]
    roles = _WRITTEN_ROLES[row_format]
    return [{role_name: roles[role], content_name: content} for role, content in said]


def _plain_name(name: str) -> str:
    return name.strip(" \t\r\n:：").casefold()  # noqa: RUF001  # a full-width colon is meant


class _DefectError(Exception):
    def __init__(self, defect: Defect) -> None:
        super().__init__(defect)
        self.defect = defect


class _Fields:
    """The fields of one object; what was not asked for is counted."""

    def __init__(self, row: Mapping[str, Any], counts: KeyCounts, where: str = "") -> None:
        self._row = row
        self._counts = counts
        self._where = where
        self._names: dict[str, list[str]] = {}
        for name in row:
            self._names.setdefault(_plain_name(name), []).append(name)
        self._repeated = row.repeated if isinstance(row, RepeatedKeys) else frozenset()
        self._read: set[str] = set()

    def has(self, aliases: Iterable[str]) -> bool:
        """Whether a field is there under any of its names."""
        return any(alias in self._names for alias in aliases)

    def value(self, aliases: tuple[str, ...]) -> Any:  # noqa: ANN401  # any JSON value
        """Return a field under any of its names; the first that is not empty counts.

        Raises:
            _DefectError: There is none, or two that differ.
        """
        present = [name for alias in aliases for name in self._names.get(alias, ())]
        if not present:
            there = ", ".join(map(repr, self._row)) or "none"
            detail = f"{self._where}no field {' or '.join(map(repr, aliases))}; there are: {there}"
            raise _DefectError(Defect("missing_field", detail[:400]))
        self._read.update(present)
        twice = sorted(self._repeated.intersection(present))
        if twice:
            raise _DefectError(
                Defect("duplicate_key", f"{self._where}field {twice[0]!r} stands there twice")
            )
        full = [name for name in present if self._row[name] not in (None, "", [])]
        if any(self._row[name] != self._row[full[0]] for name in full[1:]):
            detail = f"{self._where}{' and '.join(map(repr, full))} hold different values"
            raise _DefectError(Defect("ambiguous_field", detail))
        chosen = (full or present)[0]
        if chosen != aliases[0]:
            self._counts.aliased[chosen] += 1
        return self._row[chosen]

    def text(self, aliases: tuple[str, ...]) -> str:
        """Return a field that is a text."""
        value = self.value(aliases)
        defect = find_text_defect(value, f"{self._where}field {aliases[0]!r}")
        if defect is not None:
            raise _DefectError(defect)
        return value

    def optional_text(self, aliases: tuple[str, ...]) -> str | None:
        """Return a field that is a text; None where it is not there, null or empty."""
        if not self.has(aliases) or self.value(aliases) in (None, ""):
            return None
        return self.text(aliases)

    def id(self) -> str | None:
        """Return the row's id, which may be a whole number."""
        value = self.value(_ID) if self.has(_ID) else None
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return None if value is None else self.optional_text(_ID)

    def count_rest(self) -> None:
        """Count the names that nobody asked for."""
        rest = [name for name in self._row if name not in self._read]
        self._counts.ignored.update(rest)
        self._counts.repeated.update(self._repeated.intersection(rest))


def _exchange(fields: _Fields, user: str, answer: str) -> Conversation:
    turns = (Turn("user", user), Turn("assistant", answer))
    return Conversation(turns, fields.optional_text(_SYSTEM), fields.id())


def _read_alpaca(fields: _Fields, input_separator: str) -> Conversation:
    instruction, answer = fields.text(_INSTRUCTION), fields.text(_OUTPUT)
    extra = fields.optional_text(_INPUT)
    user = instruction if extra is None else instruction + input_separator + extra
    return _exchange(fields, user, answer)


def _read_turns(fields: _Fields, row_format: FormatName, counts: KeyCounts) -> Conversation:
    listed = fields.value(_TURNS[row_format])
    if not isinstance(listed, list):
        detail = f"field {row_format!r} is {describe_type(listed)}, wanted an array"
        raise _DefectError(Defect("wrong_type", detail))
    system = fields.optional_text(_SYSTEM)
    turns: list[Turn] = []
    for number, said in enumerate(listed):
        role, content = _read_turn(said, number, row_format, counts)
        if role != "system":
            turns.append(Turn(role, content))
        elif number:
            detail = f"turn {number} is the system's, which may speak first only"
            raise _DefectError(Defect("late_system", detail))
        elif system is not None and system != content:
            detail = "the row's field 'system' and its first turn differ"
            raise _DefectError(Defect("ambiguous_field", detail))
        else:
            system = content or None
    return Conversation(tuple(turns), system, fields.id())


def _read_turn(
    said: object, number: int, row_format: FormatName, counts: KeyCounts
) -> tuple[Role | Literal["system"], str]:
    if not isinstance(said, dict):
        detail = f"turn {number} is {describe_type(said)}, wanted an object"
        raise _DefectError(Defect("wrong_type", detail))
    fields = _Fields(said, counts, f"turn {number}: ")
    name = fields.text(_ROLE_NAMES[row_format])
    role = _ROLES.get(name.strip().casefold())
    if role is None:
        detail = f"turn {number}: {name[:40]!r}; known are {', '.join(_ROLES)}"
        raise _DefectError(Defect("unknown_role", detail))
    content = fields.text(_CONTENT_NAMES[row_format])
    fields.count_rest()
    return role, content
