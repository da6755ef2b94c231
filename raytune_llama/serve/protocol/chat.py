"""OpenAI's chat and completion requests and responses, every number bounded.

Fields of OpenAI's API that have no effect here are rejected rather than ignored, except those that
clients always send (`user`, `metadata`, `store`). Values are not coerced: "3" is not a number.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from raytune_llama.config.errors import UserError
from raytune_llama.serve.protocol.tools import (
    MAX_CALLS,
    MAX_TOOLS,
    StrictModel,
    Tool,
    ToolCall,
    ToolCallDelta,
    ToolChoice,
    check_tools,
    is_absent,
)

MAX_CHOICES = 16
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256
MAX_MESSAGES = 4096
MAX_TOKENS = 1_000_000
"""Bound on the number itself; the model's context bounds the generated tokens."""

ANY_OBJECT = {"type": "object"}
"""Schema of `response_format: {"type": "json_object"}`."""

Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class GenerationRequest(StrictModel):
    """Fields that chat and completion requests share."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    """Name of a model, or `model:adapter`."""

    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    """Maximum number of generated tokens; null: limited only by the context."""

    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Not in OpenAI's API; vLLM and others support it."""

    repetition_penalty: Annotated[float, Field(ge=0.01, le=10, allow_inf_nan=False)] | None = None
    """Not in OpenAI's API; vLLM and others support it."""

    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    """Number of choices, sampled independently."""

    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool = False
    stream_options: "StreamOptions | None" = None
    user: Annotated[str, Field(max_length=512)] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    store: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise UserError("stream_options: only allowed when stream=true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class StreamOptions(StrictModel):
    """Options of a streamed response."""

    include_usage: bool = False
    """Whether to send a last chunk with the token counts."""


class TextPart(StrictModel):
    """A text part of a message's content; images and audio are not supported."""

    type: Literal["text"]
    text: str


class Message(StrictModel):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=256)] | None = None
    message: str | None = None
    """Older name of `content` in the servers of the Chinese-LLaMA scripts."""

    name: Annotated[str, Field(max_length=64)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(min_length=1, max_length=MAX_CALLS)] | None = None
    """Tool calls that the assistant has made."""

    tool_call_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """ID of the tool call that a tool message is the result of."""

    # Clients send responses back unchanged; unsupported fields must be null or empty.
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _check(self) -> "Message":
        num_texts = (self.content is not None) + (self.message is not None)
        if num_texts > 1 or (num_texts == 0 and self.tool_calls is None):
            raise UserError("content: got neither or both of content and message, expected one")
        if self.tool_calls is not None and self.role != "assistant":
            raise UserError("tool_calls: only allowed in messages with role=assistant")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise UserError("tool_call_id: required with role=tool, not allowed otherwise")
        return self

    @property
    def text(self) -> str:
        """Content as a single string."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content if self.content is not None else self.message or ""


class JsonSchema(StrictModel):
    """JSON schema that the response follows."""

    name: Annotated[str, Field(max_length=64)]
    description: Annotated[str, Field(max_length=4096)] | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None
    """Accepted; the schema is always enforced."""


class ResponseFormat(StrictModel):
    """Format of the response."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise UserError("json_schema: required with type=json_schema, not allowed otherwise")
        return self

    @property
    def kept(self) -> dict[str, Any] | None:
        """Schema that the response follows; None: any text."""
        if self.type == "text":
            return None
        return self.json_schema.schema_ if self.json_schema else ANY_OBJECT


class ChatRequest(GenerationRequest):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    """OpenAI's newer name of `max_tokens`; set only one of them."""

    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    """Whether tools are called; null: `auto` if `tools` is given."""

    parallel_tool_calls: bool | None = None
    """Whether a response may have several tool calls; null: true."""

    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise UserError("top_logprobs: only allowed when logprobs=true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            message = "max_tokens: not allowed together with max_completion_tokens"
            raise UserError(message)
        if (self.tools, self.tool_choice, self.parallel_tool_calls) != (None, None, None):
            says_parallel = self.parallel_tool_calls is not None
            check_tools(self.tools, self.tool_choice, says_parallel=says_parallel)
        return self

    @property
    def shown_tools(self) -> list[Tool]:
        """Tools that the prompt describes to the model."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def must_call(self) -> bool:
        """Whether the response has to consist of tool calls only."""
        return self.tool_choice not in (None, "none", "auto")


class CompletionRequest(GenerationRequest):
    """Body of `POST /v1/completions`."""

    prompt: str | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    """Prompt to complete: a string or token IDs."""

    echo: bool = False
    """Whether to begin each completion with the prompt."""

    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None


class Usage(BaseModel):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


FinishReason = Literal["stop", "length", "tool_calls"]


class TokenLogprob(BaseModel):
    """A token and its log probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class ContentLogprob(TokenLogprob):
    """A generated token and the most likely tokens at its position."""

    top_logprobs: list[TokenLogprob]


class ChoiceLogprobs(BaseModel):
    """Log probabilities of a choice's tokens."""

    content: list[ContentLogprob]
    refusal: None = None


class AnswerMessage(BaseModel):
    """Message generated by the model."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    """Text of the message; null if it has only tool calls."""

    refusal: None = None
    tool_calls: Annotated[list[ToolCall] | None, Field(exclude_if=is_absent)] = None


class ChatChoice(BaseModel):
    """One of the `n` choices of a chat completion."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """Response to a chat completion request."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None = None


class Delta(BaseModel):
    """Message fields that a chunk adds."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: Annotated[list[ToolCallDelta] | None, Field(exclude_if=is_absent)] = None


class ChunkChoice(BaseModel):
    """Delta of one of the `n` choices."""

    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    """Chunk of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None


class CompletionLogprobs(BaseModel):
    """Log probabilities of a completion's tokens, in the legacy format."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One of the `n` choices of a completion, or its delta in a chunk."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None


class Completion(BaseModel):
    """Response to a completion request, or one chunk of it if streamed."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None


class ModelCard(BaseModel):
    """A served model or adapter."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "raytune_llama"


class ModelList(BaseModel):
    """List of all served models and adapters."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorBody(BaseModel):
    """Error in OpenAI's format."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """Response to a request that was rejected or has failed."""

    error: ErrorBody
