"""From a request's messages and tools to the conversation that a chat template renders."""

import json
from collections.abc import Sequence

from raytune_llama.chat.conversations import Conversation
from raytune_llama.chat.tools import ChatMessage, ToolCall, join_tool_messages
from raytune_llama.config.errors import UserError
from raytune_llama.serve.protocol.chat import Message
from raytune_llama.serve.protocol.tools import Tool


def build_conversation(messages: Sequence[Message], tools: Sequence[Tool]) -> Conversation:
    """Return the conversation to render; only the first message may be a system message.

    Args:
        messages: messages of the request; at least one.
        tools: tools shown to the model.

    Raises:
        ValueError: a message is out of place; the error names it.
    """
    system = messages[0].text if messages[0].role in {"system", "developer"} else None
    first = int(system is not None)
    turns = join_tool_messages(
        [_read(first + number, message) for number, message in enumerate(messages[first:])],
        first=first,
    )
    # As received: unset fields are not written.
    written = [
        json.dumps(tool.model_dump(exclude_unset=True), ensure_ascii=False) for tool in tools
    ]
    return Conversation(turns, system, tools=tuple(written))


def _read(number: int, message: Message) -> ChatMessage:
    if message.role not in ("user", "assistant", "tool"):
        raise UserError(
            f"messages: message {number + 1} has the role {message.role}, which only the first "
            "message may have"
        )
    calls = tuple(
        ToolCall(call.function.name, call.function.arguments, call.id)
        for call in message.tool_calls or ()
    )
    return ChatMessage(message.role, message.text, calls, message.tool_call_id)
