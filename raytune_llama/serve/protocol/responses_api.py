"""Requests of OpenAI's Responses API, and the chat requests that they become.

Responses are not stored, so a request holds its whole conversation. `fields.py` says which fields
are used, have no effect, are refused or ignored. `input_items` has the models of the conversation,
`response_events` those of responses.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PlainValidator, model_validator

from raytune_llama.serve.protocol.chat import (
    GUIDED_DECODING,
    MAX_TOKENS,
    OTHER_SERVERS,
    ChatRequest,
)
from raytune_llama.serve.protocol.fields import (
    INVALID,
    MISSING,
    UNSUPPORTED,
    FieldError,
    RequestModel,
    Unsupported,
)
from raytune_llama.serve.protocol.input_items import (
    FunctionCallItem,
    FunctionOutputItem,
    InputItem,
    InputItems,
    MessageItem,
    ReasoningItem,
    join_parts,
    refuse_field,
    shown,
)
from raytune_llama.serve.protocol.tools import MAX_TOOLS, Function, ToolName

MAX_METADATA = 16

LOGPROBS = "message.output_text.logprobs"
"""Value of `include` that requests the log probabilities of the text's tokens."""

_IGNORED_INCLUDES = frozenset({"reasoning.encrypted_content"})
_NOT_STORED = "responses are not stored here; send the whole conversation as input"
_CHAT_ONLY = "use /v1/chat/completions"


class FunctionTool(Function):
    """A function that the model may call."""

    no_effect: ClassVar[frozenset[str]] = frozenset({"allowed_callers", "output_schema"})
    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "defer_loading": Unsupported(),
        "async": Unsupported(),
    }

    type: Literal["function"]


def _read_tool(value: Any) -> FunctionTool:  # noqa: ANN401  # any JSON value
    kind = value.get("type", "function") if isinstance(value, dict) else "function"
    if kind != "function":
        advice = "this endpoint has no built-in tools; define a function, and call it yourself"
        refuse_field("type", kind, f"{shown(kind)} is not supported: {advice}")
    return FunctionTool.model_validate(value)


class FunctionChoice(RequestModel):
    """Name of one of the functions."""

    type: Literal["function"]
    name: ToolName


class AllowedChoice(RequestModel):
    """Tool choice of some of the functions."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    """Whether one of them has to be called."""

    tools: Annotated[list[FunctionChoice], Field(min_length=1, max_length=MAX_TOOLS)]


Mode = Literal["none", "auto", "required"]
ResponsesToolChoice = Mode | FunctionChoice | AllowedChoice
"""Whether functions are called: never, if the model decides so, at least one, this one, or some."""


def _read_choice(value: Any) -> ResponsesToolChoice:  # noqa: ANN401  # any JSON value
    if value in ("none", "auto", "required"):
        return value
    if not isinstance(value, dict):
        text = f"got {shown(value)}, expected none, auto, required or an object"
        raise FieldError("", text, INVALID)
    kind = value.get("type")
    if kind == "allowed_tools":
        return AllowedChoice.model_validate(value)
    if kind != "function":
        refuse_field("type", kind, f"{shown(kind)} is not supported: choose a function")
    return FunctionChoice.model_validate(value)


class TextFormat(RequestModel):
    """Format of the text."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Annotated[str, Field(max_length=64)] | None = None
    description: Annotated[str, Field(max_length=4096)] | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None
    """Accepted; the schema is always enforced."""

    @model_validator(mode="after")
    def _check(self) -> "TextFormat":
        given = {"name": self.name, "schema": self.schema_}
        for name in given if self.type == "json_schema" else ():
            if given[name] is None:
                raise FieldError(name, "missing; required with type=json_schema", MISSING)
        return self


