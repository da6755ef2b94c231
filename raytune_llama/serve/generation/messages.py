"""From a request's messages and tools to the conversation that a chat template renders."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from raytune_llama.chat.conversations import Conversation, Turn
from raytune_llama.chat.tools import write_calls, write_results, write_tools
from raytune_llama.config.errors import UserError
from raytune_llama.serve.protocol.chat import Message
from raytune_llama.serve.protocol.tools import Tool


def build_conversation(
    messages: Sequence[Message], tools: Sequence[Tool], *, allows_system: bool
) -> Conversation:
    """Return the conversation to render; only the first message may be a system message.

    Tool definitions are appended to the system message. A template without system messages gets
    them at the start of the first user turn: so they work with every template, and no user text
    comes before them. Tool results become a user turn, followed by the user's text if that comes
    next.

    Args:
        messages: messages of the request; at least one.
        tools: tools shown to the model.
        allows_system: whether the template supports a system message.

    Raises:
        ValueError: a message is out of place; the error names it.
    """
    system = messages[0].text if messages[0].role in {"system", "developer"} else None
    reader = _Reader()
    for number, message in enumerate(messages):
        if number or system is None:
            reader.read(number, message)
    reader.end()
    turns = reader.turns
    if tools:
        # As received: unset fields are not written.
        written = write_tools(
            [json.dumps(tool.model_dump(exclude_unset=True), ensure_ascii=False) for tool in tools]
        )
        if allows_system:
            system = f"{system}\n\n{written}" if system else written
        elif turns and turns[0].role == "user":
            turns[0] = Turn("user", f"{written}\n\n{turns[0].content}")
    return Conversation(tuple(turns), system)


@dataclass
class _Reader:
    """The turns so far, and the tool calls whose results are pending."""

    turns: list[Turn] = field(default_factory=list)
    caller: int = 0
    """Index of the message with the pending calls."""
    results: dict[str, str | None] = field(default_factory=dict)
    """Results by call id, in the order of the calls; None: pending."""

    def read(self, number: int, message: Message) -> None:
        """Add a message."""
        if message.role == "tool":
            self._read_result(number, message)
            return
        before = self._take_results()
        match message.role:
            case "user":
                text = f"{before}\n{message.text}" if before else message.text
                self.turns.append(Turn("user", text))
            case "assistant":
                if before:
                    self.turns.append(Turn("user", before))
                self.turns.append(Turn("assistant", self._read_calls(number, message)))
            case role:
                raise UserError(
                    f"messages: message {number + 1} has the role {role}, which only the first "
                    "message may have"
                )

    def end(self) -> None:
        """Add a turn for the last results."""
        before = self._take_results()
        if before:
            self.turns.append(Turn("user", before))

    def _read_calls(self, number: int, message: Message) -> str:
        calls = message.tool_calls or []
        self.caller = number
        self.results = {call.id: None for call in calls}
        if len(self.results) < len(calls):
            raise UserError(f"messages.{number}.tool_calls: two calls have the same id")
        for place, call in enumerate(calls):
            if not _is_object(call.function.arguments):
                where = f"messages.{number}.tool_calls.{place}.function.arguments"
                raise UserError(f"{where}: is not a JSON object")
        return write_calls(
            message.text, [(call.function.name, call.function.arguments) for call in calls]
        )

    def _read_result(self, number: int, message: Message) -> None:
        name = message.tool_call_id
        assert name is not None
        if name not in self.results:
            known = ", ".join(map(repr, self.results)) or "none"
            raise UserError(
                f"messages.{number}.tool_call_id: {name!r} is no call of the preceding "
                f"assistant message; its calls are: {known}"
            )
        if self.results[name] is not None:
            raise UserError(f"messages.{number}.tool_call_id: {name!r} has a result already")
        self.results[name] = message.text

    def _take_results(self) -> str:
        """Return the text of all results, in the order of the calls, and clear them."""
        texts = [text for text in self.results.values() if text is not None]
        missing = [name for name, text in self.results.items() if text is None]
        if missing:
            raise UserError(
                f"messages.{self.caller}.tool_calls: {missing[0]!r} has no result; each call "
                "must be followed by a message with role tool"
            )
        self.results = {}
        return write_results(texts)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
