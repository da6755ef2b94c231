"""Tools in OpenAI's chat requests, and tool calls in responses."""

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from raytune_llama.chat.tools import TOOL_NAME
from raytune_llama.config.errors import UserError

MAX_TOOLS = 128
MAX_CALLS = 128
"""Maximum number of tool calls per message."""

MAX_SCHEMA_DEPTH = 32
"""Maximum nesting of objects and arrays in a function's parameters."""

MAX_TOOLS_CHARACTERS = 100_000
"""Maximum number of characters of all tools together, as JSON."""

ToolName = Annotated[str, Field(pattern=f"^{TOOL_NAME}$")]


class StrictModel(BaseModel):
    """Base class of request models. Unknown fields are rejected, and "3" is not a number."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Function(StrictModel):
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
            raise UserError(f"parameters: got type {kind!r}, expected 'object'")
        if _is_deeper(self.parameters, MAX_SCHEMA_DEPTH):
            raise UserError(f"parameters: nested more than {MAX_SCHEMA_DEPTH} levels deep")
        return self

    @property
    def schema_(self) -> dict[str, Any]:
        """JSON schema of the arguments."""
        if self.parameters is None:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        return {"type": "object", **self.parameters}


class Tool(StrictModel):
    """A tool; only functions are supported."""

    type: Literal["function"]
    function: Function


class FunctionName(StrictModel):
    """Name of a function."""

    name: ToolName


class NamedTool(StrictModel):
    """Tool choice of one function, which has to be called."""

    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedTool
"""Whether tools are called: never, if the model decides so, at least one, or this one."""


class CalledFunction(StrictModel):
    """Function of a tool call and its arguments."""

    name: ToolName
    arguments: str
    """JSON object; truncated if the response reached its token limit."""


class ToolCall(StrictModel):
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


def check_tools(
    tools: Sequence[Tool] | None, choice: ToolChoice | None, *, says_parallel: bool
) -> None:
    """Reject inconsistent tool fields.

    Raises:
        ValueError: two tools have the same name, all together are too large, `choice` is not one of
            them, or `choice` or `parallel_tool_calls` is given without tools.
    """
    if tools is None:
        if choice is not None or says_parallel:
            name = "parallel_tool_calls" if choice is None else "tool_choice"
            raise UserError(f"{name}: only allowed when tools are specified")
        return
    names = Counter(tool.function.name for tool in tools)
    name, count = names.most_common(1)[0]
    if count > 1:
        raise UserError(f"tools: got {count} functions named {name}, names must be unique")
    size = sum(len(tool.model_dump_json(exclude_unset=True)) for tool in tools)
    if size > MAX_TOOLS_CHARACTERS:
        raise UserError(f"tools: got {size} characters, expected at most {MAX_TOOLS_CHARACTERS}")
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise UserError(f"tool_choice: function {choice.function.name} not found in tools")


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
