"""Prompts name the topics, task types and limits that were drawn for them."""

from pathlib import Path
from typing import Literal

import pytest

from raytune_llama.config.settings import ConfigError
from raytune_llama.generate.make_data.config import PromptConfig
from raytune_llama.generate.make_data.prompt import build_prompt, load_texts

Language = Literal["zh", "en"]


@pytest.mark.parametrize("language", ["zh", "en"])
def test_package_has_82_topics_and_14_task_types(language: Language) -> None:
    texts = load_texts(PromptConfig(language=language))
    assert (len(texts.topics), len(texts.task_types)) == (82, 14)


@pytest.mark.parametrize("language", ["zh", "en"])
def test_prompt_contains_what_was_drawn_and_nothing_to_fill_in(language: Language) -> None:
    config = PromptConfig(language=language)
    texts = load_texts(config)
    for number in range(1, 50):
        prompt = build_prompt(config, texts, number)
        line = prompt.text.splitlines()[3]
        assert sum(topic in line for topic in texts.topics) >= 10
        assert "$" not in prompt.text
        assert 80 <= prompt.max_input_chars <= 120
        assert 128 <= prompt.max_output_chars <= 512
        assert str(prompt.max_input_chars) in prompt.text
        assert str(prompt.max_output_chars) in prompt.text


def test_prompt_depends_on_seed_and_number_only() -> None:
    texts = load_texts(PromptConfig())
    one, other = PromptConfig(seed=1), PromptConfig(seed=2)
    assert build_prompt(one, texts, 5) == build_prompt(one, texts, 5)
    assert build_prompt(one, texts, 5).text != build_prompt(one, texts, 6).text
    assert build_prompt(one, texts, 5).text != build_prompt(other, texts, 5).text
    # The same in every process: this was drawn in another one.
    english = PromptConfig(language="en")
    assert build_prompt(english, load_texts(english), 1).max_output_chars == 216


def test_own_lists_replace_those_of_the_package(tmp_path: Path) -> None:
    (tmp_path / "topics.txt").write_text("\ufeffC#\n\n  心脏病 \n", encoding="utf-8")
    config = PromptConfig(topics=str(tmp_path / "topics.txt"), num_topics=2)
    texts = load_texts(config)
    assert texts.topics == ("C#", "心脏病")
    assert "C#" in build_prompt(config, texts, 1).text
    assert texts.hashes != load_texts(PromptConfig()).hashes


def test_every_mistake_in_lists_is_reported(tmp_path: Path) -> None:
    (tmp_path / "topics.txt").write_text("a\nb\na\n")
    config = PromptConfig(
        topics=str(tmp_path / "topics.txt"), task_types=str(tmp_path / "none.txt")
    )
    with pytest.raises(ConfigError) as caught:
        load_texts(config)
    repeated, missing, few = caught.value.problems
    assert "prompt.topics" in repeated
    assert "repeats a" in repeated
    assert "prompt.task_types" in missing
    assert "prompt.num_topics: got 10, but the list has 3" in few
