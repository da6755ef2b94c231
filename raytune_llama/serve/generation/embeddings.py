"""From a request to the embeddings of its texts. Knows tokens, not HTTP."""

import asyncio
from typing import cast

from raytune_llama.serve.engine.protocol import InferenceEngine, Vectors
from raytune_llama.serve.errors import InvalidRequestError
from raytune_llama.serve.generation.model import ServedModel
from raytune_llama.serve.generation.output import Stream
from raytune_llama.serve.protocol.embeddings import MAX_INPUT_TOKENS, EmbeddingRequest


class EmbeddingService:
    """Tokenizes embedding requests, and has the engine compute the embeddings."""

    def __init__(self, served: ServedModel, engine: InferenceEngine) -> None:
        self._served, self._engine = served, engine

    def tokenize(self, request: EmbeddingRequest) -> list[tuple[int, ...]]:
        """Return the token ids of a request's texts, tokenized as prompts of completions are.

        Raises:
            InvalidRequestError: a text does not fit the context, an id is outside the vocabulary,
                there are too many tokens, or the dimensions differ from the model's.
        """
        served = self._served
        size = served.model.config.get_text_config().hidden_size
        if request.dimensions not in {None, size}:
            raise InvalidRequestError(
                f"dimensions: got {request.dimensions}, but embeddings of {served.name} have "
                f"{size} dimensions and can't be shortened; omit the field",
                "dimensions",
            )
        texts: list[tuple[int, ...]] = []
        listed, is_list = _listed(request)
        written = [text for text in listed if isinstance(text, str)]
        for number, text in enumerate(written):
            served.check_size([text], f"input.{number}" if is_list else "input")
        encoded = iter(served.encode_texts(written) if written else [])
        for number, text in enumerate(listed):
            ids = next(encoded) if isinstance(text, str) else text
            texts.append(self._checked(ids, f"input.{number}" if is_list else "input"))
        total = sum(map(len, texts))
        if total > MAX_INPUT_TOKENS:
            raise InvalidRequestError(
                f"input: the texts have {total} tokens in total, wanted at most "
                f"{MAX_INPUT_TOKENS}; split them into several requests",
                "input",
            )
        return texts

    def _checked(self, ids: list[int], where: str) -> tuple[int, ...]:
        served = self._served
        if not 1 <= len(ids) <= served.max_context:
            raise InvalidRequestError(
                f"{where}: the text has {len(ids)} tokens, wanted 1 to {served.max_context}", where
            )
        beyond = next((token for token in ids if token >= len(served.tokenizer)), None)
        if beyond is not None:
            raise InvalidRequestError(
                f"{where}: token id {beyond} is outside the vocabulary of {served.name}", where
            )
        return tuple(ids)

    async def respond(self, request: EmbeddingRequest) -> Stream[Vectors]:
        """Return the stream of the embeddings of a request's texts, some at a time, in order.

        The first ones raise BusyError if too many requests are waiting; any raise EngineError if
        the engine has failed.

        Raises:
            InvalidRequestError: the request can't be answered.
        """
        name = request.model
        if name.partition(":")[2]:
            raise InvalidRequestError(
                f"model: got {name}, but embeddings are computed by the base model only; use "
                f"{name.partition(':')[0]}",
                "model",
            )
        # In a thread, so that other streams continue: thousands of texts take seconds.
        texts = await asyncio.to_thread(self.tokenize, request)
        return Stream(sum(map(len, texts)), self._engine.embed(texts))


def _listed(request: EmbeddingRequest) -> tuple[list[str] | list[list[int]], bool]:
    """Return a request's texts or token ids, and whether they came in a list."""
    match request.input:
        case str() as text:
            return [text], False
        case [int(), *_] as ids:
            return cast("list[list[int]]", [ids]), False
        case listed:
            return cast("list[str] | list[list[int]]", listed), True
