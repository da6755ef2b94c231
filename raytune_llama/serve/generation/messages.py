"""From a request's messages and tools to the conversation that a template writes."""

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
    """Return what templates write; only the first message may be the system's.

    Tools are told behind what the system says. A template that has no place for that gets them at
    the beginning of the first user's turn: so they work with every template, and no text of a user
    comes before them. Results of calls are a user's turn, with the user's text behind them where
    it follows at once.

    Args:
        messages: at least one.
        tools: those that are shown.
        allows_system: whether the template has a place for what the system says.

    Raises:
        ValueError: a message stands where it can't; the text names it.
    """
    system = messages[0].text if messages[0].role in {"system", "developer"} else None
    reader = _Reader()
    for number, message in enumerate(messages):
        if number or system is None:
            reader.read(number, message)
    reader.end()
    turns = reader.turns
    if tools:
        # As they came: what was left out is not written.
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
    """The turns so far, and the calls that wait for their results."""

    turns: list[Turn] = field(default_factory=list)
    caller: int = 0
    """Number of the message with the calls."""
    results: dict[str, str | None] = field(default_factory=dict)
    """By the calls' ids, in the calls' order; None: to come."""

    def read(self, number: int, message: Message) -> None:
        """Take a message in."""
        if message.role == "tool":
            self._read_result(number, message)
            return
        before = self._told_results()
        match message.role:
            case "user":
                text = f"{before}\n{message.text}" if before else message.text
                self.turns.append(Turn("user", text))
            case "assistant":
                if before:
                    self.turns.append(Turn("user", before))
                self.turns.append(Turn("assistant", self._read_calls(number, message)))
            case role:
                raise UserError(f"messages: message {number + 1} has the role {role}")

    def end(self) -> None:
        """Write what is left."""
        before = self._told_results()
        if before:
            self.turns.append(Turn("user", before))

    def _read_calls(self, number: int, message: Message) -> str:
        calls = message.tool_calls or []
        self.caller = number
        self.results = {call.id: None for call in calls}
        if len(self.results) < len(calls):
            raise UserError(f"messages.{number}.tool_calls: two calls have one id")
        for place, call in enumerate(calls):
            if not _is_object(call.function.arguments):
                where = f"messages.{number}.tool_calls.{place}.function.arguments"
                raise UserError(f"{where}: is no object in JSON")
        return write_calls(
            message.text, [(call.function.name, call.function.arguments) for call in calls]
        )

    def _read_result(self, number: int, message: Message) -> None:
        name = message.tool_call_id
        assert name is not None
        if name not in self.results:
            known = ", ".join(map(repr, self.results)) or "none"
            raise UserError(
                f"messages.{number}.tool_call_id: {name!r} is no call of the assistant's message "
                f"before; its calls are: {known}"
            )
        if self.results[name] is not None:
            raise UserError(f"messages.{number}.tool_call_id: {name!r} has a result already")
        self.results[name] = message.text

    def _told_results(self) -> str:
        """Return the results, all there, in the order of the calls."""
        texts = [text for text in self.results.values() if text is not None]
        missing = [name for name, text in self.results.items() if text is None]
        if missing:
            raise UserError(
                f"messages.{self.caller}.tool_calls: {missing[0]!r} has no result; a message of "
                "the role tool has to follow for each call"
            )
        self.results = {}
        return write_results(texts)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
