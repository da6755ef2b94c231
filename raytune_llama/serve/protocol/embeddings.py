"""OpenAI's requests for vectors of texts, and the answers."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from raytune_llama.config.errors import UserError
from raytune_llama.serve.protocol.strict import StrictModel

MAX_INPUTS = 2048
MAX_INPUT_TOKENS = 300_000
"""Of a request, all its texts together."""

InputTokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]


def _check_input(value: Any) -> Any:  # noqa: ANN401  # any JSON value
    """Refuse what is no input; a union's own errors would name all its forms, and no index."""
    if isinstance(value, str):
        texts: list[Any] = [value]
    elif not isinstance(value, list) or not value:
        raise UserError("wanted a text, token ids, or a list of either, not empty")
    else:
        texts = [value] if _is_id(value[0]) else value
    if len(texts) > MAX_INPUTS:
        raise UserError(f"got {len(texts)} texts, wanted at most {MAX_INPUTS}")
    is_text = isinstance(texts[0], str)
    for number, text in enumerate(texts):
        where = f"input.{number}" if texts is value else "input"
        if is_text != isinstance(text, str) or not isinstance(text, str | list):
            raise UserError(f"{where}: wanted all texts, or all lists of token ids")
        if not text:
            raise UserError(f"{where}: is empty")
        wrong = [place for place, token in enumerate(text) if not (is_text or _is_id(token))]
        if wrong:
            raise UserError(f"{where}.{wrong[0]}: wanted a token id, a whole number from 0 on")
    return value


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


class EmbeddingRequest(StrictModel):
    """`POST /v1/embeddings`."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    """Name of a model."""

    input: Annotated[
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS)]
        | InputTokenIds
        | Annotated[list[InputTokenIds], Field(min_length=1, max_length=MAX_INPUTS)],
        BeforeValidator(_check_input),
    ]
    """A text, texts, a text's token ids, or those of texts."""

    encoding_format: Literal["float", "base64"] = "float"
    """base64: of the numbers in single precision, the lowest byte first."""

    dimensions: Annotated[int, Field(ge=1)] | None = None
    """Only the model's own number: its vectors can't be cut."""

    user: Annotated[str, Field(max_length=512)] | None = None


class Embedding(BaseModel):
    """The vector of a text."""

    object: Literal["embedding"] = "embedding"
    index: int
    """The text's place in the request."""

    embedding: list[float] | str
    """Of length 1, in the form that was asked for."""


class EmbeddingUsage(BaseModel):
    """Counts of tokens."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    """Answer to a request for vectors."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
