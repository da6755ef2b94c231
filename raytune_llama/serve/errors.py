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


class ContextLengthError(InvalidRequestError):
    """A prompt that leaves no room for an answer.

    LiteLLM and LangChain recognize it by words of its message.
    """

    def __init__(self, max_context: int, length: str, param: str) -> None:
        """Name the maximum number of tokens, the prompt's length with its unit, and its field."""
        text = (
            f"This model's maximum context length is {max_context} tokens, including the answer, "
            f"but the prompt is too long: {length}; shorten it"
        )
        super().__init__(text, param, "context_length_exceeded")
        self.args = max_context, length, param


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
