"""Presets, and mistakes that are found before anything is loaded."""

from typing import Any

import pytest

from raytune_llama.config.settings import ConfigError, from_dict
from raytune_llama.generate.config import GenerateConfig

BASE: dict[str, Any] = {"model": {"path": "m"}, "input": {"path": "i.txt"}, "run_dir": "r"}


def config_of(**fields: Any) -> GenerateConfig:  # noqa: ANN401
    return from_dict(GenerateConfig, BASE | fields)


@pytest.mark.parametrize(
    ("preset", "template", "numbers"),
    [
        ("chinese-alpaca", "alpaca_inference", (0.2, 0.9, 40, 1.1, 400)),
        ("belle", "belle", (0.9, 0.6, 30, 1.2, 128)),
        ("calm", "belle", (0.001, 0.85, 30, 1.2, 1024)),
        (None, None, (0.0, 1.0, 0, 1.0, 512)),
    ],
)
def test_preset_gives_the_numbers_of_its_project(
    preset: str | None, template: str | None, numbers: tuple[float, ...]
) -> None:
    config = config_of(preset=preset)
    got = config.resolved_sampling
    assert config.template == template
    assert numbers == (
        got.temperature,
        got.top_p,
        got.top_k,
        got.repetition_penalty,
        got.max_new_tokens,
    )


def test_fields_take_precedence_over_the_preset() -> None:
    sampling = {"repetition_penalty": 1.3, "temperature": 0, "top_k": 0, "seed": 5}
    config = config_of(
        preset="chinese-alpaca", sampling=sampling, model={"path": "m", "template": "alpaca"}
    )
    got = config.resolved_sampling
    assert config.template == "alpaca"
    assert (got.repetition_penalty, got.temperature, got.top_k, got.seed) == (1.3, 0, 0, 5)
    assert (got.top_p, got.max_new_tokens) == (0.9, 400)


def test_mistakes_are_listed_together() -> None:
    data = {"model": {"path": "m", "template": "alpaca"}, "with_prompt": False, "system": "s"}
    with pytest.raises(ConfigError) as caught:
        from_dict(GenerateConfig, data)
    for field in ("input: required", "run_dir: required", "system: set", "model.template: set"):
        assert any(problem.startswith(field) for problem in caught.value.problems), field


def test_chat_needs_a_template_but_no_files() -> None:
    assert from_dict(GenerateConfig, {"model": {"path": "m"}, "interactive": True}).interactive
    with pytest.raises(ConfigError, match="with_prompt: got false"):
        config_of(interactive=True, with_prompt=False)
