"""Tools in plain text: the prompt that lists them, and a streaming parser of tool calls.

    <tool_call>
    {"name": "weather", "arguments": {"city": "Rom"}}
    </tool_call>

This is the format that Hermes and Qwen models are trained on. It is text, so it works with every
template; a grammar restricts a model's calls to this format (`engine/grammar.py`).
"""

import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from raytune_llama.chat.conversations import Conversation, Turn, begin_first_turn
from raytune_llama.config.errors import UserError

TOOL_CALL_OPEN_TAG = "<tool_call>"
"""Tag that begins a tool call."""

TOOL_CALL_CLOSE_TAG = "</tool_call>"
"""Tag that ends a tool call."""

TOOL_NAME = r"[A-Za-z0-9_-]{1,64}"
"""Pattern of a function's name."""

CALL_START, CALL_MIDDLE, CALL_END = '\n{"name": "', '", "arguments": ', "}\n"
"""Text between the opening tag, the function's name, its arguments and the closing tag."""

# Word for word the text of Qwen's templates, which these models are trained on.
_BEFORE_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
_AFTER_TOOLS = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    'within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, '
    '"arguments": <args-json-object>}\n</tool_call>'
)


def write_tools(tools: Sequence[str]) -> str:
    """Return the part of a system message that lists tools, each given in JSON."""
    return _BEFORE_TOOLS + "\n".join(tools) + _AFTER_TOOLS


def write_calls(text: str, calls: Sequence[tuple[str, str]], *, is_cut: bool = False) -> str:
    """Return an assistant's turn: its text, then its calls.

    Args:
        text: Text before the calls.
        calls: Name and arguments, in JSON, of each call.
        is_cut: Whether the turn ends with the arguments of its last call, which are incomplete.
    """
    written = [
        f"{TOOL_CALL_OPEN_TAG}{CALL_START}{name}{CALL_MIDDLE}{arguments}{CALL_END}{TOOL_CALL_CLOSE_TAG}"
        for name, arguments in calls
    ]
    if is_cut:
        written[-1] = written[-1].removesuffix(CALL_END + TOOL_CALL_CLOSE_TAG)
    return "\n".join([text, *written] if text else written)


