"""Mistakes in the config are reported together, before anything is sent."""

import pytest

from raytune_llama.config.command_line import default_config
from raytune_llama.config.settings import ConfigError, from_dict, load
from raytune_llama.generate.make_data.config import MakeDataConfig, check_key


def problems_of(**fields: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        from_dict(MakeDataConfig, {"run_dir": "t", **fields})
    return caught.value.problems


def test_job_without_an_end_is_refused() -> None:
    (problem,) = problems_of()
    assert problem.startswith("num_rows: set it")


@pytest.mark.parametrize(
    ("fields", "start"),
    [
        ({"base_url": "localhost:8000"}, "base_url: got 'localhost:8000'"),
        ({"base_url": "http://me:secret@host/v1"}, "base_url: contains a user name"),
        ({"prompt": {"input_chars": [120, 80]}}, "prompt.input_chars: got [120, 80]"),
        ({"sampling": {"extra_body": {"model": "x"}}}, "sampling.extra_body.model"),
        ({"num_row": 3}, "num_row: no such field; did you mean num_rows?"),
    ],
)
def test_mistake_is_named_with_its_field(fields: dict[str, object], start: str) -> None:
    (problem,) = problems_of(num_rows=1, **fields)
    assert problem.startswith(start)
    assert "secret" not in problem


def test_default_config_loads() -> None:
    config = load(MakeDataConfig, [], default=default_config("make_data.yaml"))
    assert config.is_on_this_machine


@pytest.mark.parametrize("key", ["sk with space", "sk\n", "ключ"])
def test_key_that_cannot_be_sent_is_not_shown(key: str) -> None:
    config = from_dict(MakeDataConfig, {"run_dir": "t", "num_rows": 1})
    (problem,) = check_key(config, key)
    assert problem.startswith("api_key_variable")
    assert key.strip() not in problem
