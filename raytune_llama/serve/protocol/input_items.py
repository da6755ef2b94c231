"""Items of the Responses API's input: messages, function calls and their outputs."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NoReturn

from pydantic import BeforeValidator, Field, PlainValidator, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from raytune_llama.chat.conversations import describe_type
from raytune_llama.serve.protocol.chat import MAX_MESSAGES
from raytune_llama.serve.protocol.fields import (
    MISSING,
    UNSUPPORTED,
    FieldError,
    RequestModel,
    Unsupported,
)
from raytune_llama.serve.protocol.tools import ToolName

MAX_PARTS = 256

_PART_TYPES = ("input_text", "output_text", "text", "refusal")
_MAX_SHOWN_CHARACTERS = 64

CallId = Annotated[str, Field(min_length=1, max_length=256)]


def refuse_field(name: str, value: object, message: str) -> NoReturn:
    """Refuse a field of the object that is validated, at the field's own place.

    Args:
        name: name of the field.
        value: its value.
        message: what is wrong and what to do.

    Raises:
        ValidationError: always; pydantic puts the object's own place in front of the name.
    """
    context = {"error": FieldError("", message, UNSUPPORTED)}
    details = InitErrorDetails(type="value_error", loc=(name,), input=value, ctx=context)
    raise ValidationError.from_exception_data("request", [details])


def shown(value: object) -> str:
    """Return a value as error messages quote it."""
    return repr(value)[:_MAX_SHOWN_CHARACTERS]


def _check_list(value: Any) -> Any:  # noqa: ANN401  # any JSON value
    if not isinstance(value, list):
        text = f"got {describe_type(value)}, expected a string or a list"
        raise FieldError("", text, "invalid_type")
    return value


def _check_part_type(value: Any) -> Any:  # noqa: ANN401  # any JSON value
    if isinstance(value, str) and value not in _PART_TYPES:
        text = f"{shown(value)} is not supported: the model reads only text; send it as input_text"
        raise FieldError("", text, UNSUPPORTED)
    return value


class ContentPart(RequestModel):
    """A part of a message or of a function's output; images, audio and files are refused."""

    no_effect: ClassVar[frozenset[str]] = frozenset({"logprobs", "prompt_cache_breakpoint"})
    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "annotations": Unsupported("put what the model has to know into the text"),
    }

    type: Annotated[
        Literal["input_text", "output_text", "text", "refusal"], BeforeValidator(_check_part_type)
    ]
    text: str = ""
    refusal: str = ""
    """Text of the assistant's refusal."""

    @model_validator(mode="after")
    def _check(self) -> "ContentPart":
        name = "refusal" if self.type == "refusal" else "text"
        if name not in self.model_fields_set:
            raise FieldError(name, f"missing; a part of type {self.type} needs it", MISSING)
        return self


def _read_text(value: Any) -> Any:  # noqa: ANN401  # any JSON value
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    return _check_list(value)


Content = Annotated[
    list[ContentPart],
    Field(max_length=MAX_PARTS),
    BeforeValidator(_read_text, json_schema_input_type=str | list[ContentPart]),
]
"""A text, or a list of its parts."""


def join_parts(parts: Sequence[ContentPart]) -> str:
    """Return the text of all parts."""
    return "".join(part.text or part.refusal for part in parts)


class MessageItem(RequestModel):
    """A message of the conversation; its type may be omitted."""

    no_effect: ClassVar[frozenset[str]] = frozenset({"id", "status", "phase"})

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class FunctionCallItem(RequestModel):
    """A function call that the assistant has made."""

    no_effect: ClassVar[frozenset[str]] = frozenset({"id", "status", "caller"})
    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "namespace": Unsupported("send the function's name only"),
        "async": Unsupported(),
    }

    type: Literal["function_call"]
    call_id: CallId
    """ID that the call's output refers to."""

    name: ToolName
    arguments: str
    """JSON object."""


class FunctionOutputItem(RequestModel):
    """Output of a function call."""

    no_effect: ClassVar[frozenset[str]] = frozenset({"id", "status", "caller", "name", "namespace"})

    type: Literal["function_call_output"]
    call_id: CallId
    output: Content


class ReasoningItem(RequestModel):
    """Reasoning before an answer, as OpenAI's models return it: encrypted, or as a summary.

    Neither is for another model to read, so the item has no effect. Reasoning in plain text would
    be, but chat requests have no place for it: it is refused.
    """

    no_effect: ClassVar[frozenset[str]] = frozenset(
        {"id", "status", "summary", "encrypted_content"}
    )
    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "content": Unsupported("omit reasoning items: the model does not read them again"),
    }

    type: Literal["reasoning"]


InputItem = MessageItem | FunctionCallItem | FunctionOutputItem | ReasoningItem
"""One item of a conversation."""

_ITEMS: dict[str, type[InputItem]] = {
    "message": MessageItem,
    "function_call": FunctionCallItem,
    "function_call_output": FunctionOutputItem,
    "reasoning": ReasoningItem,
}


def _read_item(value: Any) -> InputItem:  # noqa: ANN401  # any JSON value
    """Return an item; a union's own errors would list all its variants, and no exact place."""
    if not isinstance(value, dict):
        return MessageItem.model_validate(value)
    kind = value.get("type")
    if kind is None:
        kind = "item_reference" if "id" in value and "role" not in value else "message"
    if kind == "item_reference":
        message = (
            f"{shown(kind)} is not supported: items are not stored here; send the whole "
            "conversation as input (with npm's `ai`, set store: false)"
        )
        refuse_field("type", kind, message)
    if not isinstance(kind, str) or kind not in _ITEMS:
        message = f"{shown(kind)} is not supported; supported types: {', '.join(_ITEMS)}"
        refuse_field("type", kind, message)
    return _ITEMS[kind].model_validate(value)


def _read_items(value: Any) -> Any:  # noqa: ANN401  # any JSON value
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    return _check_list(value)


InputItems = Annotated[
    list[Annotated[InputItem, PlainValidator(_read_item, json_schema_input_type=InputItem)]],
    Field(min_length=1, max_length=MAX_MESSAGES),
    BeforeValidator(_read_items, json_schema_input_type=str | list[InputItem]),
]
"""A conversation: a text of the user, or a list of items."""