class TextOptions(RequestModel):
    """Options of the text."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "verbosity": Unsupported("ask for it in the instructions", neutral=("medium",)),
    }

    format: TextFormat = TextFormat()


class ReasoningOptions(RequestModel):
    """Options of models that reason before they answer."""

    no_effect: ClassVar[frozenset[str]] = frozenset({"summary", "generate_summary", "context"})
    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "mode": Unsupported(neutral=("standard",)),
    }

    effort: Annotated[str, Field(max_length=64)] | None = None
    """Passed to the chat template."""


def _check_include(value: Any) -> Any:  # noqa: ANN401  # any JSON value
    if isinstance(value, str) and value not in (LOGPROBS, *_IGNORED_INCLUDES):
        text = f"{shown(value)} is not supported; supported: {LOGPROBS}"
        raise FieldError("", text, UNSUPPORTED)
    return value


class ResponsesRequest(RequestModel):
    """Body of `POST /v1/responses`."""

    # `max_tool_calls` bounds the calls of built-in tools, of which there are none here.
    no_effect: ClassVar[frozenset[str]] = frozenset(
        {
            *("user", "safety_identifier", "service_tier", "stream_options", "max_tool_calls"),
            *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
            *("access_programs", "background_options", "image"),
        }
    )
    unsupported: ClassVar[Mapping[str, Unsupported]] = OTHER_SERVERS | {
        "previous_response_id": Unsupported(_NOT_STORED),
        "conversation": Unsupported(_NOT_STORED),
        "store": Unsupported("responses are not stored here; set store to false"),
        "background": Unsupported("the response comes with the request; set background to false"),
        "prompt": Unsupported(
            "prompts are not stored here; send the text as instructions or input"
        ),
        "truncation": Unsupported("shorten the input yourself", neutral=("disabled",)),
        "context_management": Unsupported("shorten the input yourself"),
        "moderation": Unsupported("send the text to a moderation endpoint"),
        # Fields of chat requests, which clients of that API send by mistake.
        "messages": Unsupported("use input"),
        "max_tokens": Unsupported("use max_output_tokens"),
        "max_completion_tokens": Unsupported("use max_output_tokens"),
        **dict.fromkeys(("response_format", *GUIDED_DECODING), Unsupported("use text.format")),
        "reasoning_effort": Unsupported("use reasoning.effort"),
        "logprobs": Unsupported(f"set include to ['{LOGPROBS}']"),
        "n": Unsupported("send several requests", neutral=(1,)),
        "seed": Unsupported(_CHAT_ONLY, is_zero_a_value=True),
        **dict.fromkeys(
            (
                *("stop", "logit_bias", "frequency_penalty", "presence_penalty"),
                *("min_p", "chat_template_kwargs"),
            ),
            Unsupported(_CHAT_ONLY),
        ),
        "top_k": Unsupported(_CHAT_ONLY, neutral=(-1,)),
        "repetition_penalty": Unsupported(_CHAT_ONLY, neutral=(1,)),
        **dict.fromkeys(
            (
                *("guided_json", "guided_regex", "guided_choice", "guided_grammar"),
                *("structured_outputs", "structural_tag"),
            ),
            Unsupported("use text.format with a JSON schema"),
        ),
    }

    model: Annotated[str, Field(min_length=1, max_length=512)]
    """Name of a model, or `model:adapter`."""

    input: InputItems
    """The conversation: a text of the user, or a list of items."""

    instructions: str | None = None
    """System message before the input."""

    max_output_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    """Maximum number of generated tokens; null: limited only by the context."""

    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    tools: Annotated[
        list[
            Annotated[FunctionTool, PlainValidator(_read_tool, json_schema_input_type=FunctionTool)]
        ],
        Field(max_length=MAX_TOOLS),
    ] = []
    tool_choice: Annotated[
        ResponsesToolChoice | None,
        PlainValidator(_read_choice, json_schema_input_type=ResponsesToolChoice | None),
    ] = None
    """Whether functions are called; null: `auto`."""

    parallel_tool_calls: bool = True
    """Whether a response may have several calls."""

    text: TextOptions = TextOptions()
    reasoning: ReasoningOptions = ReasoningOptions()
    include: Annotated[
        list[Annotated[str, BeforeValidator(_check_include)]], Field(max_length=16)
    ] = []
    """What else the response has: `message.output_text.logprobs`, the log probabilities of the
    text's tokens."""

    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    """Number of most likely tokens whose log probabilities are returned for each token."""

    stream: bool = False
    metadata: Annotated[
        dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
        Field(max_length=MAX_METADATA),
    ] = {}
    """Returned with the response."""

    def to_chat(self) -> ChatRequest:
        """Return the chat request that generates the response.

        Raises:
            ValidationError: it is invalid; `rename_places` translates its places.
        """
        wants_logprobs = LOGPROBS in self.include or self.top_logprobs > 0
        body = {
            "model": self.model,
            "messages": self._translate()[0],
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "tools": [_to_chat_tool(tool) for tool in self.tools] or None,
            "tool_choice": _to_chat_choice(self.tool_choice),
            "parallel_tool_calls": self.parallel_tool_calls if self.tools else None,
            "response_format": _to_response_format(self.text.format),
            "reasoning_effort": self.reasoning.effort,
            "logprobs": wants_logprobs or None,
            "top_logprobs": self.top_logprobs or None,
            "stream": self.stream,
        }
        given = {name: value for name, value in body.items() if value is not None}
        return ChatRequest.model_validate(given)

    def rename_places(self, text: str) -> str:
        """Return a text in which places of the chat request are those of this request.

        For example, `messages.3.tool_calls.0.function.name` becomes `input.4.name`.
        """
        places = _RENAMED | self._translate()[1]

        def rename(match: re.Match[str]) -> str:
            names = match[0].split(".")
            for number in range(len(names), 0, -1):
                place = places.get(".".join(names[:number]))
                if place is not None:
                    return ".".join([place, *names[number:]])
            return match[0]

        return _PLACE.sub(rename, text).replace(_TOOL_MESSAGE, "a function_call_output item")

    def _translate(self) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """Return the chat messages, and the places of this request by those of the chat request."""
        messages: list[dict[str, Any]] = []
        places = {
            f"tools.{number}.function": f"tools.{number}" for number in range(len(self.tools))
        }
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
            places["messages.0"] = "instructions"
        for number, item in enumerate(self.input):
            _add_item(item, f"input.{number}", messages, places)
        return messages, places


