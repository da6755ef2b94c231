"""Tools in plain text: how they are shown to a model, and how its calls are read as they come.

    <tool_call>
    {"name": "weather", "arguments": {"city": "Rom"}}
    </tool_call>

This is the form that Hermes and Qwen models have learned. It is text, so that every template can
carry it; a grammar lets a model write calls in no other way (`engine/grammar.py`).
"""

import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

TOOL_CALL_OPEN_TAG = "<tool_call>"
"""Begins a call."""

TOOL_CALL_CLOSE_TAG = "</tool_call>"
"""Ends a call."""

CALL_START, CALL_MIDDLE, CALL_END = '\n{"name": "', '", "arguments": ', "}\n"
"""What stands between the opening, a function's name, its arguments and the closing."""

# Word for word what Qwen's templates write, and so what these models know.
_BEFORE_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
_BEHIND_TOOLS = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    'within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, '
    '"arguments": <args-json-object>}\n</tool_call>'
)


def write_tools(tools: Sequence[str]) -> str:
    """Return what the system says of tools, each given in JSON."""
    return _BEFORE_TOOLS + "\n".join(tools) + _BEHIND_TOOLS


def write_calls(text: str, calls: Sequence[tuple[str, str]]) -> str:
    """Return an assistant's turn: its text, then its calls, each a name and arguments in JSON."""
    written = [
        f"{TOOL_CALL_OPEN_TAG}{CALL_START}{name}{CALL_MIDDLE}{arguments}{CALL_END}{TOOL_CALL_CLOSE_TAG}"
        for name, arguments in calls
    ]
    return "\n".join([text, *written] if text else written)


def write_results(results: Sequence[str]) -> str:
    """Return what a user's turn tells of calls, in their order."""
    return "\n".join(f"<tool_response>\n{result}\n</tool_response>" for result in results)


@dataclass(frozen=True)
class ToolCallChunk:
    """What is new of a call."""

    index: int
    """Of the call among the answer's."""

    arguments: str = ""
    """The next characters of its arguments, in JSON."""

    id: str | None = None
    """A new name of the call; with its first piece."""

    name: str | None = None
    """The function's; with the call's first piece."""


_HEAD = re.compile(re.escape(CALL_START) + r"([A-Za-z0-9_-]{1,64})" + re.escape(CALL_MIDDLE))
_NEXT = "\n" + TOOL_CALL_OPEN_TAG
_LONGEST_HEAD = len(CALL_START) + 64 + len(CALL_MIDDLE)


class ToolCallParser:
    """Tells text from calls, however an answer is cut into pieces.

    Calls are in the form that the grammar lets through. A line break before the first one belongs
    to neither: `write_calls` puts it back.
    """

    def __init__(self, *, must_call: bool) -> None:
        """Begin an answer.

        Args:
            must_call: whether it has calls alone, and no text.
        """
        self._state: Literal["text", "between", "head", "arguments", "tail"]
        self._state = "between" if must_call else "text"
        self._held = ""
        self._depth, self._in_string, self._is_escaped = 0, False, False
        self.num_calls = 0
        """Calls that were begun."""

    def push(self, text: str) -> tuple[str, list[ToolCallChunk]]:
        """Take what comes next; return the text and the pieces of calls that are now certain."""
        self._held += text
        told, pieces = "", list[ToolCallChunk]()
        held = None
        while held != (self._held, self._state):
            held = (self._held, self._state)
            match self._state:
                case "text":
                    told += self._read_text()
                case "between":
                    self._skip((TOOL_CALL_OPEN_TAG, _NEXT), "head")
                case "head":
                    pieces += self._read_head()
                case "arguments":
                    pieces += self._read_arguments()
                case "tail":
                    self._skip((CALL_END + TOOL_CALL_CLOSE_TAG,), "between")
        return told, pieces

    def finish(self) -> str:
        """Return the text that was held back; of a call that was cut nothing more is told."""
        return self._held if self._state == "text" else ""

    def _read_text(self) -> str:
        """Return the text before a call, or what can't become the beginning of one."""
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
        """Go on to a state behind one of the wanted texts, once it has come."""
        for text in wanted:
            if self._held.startswith(text):
                self._held, self._state = self._held[len(text) :], state
                return
        assert any(text.startswith(self._held) for text in wanted), f"no call: {self._held[:80]!r}"

    def _read_head(self) -> list[ToolCallChunk]:
        found = _HEAD.match(self._held)
        if found is None:
            assert len(self._held) < _LONGEST_HEAD, f"no call: {self._held[:80]!r}"
            return []
        self._held, self._state = self._held[found.end() :], "arguments"
        self._depth, self._in_string, self._is_escaped = 0, False, False
        self.num_calls += 1
        call_id = f"call_{uuid.uuid4().hex[:24]}"
        return [ToolCallChunk(self.num_calls - 1, id=call_id, name=found[1])]

    def _read_arguments(self) -> list[ToolCallChunk]:
        """Read on to the end of an object in JSON."""
        length = 0
        while length < len(self._held) and self._state == "arguments":
            self._follow(self._held[length])
            length += 1
            if not self._depth:
                self._state = "tail"
        told, self._held = self._held[:length], self._held[length:]
        return [ToolCallChunk(self.num_calls - 1, told)] if told else []

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
