"""Tools in plain text: the prompt that lists them, and a streaming parser of tool calls.

    <tool_call>
    {"name": "weather", "arguments": {"city": "Rom"}}
    </tool_call>

This is the format that Hermes and Qwen models are trained on. It is text, so it works with every
template; a grammar restricts a model's calls to this format (`engine/grammar.py`).
"""

import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

TOOL_CALL_OPEN_TAG = "<tool_call>"
"""Tag that begins a tool call."""

TOOL_CALL_CLOSE_TAG = "</tool_call>"
"""Tag that ends a tool call."""

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


def write_calls(text: str, calls: Sequence[tuple[str, str]]) -> str:
    """Return an assistant's turn: its text, then its calls as (name, arguments in JSON)."""
    written = [
        f"{TOOL_CALL_OPEN_TAG}{CALL_START}{name}{CALL_MIDDLE}{arguments}{CALL_END}{TOOL_CALL_CLOSE_TAG}"
        for name, arguments in calls
    ]
    return "\n".join([text, *written] if text else written)


def write_results(results: Sequence[str]) -> str:
    """Return the user's turn that holds the results of tool calls, in the order of the calls."""
    return "\n".join(f"<tool_response>\n{result}\n</tool_response>" for result in results)


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


_HEAD = re.compile(re.escape(CALL_START) + r"([A-Za-z0-9_-]{1,64})" + re.escape(CALL_MIDDLE))
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
