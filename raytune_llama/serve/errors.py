"""Errors of a request: invalid, overloaded or failed engine."""

from collections.abc import Sequence

from raytune_llama.config.errors import UserError

_MAX_SHOWN_NAMES = 20


class InvalidRequestError(UserError):
    """An invalid request; `param` is the invalid field, `code` OpenAI's code of the error."""

    def __init__(
        self, message: str, param: str | None = None, code: str | None = "invalid_value"
    ) -> None:
        # All arguments, so that the error can be unpickled.
        super().__init__(message, param, code)
        self.message, self.param, self.code = message, param, code

    def __str__(self) -> str:
        return self.message


class UnknownModelError(InvalidRequestError):
    """A request for a model or an adapter that does not exist."""

    def __init__(self, name: str, known: Sequence[str]) -> None:
        """Name a model, and some of those that exist."""
        shown = ", ".join(f"`{one}`" for one in known[:_MAX_SHOWN_NAMES]) or "none"
        more = len(known) - _MAX_SHOWN_NAMES
        text = f"The model `{name}` does not exist. Available models: {shown}" + (
            f" and {more} more" if more > 0 else ""
        )
        super().__init__(text, "model", "model_not_found")
        self.args = name, known


class BusyError(RuntimeError):
    """Too many requests are queued; retry later."""


class EngineError(RuntimeError):
    """The engine has failed and can't serve requests until it is replaced."""
