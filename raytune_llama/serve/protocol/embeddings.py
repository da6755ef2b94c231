"""OpenAI's embedding requests and responses."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field

from raytune_llama.serve.protocol.fields import (
    INVALID,
    FieldError,
    RequestModel,
    Unsupported,
    check_texts_or_ids,
    list_texts_or_ids,
)

MAX_INPUTS = 2048
MAX_INPUT_TOKENS = 300_000
"""Maximum number of tokens of a request, summed over its inputs."""

InputTokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]


def _check_input(value: Any) -> Any:  # noqa: ANN401  # any JSON value
    check_texts_or_ids(value, MAX_INPUTS)
    texts = list_texts_or_ids(value)
    for number, text in enumerate(texts):
        if not text:
            where = str(number) if texts is value else ""
            raise FieldError(where, "must not be empty", INVALID)
    return value


class EmbeddingRequest(RequestModel):
    """Body of `POST /v1/embeddings`."""

    no_effect: ClassVar[frozenset[str]] = frozenset({"user"})
    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        # Documented by vLLM and others.
        "truncate_prompt_tokens": Unsupported("shorten the text"),
        "add_special_tokens": Unsupported("send token IDs", neutral=(True,)),
        "input_type": Unsupported("write it into the text"),
    }

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
