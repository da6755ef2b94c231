"""Which fields of a request are used, have no effect, are refused by name, or are ignored.

A field that OpenAI documents is used, has no effect here (`no_effect`), or is refused by name if it
would change the response (`unsupported`). A field that nobody documents is ignored, which the
application counts and logs (`http/request_guard.py`). A value that means nothing, such as null or
an empty list, is accepted in every field.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from raytune_llama.chat.conversations import describe_type
from raytune_llama.config.errors import UserError

INVALID, MISSING, UNSUPPORTED = (
    "invalid_value",
    "missing_required_parameter",
    "unsupported_parameter",
)
"""OpenAI's error codes of fields."""

_NOTHING = (False, 0, "", [], {})


class FieldError(UserError):
    """An invalid field of a request."""

    def __init__(self, field: str, message: str, code: str) -> None:
        """Describe the problem.

        Args:
            field: dotted path of the field in the object that is validated; may be empty.
            message: what is wrong with it.
            code: OpenAI's error code.
        """
        # All arguments, so that the error can be unpickled.
        super().__init__(field, message, code)
        self.field, self.message, self.code = field, message, code

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message


@dataclass(frozen=True)
class Unsupported:
    """A documented field that would change the response, which is not possible here."""

    advice: str = "omit it"
    """What to do instead."""

    neutral: tuple[Any, ...] = ()
    """Values that do not change the response, besides false, 0 and empty ones."""

    is_zero_a_value: bool = False
    """Whether 0 changes the response too, as that of a seed."""

    def refuses(self, value: object) -> bool:
        """Whether a value would change the response."""
        means_nothing = value in _NOTHING and not (self.is_zero_a_value and value == 0)
        return not means_nothing and value not in self.neutral


class RequestModel(BaseModel):
    """Base class of request models.

    Values are not coerced: "3" is not a number. Unknown fields are kept in `model_extra`.
    """

    model_config = ConfigDict(extra="allow", strict=True)

    no_effect: ClassVar[frozenset[str]] = frozenset()
    """Documented fields that can't change the response here, whatever their value."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = {}
    """Documented fields that are refused unless their value means nothing."""

    @model_validator(mode="before")
    @classmethod
    def _omit_null(cls, data: Any) -> Any:  # noqa: ANN401  # any JSON value
        """Omit fields that are null: it means the same in every field."""
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> "RequestModel":
        for name in self.unsupported.keys() & (self.model_extra or {}).keys():
            refusal = self.unsupported[name]
            if refusal.refuses((self.model_extra or {})[name]):
                raise FieldError(name, f"not supported; {refusal.advice}", UNSUPPORTED)
        return self

    def ignored_fields(self) -> Iterator[str]:
        """Yield the dotted names of the fields that are ignored, without places in lists."""
        known = self.no_effect | self.unsupported.keys()
        yield from (name for name in self.model_extra or {} if name not in known)
        for name in type(self).model_fields:
            value = getattr(self, name)
            for one in value if isinstance(value, list) else (value,):
                if isinstance(one, RequestModel):
                    yield from (f"{name}.{inner}" for inner in one.ignored_fields())


def check_texts_or_ids(value: Any, max_items: int) -> Any:  # noqa: ANN401  # any JSON value
    """Return a value that is a text, token IDs, or a list of either; reject any other.

    A union's own errors would list all its variants, and no place.

    Args:
        value: value of the field.
        max_items: maximum number of texts or lists of token IDs.

    Raises:
        FieldError: the value is something else; the error names the place.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        got = "an empty list" if value == [] else describe_type(value)
        text = f"got {got}, expected a string, a list of token IDs, or a list of either"
        raise FieldError("", text, INVALID)
    items = list_texts_or_ids(value)
    if len(items) > max_items:
        raise FieldError("", f"got {len(items)} items, expected at most {max_items}", INVALID)
    is_text = isinstance(items[0], str)
    for number, item in enumerate(items):
        if is_text != isinstance(item, str) or not isinstance(item, str | list):
            text = "expected all strings or all lists of token IDs"
            raise FieldError(str(number), text, INVALID)
        for place, id_ in enumerate(() if is_text else item):
            if not _is_id(id_):
                where = f"{number}.{place}" if items is value else str(place)
                raise FieldError(where, "expected a token ID, a non-negative integer", INVALID)
    return value


def list_texts_or_ids(value: str | list[Any]) -> list[str | list[int]]:
    """Return the texts or lists of token IDs of a value that `check_texts_or_ids` has checked."""
    return [value] if isinstance(value, str) or _is_id(value[0]) else value


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
