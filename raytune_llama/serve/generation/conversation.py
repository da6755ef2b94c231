"""From a request's messages to the conversation that the chat template renders.

    conversation = build_conversation(request.messages, request.shown_tools)
    ids = served.chat.encode_prompt(conversation)

Errors name a message by its index in the request: `messages.0` is the first one.
"""

import json
from collections.abc import Sequence

from raytune_llama.chat.conversations import Conversation, find_text_defect
from raytune_llama.chat.tools import ChatMessage, ToolCall, join_tool_messages
from raytune_llama.config.errors import UserError
from raytune_llama.serve.protocol.chat import Message
from raytune_llama.serve.protocol.tools import Tool

_SYSTEM = ("system", "developer")
"""Roles of system messages; newer clients of OpenAI's API use the second one."""


def build_conversation(messages: Sequence[Message], tools: Sequence[Tool]) -> Conversation:
    """Return the conversation to render: its messages in any order, tool calls and results as text.

    Args:
        messages: messages of the request; at least one.
        tools: tools shown to the model.

    Raises:
        UserError: a text can't be encoded, or calls and results do not match; the error names the
            message.
    """
    for number, message in enumerate(messages):
        _check_texts(number, message)
    system = messages[0].text if messages[0].role in _SYSTEM else None
    first = int(system is not None)
    joined = join_tool_messages([_read_message(one) for one in messages[first:]], first=first)
    # As received: unset fields are not written.
    written = [
        json.dumps(tool.model_dump(exclude_unset=True), ensure_ascii=False) for tool in tools
    ]
    return Conversation(joined.turns, system, tools=tuple(written), places=joined.places)


def _check_texts(number: int, message: Message) -> None:
    texts = {"content": message.text}
    for place, call in enumerate(message.tool_calls or ()):
        texts[f"tool_calls.{place}.function.arguments"] = call.function.arguments
    for name, text in texts.items():
        defect = find_text_defect(text, f"messages.{number}.{name}")
        if defect is not None:
            raise UserError(defect.detail)


def _read_message(message: Message) -> ChatMessage:
    calls = tuple(
        _read_call(call.function.name, call.function.arguments, call.id)
        for call in message.tool_calls or ()
    )
    role = "system" if message.role == "developer" else message.role
    return ChatMessage(role, message.text, calls, message.tool_call_id)


def _read_call(name: str, arguments: str, call_id: str) -> ToolCall:
    """Return a call of a message; clients send back answers that `max_tokens` has cut in a call."""
    if not arguments.strip():  # cut before them, or a client's way to write no arguments
        return ToolCall(name, "{}", call_id, needs_result=False)
    try:
        json.loads(arguments)
    except (ValueError, RecursionError):
        return ToolCall(name, arguments, call_id, is_cut=True, needs_result=False)
    return ToolCall(name, arguments, call_id)
