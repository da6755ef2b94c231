"""Convert between rows of files and conversations, in four common formats.

    alpaca         {"instruction": ..., "input": ..., "output": ..., "history": [[q, a], ...]}
    conversations  {"id": ..., "conversations": [{"from": "human", "value": ...}, ...]}
    messages       {"messages": [{"role": "user", "content": ...}, ...], "tools": [...]}
    completion     {"prompt": ..., "completion": ...}

Field names are matched ignoring case and surrounding spaces and colons: real files contain
`"instruction : "`. Each field has the aliases that real files use. A row is rejected if two aliases
of a field hold different values, or if it has a field that may carry meaning and is not used; see
`row_fields`. Aliased and ignored fields are counted by name.

Rows of prompts, which `read_prompt` reads, need no answer; one that they have is kept apart.

A turn marked with a `weight`, `train` or `loss` of 0 or false is not learned, nor is an answer in a
`prompt` that is a list of messages.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeGuard

from raytune_llama.chat.config import FieldName, FormatName, RepairConfig
from raytune_llama.chat.conversations import (
    Conversation,
    Defect,
    describe_type,
    find_defect,
    find_prompt_defect,
)
from raytune_llama.chat.repairs import NO_REPAIRS, repair
from raytune_llama.chat.row_fields import DefectError, KeyCounts, RowFields, is_metadata
from raytune_llama.chat.tools import ChatMessage, ToolCall, join_tool_messages
from raytune_llama.config.errors import UserError

_ROLE_NAMES = {"conversations": ("from", "role"), "messages": ("role", "from")}
_CONTENT_NAMES = {
    "conversations": ("value", "content", "message", "text"),
    "messages": ("content", "message", "value", "text"),
}
_MASKS = ("weight", "train", "loss")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_CALL_IDS = ("tool_call_id", "call_id")

_ReadRole = Literal["user", "assistant", "system", "tool", "call"]
_ROLES: dict[str, _ReadRole] = {
    "user": "user",
    "human": "user",
    "用户": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "助手": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "tool_response": "tool",
    "function_call": "call",
    "tool_call": "call",
}
_WRITTEN_ROLES = {
    "conversations": {"user": "human", "assistant": "assistant", "system": "system"},
    "messages": {"user": "user", "assistant": "assistant", "system": "system"},
}


@dataclass(frozen=True)
class RowFormat:
    """Format of a source's rows, and the options for reading them."""

    name: FormatName
    """Name of the format."""
    input_separator: str = "\n"
    """Text between instruction and input; see `ConversationSource.input_separator`."""
    columns: Mapping[FieldName, str] = field(default_factory=dict)
    """Column names that the config gives; see `ConversationSource.fields`."""
    ignored: frozenset[str] = frozenset()
    """Names of fields to ignore, as `plain_name` returns them."""
    repairs: RepairConfig = NO_REPAIRS
    """Repairs of conversations with defects."""
    needs_answer: bool = True
    """Whether a row without an answer is refused; false for prompts."""


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A row as a prompt."""

    conversation: Conversation
    """The conversation before the answer."""
    reference: str | None
    """Answer that the row has; None if it has none."""


def detect_row_format(
    row: Mapping[str, Any], columns: Mapping[FieldName, str] | None = None
) -> FormatName | None:
    """Return the format of a row, judged by its field names; None if it has no known format.

    A list of turns takes precedence over single fields, which chat rows often have as well.

    Args:
        row: A JSON object.
        columns: Column names that the config gives.
    """
    fields = RowFields(row, KeyCounts(), columns=columns)
    if fields.has("conversations"):
        return "conversations"
    if fields.has("messages"):
        return "messages"
    if fields.has("instruction"):
        return "alpaca"
    if (fields.has("prompt") or fields.has("input")) and fields.has("completion"):
        return "completion"
    return None


def detect_prompt_format(
    row: Mapping[str, Any], columns: Mapping[FieldName, str] | None = None
) -> FormatName | None:
    """Return the format of a row that need not have an answer; see `detect_row_format`."""
    fields = RowFields(row, KeyCounts(), columns=columns)
    is_prompt = fields.has("prompt") or fields.has("input")
    return detect_row_format(row, columns) or ("completion" if is_prompt else None)


def describe_columns(row: Mapping[str, Any]) -> str:
    """Return the columns of a row in no known format, and how a config would name them."""
    listed = f"the columns are {', '.join(map(repr, row)) or 'none'}"
    texts = [
        name for name, value in row.items() if isinstance(value, str) and not is_metadata(name)
    ]
    if len(texts) < 2:
        return listed
    shown = json.dumps({"prompt": texts[0], "completion": texts[1]}, ensure_ascii=False)
    return f"{listed}; say what they hold, such as fields: {shown}"


def read_row(
    row: Mapping[str, Any], row_format: RowFormat, counts: KeyCounts
) -> Conversation | Defect:
    """Return a row as a conversation that can be trained on, or its defect.

    Args:
        row: A JSON object.
        row_format: Format of the row, and how to read it.
        counts: Counts of field names, updated in place.
    """
    try:
        read = _read(row, row_format, counts)
    except DefectError as error:
        return error.defect
    read = repair(read, row_format.repairs, counts.repaired)
    return find_defect(read) or read


def read_prompt(
    row: Mapping[str, Any], row_format: RowFormat, counts: KeyCounts
) -> PromptRow | Defect:
    """Return a row as a prompt for its last answer, or its defect.

    An answer at the end is the reference. Without one, the conversation is the prompt as it is.

    Args:
        row: A JSON object.
        row_format: Format of the row, and how to read it; its repairs are not used.
        counts: Counts of field names, updated in place.
    """
    try:
        read = _read(row, replace(row_format, needs_answer=False), counts)
    except DefectError as error:
        return error.defect
    reference = None
    if read.turns and read.turns[-1].role == "assistant":
        reference = read.turns[-1].content
        read = replace(read, turns=read.turns[:-1])
    return find_prompt_defect(read) or PromptRow(read, reference)


def _read(row: Mapping[str, Any], row_format: RowFormat, counts: KeyCounts) -> Conversation:
    fields = RowFields(row, counts, ignored=row_format.ignored, columns=row_format.columns)
    if row_format.name in ("conversations", "messages"):
        read = _read_turns(fields, row_format, counts)
    elif row_format.name == "alpaca":
        read = _read_alpaca(fields, row_format, counts)
    else:
        read = _read_completion(fields, row_format, counts)
    is_flat = row_format.name in ("alpaca", "completion")
    fields.finish((is_flat and fields.read_texts()) or read.texts)
    return read


def write_row(conversation: Conversation, row_format: FormatName) -> dict[str, Any] | Defect:
    """Return a conversation as a row of a format, or a defect; its id, if any, comes first.

    In `alpaca` the user's turn becomes the instruction and the input is empty: their original
    boundary is not known.
    """
    row: dict[str, Any] = {} if conversation.id is None else {"id": conversation.id}
    if conversation.tools:
        row["tools"] = [json.loads(tool) for tool in conversation.tools]
    if row_format in ("conversations", "messages"):
        return row | {row_format: _written_turns(conversation, row_format)}
    if len(conversation.turns) != 2:
        detail = f"{len(conversation.turns)} turns, a {row_format} row holds exactly 2"
        return Defect("not_representable", detail)
    if any(turn.reasoning is not None or not turn.is_trained for turn in conversation.turns):
        detail = f"a {row_format} row holds neither reasoning nor turns that are not trained"
        return Defect("not_representable", detail)
    if conversation.system is not None:
        row["system"] = conversation.system
    user, answer = (turn.content for turn in conversation.turns)
    if row_format == "alpaca":
        return row | {"instruction": user, "input": "", "output": answer}
    return row | {"prompt": user, "completion": answer}


def _written_turns(conversation: Conversation, row_format: FormatName) -> list[dict[str, Any]]:
    role_name, content_name = _ROLE_NAMES[row_format][0], _CONTENT_NAMES[row_format][0]
    roles = _WRITTEN_ROLES[row_format]
    said: list[dict[str, Any]] = []
    if conversation.system is not None:
        said.append({role_name: roles["system"], content_name: conversation.system})
    for turn in conversation.turns:
        written: dict[str, Any] = {role_name: roles[turn.role], content_name: turn.content}
        if turn.reasoning is not None:
            written[_REASONING[0]] = turn.reasoning
        if not turn.is_trained:
            written[_MASKS[0]] = 0
        said.append(written)
    return said


def _read_alpaca(fields: RowFields, row_format: RowFormat, counts: KeyCounts) -> Conversation:
    user = _with_input(fields, fields.text(fields.aliases("instruction")), row_format)
    said = [ChatMessage("user", user)]
    if _has_answer(fields, "output", row_format):
        said.append(ChatMessage("assistant", fields.text(fields.aliases("output"))))
    return _conversation(fields, row_format, counts, said)


def _has_answer(fields: RowFields, name: FieldName, row_format: RowFormat) -> bool:
    """Whether to read the column of a row's answer, which a prompt may lack or leave empty."""
    return row_format.needs_answer or fields.optional(fields.aliases(name)) is not None


