"""A settings class that would mislead its users is refused where it is defined."""

from typing import Annotated

import pytest
from pydantic import Field

from raytune_llama.config.settings import (
    PLACEMENT,
    ConfigError,
    describe,
    from_dict,
    identity,
    settings,
)


@settings
class Size:
    """A size."""

    rows: Annotated[int, Field(ge=0)] = 1
    """Rows."""


def test_field_without_docstring_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Bare\.size"):

        @settings
        class Bare:
            """No docstring below."""

            size: int = 1


def test_inherited_field_keeps_meaning_bounds_and_marker() -> None:
    @settings
    class Child(Size):
        """Adds to the cluster."""

        memory: Annotated[int, PLACEMENT] = 1
        """GiB."""

    @settings
    class Grandchild(Child):
        """Adds nothing."""

    assert "    Rows." in describe(Grandchild).splitlines()
    assert identity(Grandchild()) == {"rows": 1}
    with pytest.raises(ConfigError, match="rows: got -1"):
        from_dict(Grandchild, {"rows": -1})


def test_default_outside_its_type_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Zero\.steps"):

        @settings
        class Zero:
            """Its default breaks its bound."""

            steps: Annotated[int, Field(ge=1)] = 0
            """Steps."""


def test_default_that_a_partial_file_would_reset_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Reset\.size.*Size\(\)"):

        @settings
        class Reset:
            """Its default differs from the class's own."""

            size: Size = Size(rows=2)
            """Size."""
