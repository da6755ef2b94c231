"""Why a request is not answered."""

from raytune_llama.config.errors import UserError


class InvalidRequestError(UserError):
    """A request that can't be answered; `param` is the field at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        # All arguments, so that pickle can rebuild it.
        super().__init__(message, param)
        self.message, self.param = message, param

    def __str__(self) -> str:
        return self.message


class UnknownModelError(InvalidRequestError):
    """A request for a model or an adapter that is not there."""


class BusyError(RuntimeError):
    """As many requests wait as may; try again later."""


class EngineError(RuntimeError):
    """The engine has failed and answers nothing any more."""
