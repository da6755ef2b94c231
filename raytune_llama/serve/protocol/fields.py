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

from raytune_llama.config.errors import UserError

_NOTHING = (False, 0, "", [], {})


class FieldError(UserError):
    """An invalid field of a request, with OpenAI's error code."""

    def __init__(self, message: str, code: str) -> None:
        # All arguments, so that the error can be unpickled.
        super().__init__(message, code)
        self.message, self.code = message, code

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Unsupported:
    """A documented field that would change the response, which is not possible here."""

    advice: str = "omit it"
    """What to do instead."""

    neutral: tuple[Any, ...] = ()
    """Values that do not change the response, besides false, 0 and empty ones."""


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
            value, refusal = (self.model_extra or {})[name], self.unsupported[name]
            if value not in _NOTHING and value not in refusal.neutral:
                raise FieldError(f"{name}: not supported; {refusal.advice}", "unsupported_parameter")
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
