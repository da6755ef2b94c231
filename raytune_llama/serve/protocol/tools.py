"""Tools in OpenAI's chat requests, and tool calls in responses."""

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from raytune_llama.chat.tools import TOOL_NAME
from raytune_llama.serve.protocol.fields import INVALID, FieldError, RequestModel

MAX_TOOLS = 128
MAX_CALLS = 128
"""Maximum number of tool calls per message."""

MAX_SCHEMA_DEPTH = 32
"""Maximum nesting of objects and arrays in a function's parameters."""

MAX_TOOLS_CHARACTERS = 100_000
"""Maximum number of characters of all tools together, as JSON."""

ToolName = Annotated[str, Field(pattern=f"^{TOOL_NAME}$")]


class Function(RequestModel):
    """A function that the model may call."""

    name: ToolName
    description: Annotated[str, Field(max_length=16_384)] | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of the arguments, of type object; null: no arguments."""

    strict: bool | None = None
    """Accepted; the schema is always enforced."""

    @model_validator(mode="after")
    def _check(self) -> "Function":
        kind = (self.parameters or {}).get("type", "object")
        if kind != "object":
            raise FieldError("parameters", f"got type {kind!r}, expected 'object'", INVALID)
        if _is_deeper(self.parameters, MAX_SCHEMA_DEPTH):
            text = f"nested more than {MAX_SCHEMA_DEPTH} levels deep"
            raise FieldError("parameters", text, INVALID)
        return self

    @property
    def schema_(self) -> dict[str, Any]:
        """JSON schema of the arguments."""
        if self.parameters is None:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        return {"type": "object", **self.parameters}


class Tool(RequestModel):
    """A tool; only functions are supported."""

    type: Literal["function"]
    function: Function


class FunctionName(RequestModel):
    """Name of a function."""

    name: ToolName


class NamedTool(RequestModel):
    """Tool choice of one function, which has to be called."""

    type: Literal["function"]
    function: FunctionName


class ToolSubset(RequestModel):
    """Some of the tools, and whether one of them has to be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedTools(RequestModel):
    """Tool choice of some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: ToolSubset


ToolChoice = (
    Literal["none", "auto", "required"]
    | Annotated[NamedTool | AllowedTools, Field(discriminator="type")]
)
"""Whether tools are called: never, if the model decides so, at least one, this one, or some."""


class CalledFunction(RequestModel):
    """Function of a tool call and its arguments."""

    name: ToolName
    arguments: str
    """JSON object; truncated if the response reached its token limit."""


class ToolCall(RequestModel):
    """Tool call that the assistant has made."""

    id: Annotated[str, Field(min_length=1, max_length=256)]
    type: Literal["function"] = "function"
    function: CalledFunction


is_absent: Callable[[object], bool] = partial(operator.is_, None)
"""Whether a field is omitted from the response, as in OpenAI's API: if it is None."""


class FunctionDelta(BaseModel):
    """Delta of a tool call's function."""

    name: Annotated[str | None, Field(exclude_if=is_absent)] = None
    arguments: str = ""


class ToolCallDelta(BaseModel):
    """Delta of a tool call; its first chunk has the ID and the function's name."""

    index: int
    id: Annotated[str | None, Field(exclude_if=is_absent)] = None
    type: Annotated[Literal["function"] | None, Field(exclude_if=is_absent)] = None
    function: FunctionDelta


def check_tools(tools: Sequence[Tool], choice: ToolChoice | None) -> None:
    """Reject inconsistent tool fields.

    Raises:
        FieldError: two tools have the same name, all together are too large, or a tool must be
            called that is not one of them.
    """
    names = Counter(tool.function.name for tool in tools)
    for name, count in names.most_common(1):
        if count > 1:
            text = f"got {count} functions named {name}, names must be unique"
            raise FieldError("tools", text, INVALID)
    size = sum(len(tool.model_dump_json(exclude_unset=True)) for tool in tools)
    if size > MAX_TOOLS_CHARACTERS:
        text = f"got {size} characters, expected at most {MAX_TOOLS_CHARACTERS}"
        raise FieldError("tools", text, INVALID)
    if choice == "required" and not tools:
        raise FieldError("tool_choice", "required, but there are no tools", INVALID)
    chosen: list[str] = []
    if isinstance(choice, NamedTool):
        chosen = [choice.function.name]
    elif isinstance(choice, AllowedTools):
        chosen = [tool.function.name for tool in choice.allowed_tools.tools]
    for name in chosen:
        if name not in names:
            raise FieldError("tool_choice", f"function {name} not found in tools", INVALID)


def _is_deeper(value: object, limit: int) -> bool:
    """Whether objects and arrays are nested more than `limit` levels deep."""
    level: list[object] = [value]
    for _ in range(limit + 1):
        inner: list[object] = []
        for one in level:
            if isinstance(one, dict):
                inner += one.values()
            elif isinstance(one, list):
                inner += one
        level = inner
    return bool(level)
