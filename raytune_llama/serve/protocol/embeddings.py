"""OpenAI's embedding requests and responses."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from raytune_llama.config.errors import UserError
from raytune_llama.serve.protocol.tools import StrictModel

MAX_INPUTS = 2048
MAX_INPUT_TOKENS = 300_000
"""Maximum number of tokens of a request, summed over its inputs."""

InputTokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]


def _check_input(value: Any) -> Any:  # noqa: ANN401  # any JSON value
    """Reject invalid input; a union's own errors would list all its variants, and no index."""
    if isinstance(value, str):
        texts: list[Any] = [value]
    elif not isinstance(value, list) or not value:
        raise UserError("expected a string, a list of token IDs, or a non-empty list of either")
    else:
        texts = [value] if _is_id(value[0]) else value
    if len(texts) > MAX_INPUTS:
        raise UserError(f"got {len(texts)} inputs, expected at most {MAX_INPUTS}")
    is_text = isinstance(texts[0], str)
    for number, text in enumerate(texts):
        where = f"input.{number}" if texts is value else "input"
        if is_text != isinstance(text, str) or not isinstance(text, str | list):
            raise UserError(f"{where}: expected all strings or all lists of token IDs")
        if not text:
            raise UserError(f"{where}: must not be empty")
        wrong = [place for place, token in enumerate(text) if not (is_text or _is_id(token))]
        if wrong:
            raise UserError(f"{where}.{wrong[0]}: expected a token ID, a non-negative integer")
    return value


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


class EmbeddingRequest(StrictModel):
    """Body of `POST /v1/embeddings`."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    """Name of a model."""

    input: Annotated[
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS)]
        | InputTokenIds
        | Annotated[list[InputTokenIds], Field(min_length=1, max_length=MAX_INPUTS)],
        BeforeValidator(_check_input),
    ]
    """A string, a list of strings, a list of token IDs, or a list of such lists."""

    encoding_format: Literal["float", "base64"] = "float"
    """Encoding of the vectors; base64: of their little-endian float32 bytes."""

    dimensions: Annotated[int, Field(ge=1)] | None = None
    """Must be the model's own number of dimensions; its vectors can't be shortened."""

    user: Annotated[str, Field(max_length=512)] | None = None


class Embedding(BaseModel):
    """Embedding vector of one input."""

    object: Literal["embedding"] = "embedding"
    index: int
    """Index of the input in the request."""

    embedding: list[float] | str
    """Vector of norm 1, in the requested encoding."""


class EmbeddingUsage(BaseModel):
    """Token counts of a request."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    """Response to an embedding request."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
