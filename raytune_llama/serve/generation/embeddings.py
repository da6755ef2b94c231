"""From a request to the vectors of its texts; knows tokens, and no HTTP."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import cast

from raytune_llama.serve.engine.protocol import InferenceEngine, Vectors
from raytune_llama.serve.errors import InvalidRequestError
from raytune_llama.serve.generation.model import ServedModel
from raytune_llama.serve.protocol.embeddings import MAX_INPUT_TOKENS, EmbeddingRequest


class EmbeddingService:
    """Makes token ids of requests for vectors, and lets the engine make the vectors."""

    def __init__(self, served: ServedModel, engine: InferenceEngine) -> None:
        self._served, self._engine = served, engine

    def tokenize(self, request: EmbeddingRequest) -> list[tuple[int, ...]]:
        """Return the ids of a request's texts; a text is read as a prompt of a completion is.

        Raises:
            RequestError: a text does not fit the context, an id is none of the tokenizer's, there
                are too many tokens, or vectors of another size are asked for.
        """
        served = self._served
        size = served.model.config.get_text_config().hidden_size
        if request.dimensions not in {None, size}:
            raise InvalidRequestError(
                f"dimensions: got {request.dimensions}, but the vectors of {served.name} have "
                f"{size} numbers and can't be cut; leave the field out",
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
                f"input: the texts have {total} tokens together, wanted at most "
                f"{MAX_INPUT_TOKENS}; send them in several requests",
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
            raise InvalidRequestError(f"{where}: {beyond} is no token of {served.name}", where)
        return tuple(ids)

    async def respond(self, request: EmbeddingRequest) -> AsyncGenerator[int | Vectors, None]:
        """Yield a request's number of tokens, then its texts' vectors, some at a time, in order.

        A caller that ends the iteration ends the work.

        Raises:
            RequestError: the request can't be answered; before the first item.
            BusyError: as many requests wait as may.
            EngineError: the engine has failed.
        """
        name = request.model
        if name.partition(":")[2]:
            raise InvalidRequestError(
                f"model: got {name}, but vectors are made by the base alone: name "
                f"{name.partition(':')[0]}",
                "model",
            )
        # Thousands of texts take seconds: others' parts are told meanwhile.
        texts = await asyncio.to_thread(self.tokenize, request)
        yield sum(map(len, texts))
        async with aclosing(self._engine.embed(texts)) as made:
            async for vectors in made:
                yield vectors


def _listed(request: EmbeddingRequest) -> tuple[list[str] | list[list[int]], bool]:
    """Return a request's texts or their ids, and whether these stood in a list."""
    match request.input:
        case str() as text:
            return [text], False
        case [int(), *_] as ids:
            return cast("list[list[int]]", [ids]), False
        case listed:
            return cast("list[str] | list[list[int]]", listed), True
