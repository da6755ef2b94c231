import math
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from raytune_llama.config.settings import ConfigError, from_dict
from raytune_llama.tune.space import (
    Distribution,
    RandomSuggester,
    build_grid,
    check_space,
    draw_sample,
    drawn_parameters,
)


def make(**kind: object) -> Distribution:
    return from_dict(Distribution, kind)


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ({}, "got no kind"),
        ({"uniform": [0, 1], "choice": [1]}, "got choice and uniform"),
        ({"choice": []}, "choice"),
        ({"choice": [8, 8]}, "duplicate value"),
        ({"uniform": [1.0, 1.0]}, "a lower and a higher bound"),
        ({"randint": [5, 2]}, "a lower and a higher bound"),
        ({"loguniform": [0.0, 1.0]}, "above 0"),
        ({"choice": [1], "factor": 2.0}, "multiple_of is not set"),
        ({"lognormal": [0, 1]}, "loguniform"),
    ],
)
def test_distribution_that_has_no_values_is_refused(kind: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        make(**kind)


@given(number=st.integers(0, 10**6))
def test_draw_stays_in_the_bounds_and_depends_on_its_seed_alone(number: int) -> None:
    space = {
        "a": make(uniform=[-1.0, 2.0]),
        "b": make(loguniform=[1e-5, 1e-3]),
        "c": make(randint=[3, 4]),
        "d": make(choice=[[1, 2], "x", None]),
    }
    sample = draw_sample(space, RandomSuggester(f"1:{number}"))
    assert -1 <= sample["a"] <= 2
    assert 1e-5 <= sample["b"] <= 1e-3
    assert sample["c"] in (3, 4)
    assert sample["d"] in ([1, 2], "x", None)
    assert draw_sample(space, RandomSuggester(f"1:{number}")) == sample
    assert draw_sample(space, RandomSuggester(f"2:{number}"))["a"] != sample["a"]


def test_loguniform_draws_each_decade_alike() -> None:
    space = {"rate": make(loguniform=[1e-5, 1e-2])}
    draws = [draw_sample(space, RandomSuggester(str(n)))["rate"] for n in range(3000)]
    decades = [sum(math.floor(math.log10(d)) == p for d in draws) for p in (-5, -4, -3)]
    assert sum(decades) == 3000
    # Four standard deviations of a count of 3000 with probability 1/3.
    assert all(abs(count - 1000) < 104 for count in decades)


def test_multiple_follows_the_field_it_names() -> None:
    space = {"alpha": make(multiple_of="rank", factor=2.0), "rank": make(choice=[8, 16])}
    for number in range(10):
        sample = draw_sample(space, RandomSuggester(str(number)))
        assert sample["alpha"] == 2 * sample["rank"]
        assert isinstance(sample["alpha"], int)
        assert list(sample) == ["alpha", "rank"]


def test_multiple_of_a_text_is_refused() -> None:
    space = {"a": make(choice=["x"]), "b": make(multiple_of="a", factor=2.0)}
    with pytest.raises(ConfigError, match="wanted a number"):
        build_grid(space)


@pytest.mark.parametrize(
    ("other", "problem"), [("c", "another field of the space"), ("b", "is a multiple itself")]
)
def test_multiple_of_nothing_that_is_drawn_is_refused(other: str, problem: str) -> None:
    space = {
        "a": make(multiple_of=other),
        "b": make(multiple_of="d", factor=2.0),
        "d": make(choice=[1]),
    }
    assert [problem in text for text in check_space(space)] == [True]


def test_grid_has_every_combination_once() -> None:
    space = {
        "rank": make(choice=[8, 16]),
        "alpha": make(multiple_of="rank", factor=4.0),
        "rate": make(choice=[1e-3, 1e-4, 1e-5]),
    }
    points = [(p["rank"], p["alpha"], p["rate"]) for p in build_grid(space)]
    assert points == [(r, 4 * r, rate) for r in (8, 16) for rate in (1e-3, 1e-4, 1e-5)]


def test_grid_of_a_range_names_the_field() -> None:
    with pytest.raises(ConfigError, match=r"space\.optim\.rate"):
        build_grid({"optim.rate": make(uniform=[0.0, 1.0])})


def test_drawn_parameters_tell_true_from_one() -> None:
    space = {"a": make(choice=[1, True, [1]]), "b": make(uniform=[0.0, 1.0])}
    assert drawn_parameters(space, {"a": True, "b": 0.5}) == {"a": 1, "b": 0.5}
    assert drawn_parameters(space, {"a": [1], "b": 0.5}) == {"a": 2, "b": 0.5}
