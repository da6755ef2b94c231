"""Repair the commonest defects of conversations, as far as the config asks for it."""

from collections import Counter
from dataclasses import replace

from raytune_llama.chat.config import RepairConfig
from raytune_llama.chat.conversations import Conversation, Turn

NO_REPAIRS = RepairConfig()
"""Conversations stay as they are."""


def repair(conversation: Conversation, repairs: RepairConfig, counts: Counter[str]) -> Conversation:
    """Return a conversation repaired.

    Args:
        conversation: Conversation as its row has it.
        repairs: Repairs to do.
        counts: Number of repaired conversations per repair, updated in place.
    """
    turns, system = list(conversation.turns), conversation.system
    if repairs.trim:
        turns = [replace(turn, content=turn.content.strip()) for turn in turns]
        system = system.strip() or None if system is not None else None
        is_trimmed = tuple(turns) != conversation.turns or system != conversation.system
        counts["trimmed"] += is_trimmed
    if repairs.join_same_role:
        joined = _join(turns)
        counts["same role joined"] += len(joined) < len(turns)
        turns = joined
    if repairs.drop_leading_answer and turns and turns[0].role == "assistant":
        counts["leading answer dropped"] += 1
        while turns and turns[0].role == "assistant":
            turns.pop(0)
    if repairs.drop_trailing_question and turns and turns[-1].role == "user":
        counts["trailing question dropped"] += 1
        while turns and turns[-1].role == "user":
            turns.pop()
    return replace(conversation, turns=tuple(turns), system=system)


def _join(turns: list[Turn]) -> list[Turn]:
    """Join consecutive turns of one author that are trained alike, by a line break."""
    joined: list[Turn] = []
    for turn in turns:
        last = joined[-1] if joined else None
        is_alike = last is not None and (last.role, last.is_trained) == (turn.role, turn.is_trained)
        if last is None or not is_alike or turn.reasoning is not None:
            joined.append(turn)
        else:
            joined[-1] = replace(last, content=f"{last.content}\n{turn.content}")
    return joined
