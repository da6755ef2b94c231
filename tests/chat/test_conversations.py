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


def test_prompt_needs_the_user_to_speak_last() -> None:
    assert find_prompt_defect(talk("q", "a", "r")) is None
    defect = find_prompt_defect(talk("q", "a"))
    assert defect is not None
    assert defect.reason == "last_not_user"