def _read_completion(fields: RowFields, row_format: RowFormat, counts: KeyCounts) -> Conversation:
    """Read a prompt and its completion, each a text or a list of messages."""
    aliases = fields.aliases("prompt")
    if not fields.has("prompt"):
        aliases = fields.aliases("input")
    prompt = fields.value(aliases)
    said: list[ChatMessage] = []
    system: str | None = None
    if holds_messages(prompt):
        system, said = _read_messages(prompt, row_format, counts)
        # An answer before the last question belongs to the prompt.
        said = [replace(message, is_trained=False) for message in said]
    else:
        text = fields.text_of(prompt, fields.label(aliases))
        if fields.has("prompt"):
            text = _with_input(fields, text, row_format)
        said = [ChatMessage("user", text)]
    if not _has_answer(fields, "completion", row_format):
        return _conversation(fields, row_format, counts, said, system)
    answer = fields.column("completion")
    if holds_messages(answer):
        late, answers = _read_messages(answer, row_format, counts)
        if late is not None:
            raise DefectError("late_system", "a completion has a system message")
        said += answers
    else:
        label = fields.label(fields.aliases("completion"))
        said.append(ChatMessage("assistant", fields.text_of(answer, label)))
    return _conversation(fields, row_format, counts, said, system)


def _with_input(fields: RowFields, instruction: str, row_format: RowFormat) -> str:
    extra = fields.optional_text(fields.aliases("input"))
    return instruction if extra is None else instruction + row_format.input_separator + extra