def write_results(results: Sequence[str]) -> str:
    """Return the user's turn that holds the results of tool calls, in the order of the calls."""
    return "\n".join(f"<tool_response>\n{result}\n</tool_response>" for result in results)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call in a message of the assistant."""

    name: str
    """Name of the function."""
    arguments: str
    """Arguments, a JSON object."""
    id: str | None = None
    """Id that its result refers to; None: results follow in the order of the calls."""
    is_cut: bool = False
    """Whether a token limit has cut the arguments: they are written as they are."""
    needs_result: bool = True
    """Whether a conversation without its result is refused."""


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """A message of a request or of a row, before tool results have become turns."""

    role: Literal["system", "user", "assistant", "tool"]
    """Author of the message."""
    text: str
    """Text of the message."""
    calls: tuple[ToolCall, ...] = ()
    """Tool calls of the assistant."""
    call_id: str | None = None
    """Id of the call whose result the message is; None: the next call without a result."""
    is_trained: bool = True
    """See `Turn.is_trained`."""
    reasoning: str | None = None
    """See `Turn.reasoning`."""


@dataclass(frozen=True, slots=True)
class JoinedMessages:
    """Messages as turns."""

    turns: tuple[Turn, ...]
    """The turns, in order."""
    places: tuple[int, ...]
    """Index of the first message of each turn, in its request or row."""


def join_tool_messages(
    messages: Sequence[ChatMessage], *, first: int = 0, may_end_with_calls: bool = False
) -> JoinedMessages:
    """Return messages as turns: calls become text of the answer, results a turn of the user.

    The results are in the order of the calls; the user's text follows them if it comes next. A
    system message is a turn, and does not come between a call and its result.

    Args:
        messages: Messages after the first system message.
        first: Index of the first message in its request or row, for error messages.
        may_end_with_calls: Whether the last message may have calls without results.

    Raises:
        UserError: Calls and results do not match; the error names the message.
    """
    reader = _MessageReader(first)
    for message in messages:
        reader.read(message)
    if not (may_end_with_calls and messages and messages[-1].calls):
        reader.end_results()
    return JoinedMessages(tuple(reader.turns), tuple(reader.places))


def place_tools(conversation: Conversation, *, allows_system: bool) -> Conversation:
    """Return a conversation with its tool definitions as text.

    They are appended to the system message. A template without system messages gets them at the
    start of the first user turn: so they work with every template, and no user text comes before
    them.
    """
    if not conversation.tools:
        return conversation
    written, placed = write_tools(conversation.tools), replace(conversation, tools=())
    if not allows_system:
        return begin_first_turn(placed, written)
    system = f"{conversation.system}\n\n{written}" if conversation.system else written
    return replace(placed, system=system)


@dataclass
class _MessageReader:
    """The turns so far, and the tool calls whose results are pending."""

    number: int
    """Index of the next message."""
    turns: list[Turn] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    """Index of the first message of each turn."""
    caller: int = 0
    """Index of the message with the pending calls."""
    results: dict[str, str | None] = field(default_factory=dict)
    """Results by call id, in the order of the calls; None: pending."""
    optional: set[str] = field(default_factory=set)
    """Ids of the calls that need no result."""
    first_result: int | None = None
    """Index of the first message with one of the results; None: none has come."""

    def read(self, message: ChatMessage) -> None:
        """Add a message."""
        match message.role:
            case "tool":
                self._read_result(message)
            case "user":
                place = self.number if self.first_result is None else self.first_result
                before = self._take_results()
                text = f"{before}\n{message.text}" if before else message.text
                self._add(Turn("user", text), place)
            case "assistant":
                self.end_results()
                calls = self._read_calls(message)
                is_cut = bool(message.calls) and message.calls[-1].is_cut
                text = write_calls(message.text, calls, is_cut=is_cut)
                turn = Turn("assistant", text, message.is_trained, message.reasoning)
                self._add(turn, self.number)
            case "system":
                self.end_results()
                self._add(Turn("system", message.text), self.number)
        self.number += 1

    def end_results(self) -> None:
        """Add a turn for the results that no text of the user follows."""
        place = self.first_result
        before = self._take_results()
        if before:
            assert place is not None, "results come with messages"
            self._add(Turn("user", before), place)

    def _add(self, turn: Turn, place: int) -> None:
        self.turns.append(turn)
        self.places.append(place)

    def _read_calls(self, message: ChatMessage) -> list[tuple[str, str]]:
        where = f"messages.{self.number}.tool_calls"
        self.caller = self.number
        ids = [call.id or f"call {place}" for place, call in enumerate(message.calls)]
        self.results = dict.fromkeys(ids)
        pairs = zip(ids, message.calls, strict=True)
        self.optional = {name for name, call in pairs if not call.needs_result}
        if len(self.results) < len(ids):
            raise UserError(f"{where}: two calls have the same id")
        for place, call in enumerate(message.calls):
            if not _NAME.fullmatch(call.name):
                raise UserError(
                    f"{where}.{place}.function.name: got {call.name[:80]!r}, wanted 1 to 64 "
                    "letters, digits, '_' and '-'"
                )
            if not call.is_cut and not _is_object(call.arguments):
                raise UserError(f"{where}.{place}.function.arguments: is not a JSON object")
        return [(call.name, call.arguments) for call in message.calls]

    def _read_result(self, message: ChatMessage) -> None:
        where, name = f"messages.{self.number}.tool_call_id", message.call_id
        pending = [call for call, text in self.results.items() if text is None]
        self.first_result = self.number if self.first_result is None else self.first_result
        if name is None and not pending and self._calls_are_text():
            found = _RESULT.findall(message.text) or [message.text]
            self.results |= {f"{self.number}.{place}": text for place, text in enumerate(found)}
            return
        name = name if name is not None else (pending or [""])[0]
        if name not in self.results:
            known = ", ".join(map(repr, self.results)) or "none"
            raise UserError(
                f"{where}: {name!r} is no call of the preceding assistant message; its calls are: "
                f"{known}"
            )
        if self.results[name] is not None:
            raise UserError(f"{where}: {name!r} has a result already")
        self.results[name] = message.text

    def _calls_are_text(self) -> bool:
        """Whether the answer before holds calls as text, as in the rows of Hermes."""
        return bool(self.turns) and TOOL_CALL_OPEN_TAG in self.turns[-1].content

    def _take_results(self) -> str:
        """Return the text of all results, in the order of the calls, and clear them."""
        texts = [text for text in self.results.values() if text is not None]
        pending = [name for name, text in self.results.items() if text is None]
        missing = [name for name in pending if name not in self.optional]
        if missing:
            raise UserError(
                f"messages.{self.caller}.tool_calls: {missing[0]!r} has no result; each call "
                "must be followed by a message with role tool"
            )
        self.results, self.first_result = {}, None
        return write_results(texts)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


@dataclass(frozen=True)
class ToolCallChunk:
    """The newest part of a streamed tool call."""

    index: int
    """Index of the call in the answer."""

    arguments: str = ""
    """Next characters of the arguments, in JSON."""

    id: str | None = None
    """Generated id of the call; set in its first chunk only."""

    name: str | None = None
    """Name of the function; set in the call's first chunk only."""


