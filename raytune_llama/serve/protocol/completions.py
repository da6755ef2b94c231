"""OpenAI's completion requests and responses: the prompt is a text or token IDs."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from raytune_llama.serve.protocol.chat import (
    GUIDED_DECODING,
    OTHER_SERVERS,
    FinishReason,
    GenerationRequest,
    Usage,
)
from raytune_llama.serve.protocol.fields import (
    INVALID,
    FieldError,
    Unsupported,
    check_texts_or_ids,
    list_texts_or_ids,
)

MAX_PROMPTS = 256

TokenIds = list[Annotated[int, Field(ge=0)]]


def _check_prompt(value: Any) -> Any:  # noqa: ANN401  # any JSON value
    return check_texts_or_ids(value, MAX_PROMPTS)


class CompletionRequest(GenerationRequest):
    """Body of `POST /v1/completions`."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = OTHER_SERVERS | {
        "suffix": Unsupported("put it into the prompt, in the form that the model knows"),
        **dict.fromkeys(
            ("response_format", *GUIDED_DECODING),
            Unsupported("use /v1/chat/completions with response_format"),
        ),
    }

    prompt: Annotated[
        str | TokenIds | list[str] | list[TokenIds],
        BeforeValidator(_check_prompt),
    ]
    """Prompt to complete, or several: strings or lists of token IDs."""

    echo: bool = False
    """Whether to begin each completion with the prompt."""

    best_of: Annotated[int, Field(ge=0)] | None = None
    """Must be the same as `n`: the choices are not generated and compared here."""

    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Number of most likely tokens whose log probabilities are returned for each token besides its
    own; with `echo` those of the prompt too."""

    @model_validator(mode="after")
    def _check_completion(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise FieldError("max_tokens", "0 is only allowed with echo=true", INVALID)
        if self.best_of not in (None, 0, self.n):
            message = f"got {self.best_of}, n is {self.n}; set n and choose yourself"
            raise FieldError("best_of", message, "unsupported_value")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """All prompts; each has `n` choices, which follow each other in the response."""
        return list_texts_or_ids(self.prompt)

    @property
    def num_choices(self) -> int:
        """Number of choices of the response, those of all prompts."""
        return self.n * len(self.prompts)


class CompletionLogprobs(BaseModel):
    """Log probabilities of a completion's tokens, in the legacy format."""

    tokens: list[str]
    """Texts of the tokens; that of a part of a character is `bytes:` and its bytes in hex."""

    token_logprobs: list[float | None]
    """Null for the first token of an echoed prompt."""

    top_logprobs: list[dict[str, float] | None]
    """The most likely tokens at each place, and the token itself."""

    text_offset: list[int]
    """Place of each token in the choice's text, in characters."""


class CompletionChoice(BaseModel):
    """One of the `n` choices of a completion, or its delta in a chunk."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None


class Completion(BaseModel):
    """Response to a completion request, or one chunk of it if streamed."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None
