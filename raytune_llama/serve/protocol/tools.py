"""Tools in OpenAI's chat requests, and calls of them in answers."""

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from raytune_llama.config.errors import UserError
from raytune_llama.serve.protocol.strict import StrictModel

MAX_TOOLS = 128
MAX_CALLS = 128
"""Of a message."""

MAX_SCHEMA_DEPTH = 32
"""Objects and lists within one another in a function's parameters."""

MAX_TOOLS_CHARACTERS = 100_000
"""Of all tools together, written as JSON."""

ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class Function(StrictModel):
    """What a model may call."""

    name: ToolName
    description: Annotated[str, Field(max_length=16_384)] | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of the arguments, an object's; null: there are none."""

    strict: bool | None = None
    """Accepted; the schema is always kept."""

    @model_validator(mode="after")
    def _check(self) -> "Function":
        kind = (self.parameters or {}).get("type", "object")
        if kind != "object":
            raise UserError(f"parameters: the type is {kind!r}, wanted 'object'")
        if _is_deeper(self.parameters, MAX_SCHEMA_DEPTH):
            raise UserError(f"parameters: deeper than {MAX_SCHEMA_DEPTH}")
        return self

    @property
    def schema_(self) -> dict[str, Any]:
        """The schema of the arguments."""
        if self.parameters is None:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        return {"type": "object", **self.parameters}


class Tool(StrictModel):
    """A tool; there are only functions."""

    type: Literal["function"]
    function: Function


class FunctionName(StrictModel):
    """Names a function."""

    name: ToolName


class NamedTool(StrictModel):
    """A tool that has to be called."""

    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedTool
"""Whether tools are called: never, as the model likes, at least one, or this one."""


class CalledFunction(StrictModel):
    """A function and its arguments."""

    name: ToolName
    arguments: str
    """An object in JSON; in an answer that was cut, its beginning."""


class ToolCall(StrictModel):
    """A call that the assistant has made."""

    id: Annotated[str, Field(min_length=1, max_length=256)]
    type: Literal["function"] = "function"
    function: CalledFunction


def is_absent(value: object) -> bool:
    """Whether a field is left out of what is sent, as OpenAI leaves it out."""
    return value is None


class FunctionDelta(BaseModel):
    """What a chunk adds to a call's function."""

    name: Annotated[str | None, Field(exclude_if=is_absent)] = None
    arguments: str = ""


class ToolCallDelta(BaseModel):
    """What a chunk adds to a call; its first chunk names it."""

    index: int
    id: Annotated[str | None, Field(exclude_if=is_absent)] = None
    type: Annotated[Literal["function"] | None, Field(exclude_if=is_absent)] = None
    function: FunctionDelta


def check_tools(
    tools: Sequence[Tool] | None, choice: ToolChoice | None, *, says_parallel: bool
) -> None:
    """Refuse tools that don't fit together.

    Raises:
        ValueError: two have one name, they are too large together, the tool that has to be called
            is none of them, or something is said of tools where there are none.
    """
    if tools is None:
        if choice is not None or says_parallel:
            name = "parallel_tool_calls" if choice is None else "tool_choice"
            raise UserError(f"{name}: only with tools")
        return
    names = Counter(tool.function.name for tool in tools)
    name, count = names.most_common(1)[0]
    if count > 1:
        raise UserError(f"tools: {name} is there {count} times")
    size = sum(len(tool.model_dump_json(exclude_unset=True)) for tool in tools)
    if size > MAX_TOOLS_CHARACTERS:
        raise UserError(f"tools: {size} characters, more than {MAX_TOOLS_CHARACTERS}")
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise UserError(f"tool_choice: {choice.function.name} is none of the tools")


def _is_deeper(value: object, limit: int) -> bool:
    """Whether objects and lists stand in one another more than `limit` times."""
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
