"""Convert between rows of files and conversations, in four common formats.

    alpaca         {"instruction": ..., "input": ..., "output": ...}
    conversations  {"id": ..., "conversations": [{"from": "human", "value": ...}, ...]}
    messages       {"messages": [{"role": "user", "content": ...}, ...]}
    completion     {"prompt": ..., "completion": ...}

Field names are matched ignoring case and surrounding spaces and colons: real files contain
`"instruction : "`. Each field has the aliases that real files use. A row is rejected if two aliases
of a field hold different values. Aliased and ignored fields are counted by name.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from raytune_llama.chat.config import FormatName
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

_ID = ("id",)
_SYSTEM = ("system",)
_TURNS = {"conversations": ("conversations",), "messages": ("messages",)}
# In the Chinese Alpaca file of 51,000 rows some field names are Chinese, and one row has its input
# under "news article". Its "note" is a remark about the row, not an input.
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
    """Counts of the field names in rows that are not the format's own."""

    aliased: Counter[str] = field(default_factory=Counter)
    """Number of fields read, per alias."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Number of fields ignored, per name."""
    repeated: Counter[str] = field(default_factory=Counter)
    """Number of objects with a duplicate ignored field, per name."""


def detect_row_format(row: Mapping[str, Any]) -> FormatName | None:
    """Return the format of a row, judged by its field names; None if it has no known format.

    A list of turns takes precedence over single fields, which chat rows often have as well.
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
    """Return a row as a conversation that can be trained on, or its defect.

    Args:
        row: A JSON object.
        row_format: Format of the row.
        counts: Counts of field names, updated in place.
        input_separator: Text between instruction and input of an `alpaca` row with an input.
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
    """Return a conversation as a row of a format, or a defect; its id, if any, comes first.

    In `alpaca` the user's turn becomes the instruction and the input is empty: their original
    boundary is not known.
    """
    row: dict[str, Any] = {} if conversation.id is None else {"id": conversation.id}
    if row_format in ("conversations", "messages"):
        return row | {row_format: _written_turns(conversation, row_format)}
    if len(conversation.turns) != 2:
        detail = f"{len(conversation.turns)} turns, a {row_format} row holds exactly 2"
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
    return name.strip(" \t\r\n:：").casefold()  # noqa: RUF001  # full-width colon is intended


class _DefectError(Exception):
    def __init__(self, defect: Defect) -> None:
        super().__init__(defect)
        self.defect = defect


class _Fields:
    """Reads the fields of a JSON object and counts the fields that were not read."""

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
        """Whether the object has a field, under any of its aliases."""
        return any(alias in self._names for alias in aliases)

    def value(self, aliases: tuple[str, ...]) -> Any:  # noqa: ANN401  # any JSON value
        """Return a field's value: that of the first alias that is not empty.

        Raises:
            _DefectError: The field is missing, duplicated, or has aliases with different values.
        """
        present = [name for alias in aliases for name in self._names.get(alias, ())]
        if not present:
            found = ", ".join(map(repr, self._row)) or "none"
            detail = f"{self._where}no field {' or '.join(map(repr, aliases))}; found: {found}"
            raise _DefectError(Defect("missing_field", detail[:400]))
        self._read.update(present)
        twice = sorted(self._repeated.intersection(present))
        if twice:
            raise _DefectError(
                Defect("duplicate_key", f"{self._where}duplicate field {twice[0]!r}")
            )
        filled = [name for name in present if self._row[name] not in (None, "", [])]
        if any(self._row[name] != self._row[filled[0]] for name in filled[1:]):
            detail = f"{self._where}{' and '.join(map(repr, filled))} hold different values"
            raise _DefectError(Defect("ambiguous_field", detail))
        chosen = (filled or present)[0]
        if chosen != aliases[0]:
            self._counts.aliased[chosen] += 1
        return self._row[chosen]

    def text(self, aliases: tuple[str, ...]) -> str:
        """Return a string field."""
        value = self.value(aliases)
        defect = find_text_defect(value, f"{self._where}field {aliases[0]!r}")
        if defect is not None:
            raise _DefectError(defect)
        return value

    def optional_text(self, aliases: tuple[str, ...]) -> str | None:
        """Return a string field; None if it is missing, null or empty."""
        if not self.has(aliases) or self.value(aliases) in (None, ""):
            return None
        return self.text(aliases)

    def id(self) -> str | None:
        """Return the id of the row as a string; in JSON it may be an integer."""
        value = self.value(_ID) if self.has(_ID) else None
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return None if value is None else self.optional_text(_ID)

    def count_rest(self) -> None:
        """Count the fields that were not read."""
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
            detail = f"turn {number} is a system message; only the first turn can be one"
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
        detail = f"turn {number}: unknown role {name[:40]!r}; known roles: {', '.join(_ROLES)}"
        raise _DefectError(Defect("unknown_role", detail))
    content = fields.text(_CONTENT_NAMES[row_format])
    fields.count_rest()
    return role, content
