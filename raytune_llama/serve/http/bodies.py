"""Strict JSON request bodies: too deep, ambiguous or invalid JSON is rejected before it is used."""

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

# Linear time on any input: an unterminated string extends to the end of the text.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_MAX_SHOWN_CHARACTERS = 64


def read_json(body: bytes, max_depth: int) -> Any:  # noqa: ANN401  # any JSON value
    """Parse a JSON body.

    Stricter than Python's parser, as RFC 8259 recommends: only UTF-8, no NaN or Infinity, no
    number beyond float64, no duplicate keys in an object, no lone surrogates.

    Args:
        body: JSON text, encoded.
        max_depth: maximum nesting of objects and arrays.

    Raises:
        ValueError: the body is not valid JSON under these rules.
    """
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"Invalid request body: not UTF-8 (invalid byte at position {error.start})"
        raise UserError(message) from error
    depth = measure_depth(body)
    if depth > max_depth:
        raise UserError(
            f"Invalid request body: JSON nested {depth} levels deep, maximum {max_depth}"
        )
    try:
        value = json.loads(
            text,
            parse_constant=_reject_constant,
            parse_float=_parse_finite_float,
            object_pairs_hook=_reject_duplicate_keys,
        )
    except json.JSONDecodeError as error:
        raise UserError(f"Could not parse the JSON body of the request: {error}") from error
    if _SURROGATE.search(body):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise UserError("Invalid request body: lone surrogate in a string") from error
    return value


def measure_depth(body: bytes) -> int:
    """Return the maximum nesting depth of a JSON text, ignoring brackets inside strings."""
    brackets = np.frombuffer(_STRING.sub(b"", body).translate(None, _NO_BRACKETS), dtype=np.uint8)
    is_open = (brackets == ord("[")) | (brackets == ord("{"))
    depths = np.where(is_open, 1, -1).cumsum(dtype=np.int32)
    return int(depths.max(initial=0))


def _reject_constant(name: str) -> NoReturn:
    raise UserError(f"Invalid request body: {name} is not valid JSON")


def _parse_finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        shown = text[:_MAX_SHOWN_CHARACTERS]
        raise UserError(f"Invalid request body: number {shown} is too large for float64")
    return value


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in found if names.count(name) > 1)
        shown = duplicate[:_MAX_SHOWN_CHARACTERS]
        raise UserError(f"Invalid request body: duplicate key {shown!r} in an object")
    return found


def build_route_class(max_depth: int) -> type[APIRoute]:
    """Return a route class whose request bodies are parsed by `read_json`.

    Args:
        max_depth: maximum nesting of objects and arrays.
    """

    class StrictRequest(Request):
        """A request whose body is parsed by `read_json`."""

        async def json(self) -> Any:  # noqa: ANN401  # like Starlette's
            try:
                return read_json(await self.body(), max_depth)
            except ValueError as error:
                raise build_api_error(400, str(error)) from error

    class StrictRoute(APIRoute):
        """A route that requires a JSON body in UTF-8."""

        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handle_strictly(request: Request) -> Response:
                if request.method == "POST":
                    _check_type(request)
                return await handle(StrictRequest(request.scope, request.receive))

            return handle_strictly

    return StrictRoute


def _check_type(request: Request) -> None:
    """Reject a Content-Type other than JSON in UTF-8.

    Raises:
        ApiError: status 400.
    """
    got = request.headers.get("content-type", "")
    kind, _, rest = got.lower().partition(";")
    charset = rest.partition("charset=")[2].strip(' "')
    if kind.strip() != "application/json" or charset not in {"", "utf-8", "utf8"}:
        raise _unsupported_content_type(got)


def _unsupported_content_type(got: str) -> ApiError:
    shown = repr(got[:_MAX_SHOWN_CHARACTERS]) if got else "none"
    message = f"Invalid Content-Type header ({shown}), expected application/json in UTF-8"
    return build_api_error(400, message, code="unsupported_content_type")
