"""Errors of a request: invalid, overloaded or failed engine."""

from raytune_llama.config.errors import UserError


class InvalidRequestError(UserError):
    """An invalid request; `param` is the invalid field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        # All arguments, so that the error can be unpickled.
        super().__init__(message, param)
        self.message, self.param = message, param

    def __str__(self) -> str:
        return self.message


class UnknownModelError(InvalidRequestError):
    """A request for a model or an adapter that does not exist."""


class BusyError(RuntimeError):
    """Too many requests are queued; retry later."""


class EngineError(RuntimeError):
    """The engine has failed and can't serve requests until it is replaced."""
