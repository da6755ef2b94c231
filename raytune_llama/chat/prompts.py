"""Conversations of requests, in forms that more and more templates can render.

    for form in list_forms(conversation, allows_system=template.allows_system):
        ...                                 # the first one that the template renders is used
    segments = leave_open(segments, form)   # the answer is generated after them

A request may have its messages in any order: several system messages, one in the middle, two turns
of one speaker in a row, the assistant first. Some templates render that, others raise an error.
Each form contains the text of every message, in the order of the request.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from raytune_llama.chat.conversations import (
    Conversation,
    Turn,
    begin_first_turn,
    insert_user_turn,
)
from raytune_llama.chat.templates.segments import Segment
from raytune_llama.chat.tools import place_tools


def list_forms(conversation: Conversation, *, allows_system: bool) -> Iterator[Conversation]:
    """Yield a conversation as it is, then each time with more of it joined; no form twice in a row.

    First consecutive turns of one speaker are joined by a blank line. Then later system messages
    become the user's. At last a conversation that the user does not begin gets an empty turn of the
    user's or, if the template can't render that, one with the system message.

    Args:
        conversation: Conversation without a defect; see `find_prompt_defect`.
        allows_system: Whether the template has system messages. Without them, the system message
            and the tools are at the start of the first user turn.
    """
    before: Conversation | None = None
    for form in _list_all(conversation, allows_system=allows_system):
        is_empty = form.system is None and not form.turns
        if form != before and not is_empty:
            yield form
        before = form


def _list_all(conversation: Conversation, *, allows_system: bool) -> Iterator[Conversation]:
    yield place_tools(conversation, allows_system=allows_system)
    joined = _join_speakers(conversation)
    asked = _join_speakers(_turn_systems_to_users(joined))
    has_user_first = bool(asked.turns) and asked.turns[0].role == "user"
    for form in (joined, asked, asked if has_user_first else insert_user_turn(asked, "")):
        placed = place_tools(form, allows_system=allows_system)
        yield placed if allows_system else _move_system_to_user(placed)
    if allows_system and not has_user_first and (asked.system or asked.tools):
        yield _move_system_to_user(place_tools(asked, allows_system=allows_system))


def _move_system_to_user(conversation: Conversation) -> Conversation:
    """Return a conversation with the system message at the start of the first user turn."""
    if not conversation.system:
        return replace(conversation, system=None)
    return begin_first_turn(replace(conversation, system=None), conversation.system)


def _turn_systems_to_users(conversation: Conversation) -> Conversation:
    """Return a conversation whose system messages after the first are turns of the user."""
    turns = (
        replace(turn, role="user") if turn.role == "system" else turn for turn in conversation.turns
    )
    return replace(conversation, turns=tuple(turns))


def _join_speakers(conversation: Conversation) -> Conversation:
    """Return a conversation whose consecutive turns of one speaker are one turn."""
    system = conversation.system
    turns: list[Turn] = []
    places: list[int] = []
    for number, turn in enumerate(conversation.turns):
        if turn.role == "system" and not turns:
            system = _join_texts(system, turn.content)
        # Reasoning has a place only before the content of its turn.
        elif turns and turns[-1].role == turn.role and turn.reasoning is None:
            content = _join_texts(turns[-1].content, turn.content)
            turns[-1] = replace(turns[-1], content=content)
        else:
            turns.append(turn)
            places += conversation.places[number : number + 1]
    return replace(conversation, turns=tuple(turns), system=system, places=tuple(places))


def _join_texts(*texts: str | None) -> str:
    return "\n\n".join(filter(None, texts))


def leave_open(segments: Sequence[Segment], conversation: Conversation) -> list[Segment]:
    """Return a prompt's segments; an answer that they end with is left open, to be continued.

    White space at its end is kept where the template strips it: in the complete answer it is not at
    the end.

    Args:
        segments: Segments that a template has rendered.
        conversation: The conversation that they were rendered from.
    """
    written, turns = list(segments), conversation.turns
    if not turns or turns[-1].role != "assistant":
        return written
    while written[-1].kind != "assistant":
        written.pop()
    content = turns[-1].content
    end = content[len(content.rstrip()) :]
    written[-1] = replace(written[-1], text=written[-1].text.rstrip() + end)
    return written