def holds_messages(value: object) -> TypeGuard[list[dict[str, Any]]]:
    """Whether a value is a list of messages: objects with a role, unlike the parts of a text."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, dict) and ("role" in one or "from" in one) for one in value)
    )


def _read_turns(fields: RowFields, row_format: RowFormat, counts: KeyCounts) -> Conversation:
    name: FieldName = "messages" if row_format.name == "messages" else "conversations"
    listed = fields.column(name)
    if not isinstance(listed, list):
        detail = f"{fields.label(fields.aliases(name))} is {describe_type(listed)}, wanted an array"
        raise DefectError("wrong_type", detail)
    system, said = _read_messages(listed, row_format, counts)
    return _conversation(fields, row_format, counts, said, system)


def _conversation(
    fields: RowFields,
    row_format: RowFormat,
    counts: KeyCounts,
    said: list[ChatMessage],
    system: str | None = None,
) -> Conversation:
    """Return what was said, with the row's system message, history, tools and id."""
    own = fields.optional_text(fields.aliases("system"))
    if own is not None and system is not None and own != system:
        detail = f"{fields.label(fields.aliases('system'))} and the first turn differ"
        raise DefectError("ambiguous_field", detail)
    before = _read_history(fields, row_format, counts)
    try:
        joined = join_tool_messages([*before, *said], may_end_with_calls=True)
    except UserError as error:
        raise DefectError("invalid_tools", str(error)) from error
    return Conversation(joined.turns, own or system, fields.id(), _read_tools(fields))


def _read_history(fields: RowFields, row_format: RowFormat, counts: KeyCounts) -> list[ChatMessage]:
    """Read earlier exchanges: pairs of question and answer, or messages."""
    aliases = fields.aliases("history")
    history = fields.optional(aliases)
    if history is None:
        return []
    label = fields.label(aliases)
    if holds_messages(history):
        system, said = _read_messages(history, row_format, counts)
        if system is not None:
            raise DefectError("late_system", f"{label} has a system message")
        return said
    said = []
    for number, pair in enumerate(history if isinstance(history, list) else [history]):
        if not isinstance(pair, list) or len(pair) != 2:
            detail = f"{label}: item {number} is no pair of a question and its answer"
            raise DefectError("wrong_type", detail)
        user, answer = (fields.text_of(text, f"{label}, item {number}") for text in pair)
        said += [ChatMessage("user", user), ChatMessage("assistant", answer)]
    return said


def _read_messages(
    listed: list[Any], row_format: RowFormat, counts: KeyCounts
) -> tuple[str | None, list[ChatMessage]]:
    """Return the system message, None if there is none, and the other messages."""
    system: str | None = None
    said: list[ChatMessage] = []
    for number, value in enumerate(listed):
        if not isinstance(value, dict):
            detail = f"turn {number} is {describe_type(value)}, wanted an object"
            raise DefectError("wrong_type", detail)
        where = f"turn {number}: "
        fields = RowFields(value, counts, ignored=row_format.ignored, where=where)
        role = _read_role(fields, number, row_format.name)
        message = _read_message(fields, role, row_format.name)
        fields.finish([message.text])
        if role != "system":
            said.append(message)
        elif number:
            detail = f"turn {number} is a system message; only the first turn can be one"
            raise DefectError("late_system", detail)
        else:
            system = message.text or None
    return system, said


