"""JSON from strangers: what is deep, ambiguous or no JSON at all is refused before it is used."""

import json
import math
import re
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

import numpy as np
from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from raytune_llama.config.errors import UserError
from raytune_llama.serve.http.refusals import ApiError, build_api_error

# Linear in the text, whatever it is: a string that has no end runs to the end of the text.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_MAX_SHOWN_CHARACTERS = 64


def read_json(body: bytes, max_depth: int) -> Any:  # noqa: ANN401  # it is any JSON
    """Return what a JSON text says.

    Stricter than Python's parser, as RFC 8259 recommends: UTF-8 alone, no NaN or Infinity, no
    number beyond float64, no key twice in an object, no half of a surrogate pair.

    Args:
        body: the text.
        max_depth: of objects and lists within one another.

    Raises:
        ValueError: it is no such text.
    """
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"the body is not UTF-8: byte {error.start} can't be read") from error
    depth = measure_depth(body)
    if depth > max_depth:
        raise UserError(f"the body is {depth} objects and lists deep, more than {max_depth}")
    try:
        value = json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            object_pairs_hook=_without_doubles,
        )
    except json.JSONDecodeError as error:
        raise UserError(f"the body is no JSON: {error}") from error
    if _SURROGATE.search(body):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise UserError("the body has half of a surrogate pair") from error
    return value


def measure_depth(body: bytes) -> int:
    """Return how many brackets are open at a time in a JSON text, those in strings left out."""
    brackets = np.frombuffer(_STRING.sub(b"", body).translate(None, _NO_BRACKETS), dtype=np.uint8)
    is_open = (brackets == ord("[")) | (brackets == ord("{"))
    depths = np.where(is_open, 1, -1).cumsum(dtype=np.int32)
    return int(depths.max(initial=0))


def _refuse_constant(name: str) -> NoReturn:
    raise UserError(f"the body has {name}, which is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise UserError(f"the body has the number {text[:_MAX_SHOWN_CHARACTERS]}, too large")
    return value


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        doubled = next(name for name in found if names.count(name) > 1)
        raise UserError(f"the body has {doubled[:_MAX_SHOWN_CHARACTERS]!r} twice in an object")
    return found


def build_route_class(max_depth: int) -> type[APIRoute]:
    """Return the kind of route that reads bodies by `read_json`.

    Args:
        max_depth: of objects and lists within one another.
    """

    class StrictRequest(Request):
        """A request whose body is read by `read_json`."""

        async def json(self) -> Any:  # noqa: ANN401  # as Starlette's
            try:
                return read_json(await self.body(), max_depth)
            except ValueError as error:
                raise build_api_error(400, str(error)) from error

    class StrictRoute(APIRoute):
        """A route that asks for JSON in UTF-8."""

        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def strictly(request: Request) -> Response:
                if request.method == "POST":
                    _check_type(request)
                return await handle(StrictRequest(request.scope, request.receive))

            return strictly

    return StrictRoute


def _check_type(request: Request) -> None:
    """Refuse a body that says it is no JSON, or not in UTF-8.

    Raises:
        Refusal: it does.
    """
    got = request.headers.get("content-type", "")
    kind, _, rest = got.lower().partition(";")
    charset = rest.partition("charset=")[2].strip(' "')
    if kind.strip() != "application/json" or charset not in {"", "utf-8", "utf8"}:
        raise _no_json(got)


def _no_json(got: str) -> ApiError:
    shown = repr(got[:_MAX_SHOWN_CHARACTERS]) if got else "none"
    message = f"Content-Type: got {shown}, wanted application/json in UTF-8"
    return build_api_error(400, message, code="unsupported_content_type")