_RENAMED = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "response_format.json_schema": "text.format",
    "reasoning_effort": "reasoning.effort",
}
"""Places of chat requests that have another name here."""

_TOOL_MESSAGE = "a message with role tool"
"""What errors of chat requests call the output of a function call."""

_ROOTS = "|".join(["tools", *(name for name in _RENAMED if "." not in name)])

# A single word is a place where its problem follows, or where it is alone.
_PLACE = re.compile(rf"\b(?:{_ROOTS})(?:(?:\.\w+)+|(?=: |$))")


def _add_item(
    item: InputItem, place: str, messages: list[dict[str, Any]], places: dict[str, str]
) -> None:
    """Add an item to the chat messages; a call belongs to the assistant's message before it."""
    here = f"messages.{len(messages)}"
    match item:
        case MessageItem():
            messages.append({"role": item.role, "content": join_parts(item.content)})
            places[here] = place
        case FunctionOutputItem():
            content = join_parts(item.output)
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": content})
            places |= {
                here: place,
                f"{here}.tool_call_id": f"{place}.call_id",
                f"{here}.content": f"{place}.output",
            }
        case FunctionCallItem():
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant"})
                places[here] = place
            here = f"messages.{len(messages) - 1}.tool_calls"
            calls = messages[-1].setdefault("tool_calls", [])
            places.setdefault(here, place)
            here = f"{here}.{len(calls)}"
            places |= {here: place, f"{here}.function": place, f"{here}.id": f"{place}.call_id"}
            function = {"name": item.name, "arguments": item.arguments}
            calls.append({"id": item.call_id, "type": "function", "function": function})
        case ReasoningItem():
            pass


def _to_chat_tool(tool: FunctionTool) -> dict[str, Any]:
    """Return a tool with the fields that were sent: the prompt shows them as they are."""
    function = tool.model_dump(include={*Function.model_fields}, exclude_unset=True)
    return {"type": "function", "function": function}


def _to_chat_choice(choice: ResponsesToolChoice | None) -> object:
    match choice:
        case FunctionChoice():
            return _name_function(choice)
        case AllowedChoice():
            allowed = {"mode": choice.mode, "tools": [_name_function(one) for one in choice.tools]}
            return {"type": "allowed_tools", "allowed_tools": allowed}
        case _:
            return choice


def _name_function(choice: FunctionChoice) -> dict[str, Any]:
    return {"type": "function", "function": {"name": choice.name}}


def _to_response_format(form: TextFormat) -> dict[str, Any] | None:
    if form.type != "json_schema":
        return None if form.type == "text" else {"type": form.type}
    fields = form.model_dump(by_alias=True, include={*TextFormat.model_fields} - {"type"})
    return {"type": form.type, "json_schema": fields}