def _read_role(fields: RowFields, number: int, row_format: FormatName) -> _ReadRole:
    name = fields.text(_ROLE_NAMES.get(row_format, _ROLE_NAMES["messages"]))
    role = _ROLES.get(name.strip().casefold())
    if role is None:
        detail = f"turn {number}: unknown role {name[:40]!r}; known roles: {', '.join(_ROLES)}"
        raise DefectError("unknown_role", detail)
    return role


def _read_message(fields: RowFields, role: _ReadRole, row_format: FormatName) -> ChatMessage:
    names = _CONTENT_NAMES.get(row_format, _CONTENT_NAMES["messages"])
    is_trained = _read_mask(fields)
    if role == "call":
        calls = tuple(_read_call(one) for one in _json_list(fields.value(names)))
        return ChatMessage("assistant", "", calls, is_trained=is_trained is not False)
    if role == "tool":
        fields.optional(("name",))  # results follow their calls
        call_id = fields.optional_text(_CALL_IDS)
        return ChatMessage("tool", fields.text(names), call_id=call_id)
    if role != "assistant":
        if is_trained and role == "user":
            raise DefectError("unsupported_value", "a turn of the user is marked to be trained on")
        return ChatMessage("user", fields.text(names))
    calls = _read_calls(fields)
    text = fields.optional_text(names) if calls else fields.text(names)
    reasoning = fields.optional_text(_REASONING)
    is_trained = is_trained is not False
    return ChatMessage("assistant", text or "", calls, is_trained=is_trained, reasoning=reasoning)


def _read_mask(fields: RowFields) -> bool | None:
    """Return whether a turn is marked to be learned; None if it is not marked.

    Raises:
        DefectError: A mark is another number than 0 and 1, or two marks differ.
    """
    marks: set[bool] = set()
    for name in _MASKS:
        value = fields.optional((name,))
        if value is None:
            continue
        if value not in (0, 1):  # also true and false
            detail = f"{fields.label((name,))} is {value!r}; a turn is learned (1) or not (0)"
            raise DefectError("unsupported_value", detail[:400])
        marks.add(bool(value))
    if len(marks) > 1:
        raise DefectError("ambiguous_field", f"{fields.label(_MASKS)}: two marks differ")
    return marks.pop() if marks else None


def _read_calls(fields: RowFields) -> tuple[ToolCall, ...]:
    listed = fields.optional(("tool_calls",))
    single = fields.optional(("function_call",))
    calls = [] if listed is None else _json_list(listed)
    return tuple(_read_call(one) for one in [*calls, *([] if single is None else [single])])


def _read_call(value: object) -> ToolCall:
    """Read a call: `{"id", "function": {"name", "arguments"}}`, or the inner object alone."""
    outer = value if isinstance(value, dict) else {}
    inner = outer.get("function", outer)
    name = inner.get("name") if isinstance(inner, dict) else None
    if not isinstance(name, str):
        raise DefectError("invalid_tools", f"a tool call has no name: {str(value)[:200]}")
    arguments = inner.get("arguments", inner.get("parameters"))
    if not isinstance(arguments, str):
        arguments = json.dumps({} if arguments is None else arguments, ensure_ascii=False)
    call_id = outer.get("id")
    return ToolCall(name, arguments, call_id if isinstance(call_id, str) and call_id else None)


_TOOL_KEYS = ("name", "description", "parameters", "strict")


def _read_tools(fields: RowFields) -> tuple[str, ...]:
    """Read tool definitions and return each as serving writes it, in JSON.

    Raises:
        DefectError: They are no list of functions with names.
    """
    listed = fields.optional(fields.aliases("tools"))
    if listed is None:
        return ()
    written: list[str] = []
    for value in _json_list(listed):
        outer = value if isinstance(value, dict) else {}
        function = outer.get("function", outer)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DefectError("invalid_tools", f"a tool has no name: {str(value)[:200]}")
        # The order of an endpoint's fields, whatever order the file has.
        known = {key: function[key] for key in _TOOL_KEYS if key in function}
        rest = {key: item for key, item in function.items() if key not in ("type", *known)}
        tool = {"type": "function", "function": known | rest}
        written.append(json.dumps(tool, ensure_ascii=False))
    return tuple(written)


def _json_list(value: object) -> list[Any]:
    """Return an array, or the array or object that a string holds in JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DefectError("invalid_tools", f"not JSON: {value[:200]}") from error
    if isinstance(value, dict):
        return [value]
    if not isinstance(value, list):
        raise DefectError("invalid_tools", f"tools are {describe_type(value)}, wanted an array")
    return value