_RESULT = re.compile(r"<tool_response>\n?(.*?)\n?</tool_response>", re.DOTALL)
_NAME = re.compile(TOOL_NAME)
_HEAD = re.compile(f"{re.escape(CALL_START)}({TOOL_NAME}){re.escape(CALL_MIDDLE)}")
_NEXT = "\n" + TOOL_CALL_OPEN_TAG
_LONGEST_HEAD = len(CALL_START) + 64 + len(CALL_MIDDLE)


class ToolCallParser:
    """Separates text from tool calls in a streamed answer, however it is split into chunks.

    Calls must be in the format that the grammar enforces. A line break before the first call is
    part of neither: `write_calls` restores it.
    """

    def __init__(self, *, must_call: bool) -> None:
        """Start parsing an answer.

        Args:
            must_call: Whether the answer consists of calls only, without text.
        """
        self._state: Literal["text", "between", "head", "arguments", "tail"]
        self._state = "between" if must_call else "text"
        self._held = ""
        self._depth, self._in_string, self._is_escaped = 0, False, False
        self.num_calls = 0
        """Number of calls started so far."""

    def push(self, text: str) -> tuple[str, list[ToolCallChunk]]:
        """Consume the next text; return the text and the call chunks that are now final."""
        self._held += text
        content, chunks = "", list[ToolCallChunk]()
        held = None
        while held != (self._held, self._state):
            held = (self._held, self._state)
            match self._state:
                case "text":
                    content += self._read_text()
                case "between":
                    self._skip((TOOL_CALL_OPEN_TAG, _NEXT), "head")
                case "head":
                    chunks += self._read_head()
                case "arguments":
                    chunks += self._read_arguments()
                case "tail":
                    self._skip((CALL_END + TOOL_CALL_CLOSE_TAG,), "between")
        return content, chunks

    def finish(self) -> str:
        """Return the text held back; the rest of an incomplete call is dropped."""
        return self._held if self._state == "text" else ""

    def _read_text(self) -> str:
        """Return the text before a call, or the text that can't be the beginning of one."""
        place = self._held.find(TOOL_CALL_OPEN_TAG)
        if place >= 0:
            text, self._held = self._held[:place], self._held[place + len(TOOL_CALL_OPEN_TAG) :]
            self._state = "head"
            return text.removesuffix("\n")
        longest = min(len(_NEXT), len(self._held))
        kept = next((n for n in range(longest, 0, -1) if self._may_begin(self._held[-n:])), 0)
        end = len(self._held) - kept
        text, self._held = self._held[:end], self._held[end:]
        return text

    @staticmethod
    def _may_begin(end: str) -> bool:
        return _NEXT.startswith(end) or TOOL_CALL_OPEN_TAG.startswith(end)

    def _skip(self, wanted: tuple[str, ...], state: Literal["head", "between"]) -> None:
        """Skip one of the wanted texts once it is complete, and enter a state."""
        for text in wanted:
            if self._held.startswith(text):
                self._held, self._state = self._held[len(text) :], state
                return
        assert any(text.startswith(self._held) for text in wanted), (
            f"not a tool call: {self._held[:80]!r}"
        )

    def _read_head(self) -> list[ToolCallChunk]:
        found = _HEAD.match(self._held)
        if found is None:
            assert len(self._held) < _LONGEST_HEAD, f"not a tool call: {self._held[:80]!r}"
            return []
        self._held, self._state = self._held[found.end() :], "arguments"
        self._depth, self._in_string, self._is_escaped = 0, False, False
        self.num_calls += 1
        call_id = f"call_{uuid.uuid4().hex[:24]}"
        return [ToolCallChunk(self.num_calls - 1, id=call_id, name=found[1])]

    def _read_arguments(self) -> list[ToolCallChunk]:
        """Read up to the end of the JSON object."""
        length = 0
        while length < len(self._held) and self._state == "arguments":
            self._follow(self._held[length])
            length += 1
            if not self._depth:
                self._state = "tail"
        arguments, self._held = self._held[:length], self._held[length:]
        return [ToolCallChunk(self.num_calls - 1, arguments)] if arguments else []

    def _follow(self, character: str) -> None:
        if self._in_string:
            if self._is_escaped:
                self._is_escaped = False
            elif character == "\\":
                self._is_escaped = True
            elif character == '"':
                self._in_string = False
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
