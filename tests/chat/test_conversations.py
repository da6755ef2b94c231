"""A conversation that nothing can be learned from is told by reason, and never raises."""

from typing import Any

import pytest

from raytune_llama.chat.conversations import (
    Conversation,
    Turn,
    find_defect,
    find_prompt_defect,
)
from tests.chat.conftest import talk


def turn(role: Any, content: Any) -> Turn:  # noqa: ANN401  # what a file may hold
    return Turn(role, content)


USER, BOT = turn("user", "1 + 1?"), turn("assistant", "2")


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ((), "empty_conversation"),
        ((turn("tool", "x"), BOT), "unknown_role"),
        ((BOT, USER), "assistant_first"),
        ((USER, USER, BOT), "user_twice"),
        ((USER, BOT, BOT), "assistant_twice"),
        ((USER,), "last_not_assistant"),
        ((USER, BOT, USER), "last_not_assistant"),
        ((USER, turn("assistant", "")), "empty_target"),
        ((USER, turn("assistant", " \n"), USER, BOT), "empty_target"),
        ((turn("user", None), BOT), "wrong_type"),
        ((turn("user", 2), BOT), "wrong_type"),
        ((turn("user", "a\0"), BOT), "nul"),
        ((USER, turn("assistant", "\ud83d")), "lone_surrogate"),
    ],
)
def test_defect_of_turns_has_its_reason(turns: tuple[Turn, ...], reason: str) -> None:
    defect = find_defect(Conversation(turns))
    assert defect is not None
    assert defect.reason == reason


@pytest.mark.parametrize("conversation", [talk("q", "a"), talk("", "a"), talk("q", "a", "r", " b")])
def test_conversation_to_learn_from_has_no_defect(conversation: Conversation) -> None:
    assert find_defect(conversation) is None


def test_system_text_is_checked_too() -> None:
    defect = find_defect(talk("q", "a", system="\ud83d"))
    assert defect is not None
    assert (defect.reason, defect.detail) == (
        "lone_surrogate",
        "system: lone surrogate at character 0",
    )


def test_system_message_after_the_first_message_is_not_trained_on() -> None:
    defect = find_defect(Conversation((USER, BOT, turn("system", "Be brief."), USER, BOT)))
    assert defect is not None
    assert defect.reason == "late_system"
    assert "turn 2" in defect.detail


@pytest.mark.parametrize(
    "turns",
    [(BOT, USER), (USER, USER), (USER, BOT, BOT), (USER, turn("system", "x")), (turn("user", ""),)],
)
def test_prompt_may_have_turns_in_any_order(turns: tuple[Turn, ...]) -> None:
    assert find_prompt_defect(Conversation(turns)) is None


@pytest.mark.parametrize(
    ("conversation", "reason", "detail"),
    [
        (Conversation(()), "empty_conversation", "no messages"),
        (Conversation((USER, turn("tool", "x"))), "unknown_role", "messages.1: role 'tool'"),
        (Conversation((USER, turn("user", 2)), "s"), "wrong_type", "messages.2 is a number"),
        (Conversation((USER, turn("user", "\0")), places=(3, 7)), "nul", "messages.7: NUL"),
    ],
)
def test_defect_of_a_prompt_names_its_message(
    conversation: Conversation, reason: str, detail: str
) -> None:
    defect = find_prompt_defect(conversation)
    assert defect is not None
    assert defect.reason == reason
    assert detail in defect.detail
