"""OpenAI's requests and answers, as far as they are served, every number bounded.

Fields that OpenAI has and that change nothing here are refused rather than ignored, but for those
that clients always send (`user`, `metadata`, `store`). No value is converted: "3" is no number.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from raytune_llama.config.errors import UserError
from raytune_llama.serve.protocol.strict import StrictModel
from raytune_llama.serve.protocol.tools import (
    MAX_CALLS,
    MAX_TOOLS,
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
"""A bound on the number alone; the model's context bounds what is generated."""

ANY_OBJECT = {"type": "object"}
"""Schema of `response_format: {"type": "json_object"}`."""

Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class GenerationRequest(StrictModel):
    """What every kind of generation may be asked for."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    """Name of a model, or `model:adapter`."""

    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    """New tokens, at most; null: what the context has room for."""

    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Not OpenAI's; vLLM and others have it."""

    repetition_penalty: Annotated[float, Field(ge=0.01, le=10, allow_inf_nan=False)] | None = None
    """Not OpenAI's; vLLM and others have it."""

    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    """Answers, each drawn on its own."""

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
            raise UserError("stream_options: only with stream=true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class StreamOptions(StrictModel):
    """How a stream is told."""

    include_usage: bool = False
    """Send a last chunk with the counts."""


class TextPart(StrictModel):
    """A part of a message's content; pictures and sound are not served."""

    type: Literal["text"]
    text: str


class Message(StrictModel):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=256)] | None = None
    message: str | None = None
    """The older name of `content` in the servers of the Chinese-LLaMA scripts."""

    name: Annotated[str, Field(max_length=64)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(min_length=1, max_length=MAX_CALLS)] | None = None
    """An assistant's."""

    tool_call_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """Of the call that a tool's message is the result of."""

    # Clients send answers back as they were; what is not served is null or empty in these.
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _check(self) -> "Message":
        num_texts = (self.content is not None) + (self.message is not None)
        if num_texts > 1 or (num_texts == 0 and self.tool_calls is None):
            raise UserError("content: got neither or both of content and message, wanted one")
        if self.tool_calls is not None and self.role != "assistant":
            raise UserError("tool_calls: only in an assistant's message")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise UserError("tool_call_id: goes with role=tool, and with it alone")
        return self

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content if self.content is not None else self.message or ""


class JsonSchema(StrictModel):
    """A form that an answer keeps."""

    name: Annotated[str, Field(max_length=64)]
    description: Annotated[str, Field(max_length=4096)] | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None
    """Accepted; the schema is always kept."""


class ResponseFormat(StrictModel):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise UserError("json_schema: goes with type=json_schema, and with it alone")
        return self

    @property
    def kept(self) -> dict[str, Any] | None:
        """The schema that an answer keeps; None: any text is one."""
        if self.type == "text":
            return None
        return self.json_schema.schema_ if self.json_schema else ANY_OBJECT


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    """OpenAI's newer name of `max_tokens`."""

    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    """null: auto where there are tools."""

    parallel_tool_calls: bool | None = None
    """Whether an answer may have several calls; null: it may."""

    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise UserError("top_logprobs: only with logprobs=true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise UserError("max_tokens: only one of max_tokens and max_completion_tokens")
        says_parallel = self.parallel_tool_calls is not None
        check_tools(self.tools, self.tool_choice, says_parallel=says_parallel)
        return self

    @property
    def shown_tools(self) -> list[Tool]:
        """The tools that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def must_call(self) -> bool:
        """Whether an answer is calls of tools alone."""
        return self.tool_choice not in (None, "none", "auto")


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    prompt: str | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    """A text, or token ids."""

    echo: bool = False
    """Begin the answer with the prompt."""

    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None


class Usage(BaseModel):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


FinishReason = Literal["stop", "length", "tool_calls"]


class TokenLogprob(BaseModel):
    """A token and how likely it was."""

    token: str
    logprob: float
    bytes: list[int] | None


class ContentLogprob(TokenLogprob):
    """A token of an answer, and the likeliest in its place."""

    top_logprobs: list[TokenLogprob]


class ChoiceLogprobs(BaseModel):
    """The tokens of an answer."""

    content: list[ContentLogprob]
    refusal: None = None


class AnswerMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    """null: only calls."""

    refusal: None = None
    tool_calls: Annotated[list[ToolCall] | None, Field(exclude_if=is_absent)] = None


class ChatChoice(BaseModel):
    """One of `n` answers."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """Answer to a chat request."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None = None


class Delta(BaseModel):
    """What a chunk adds."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: Annotated[list[ToolCallDelta] | None, Field(exclude_if=is_absent)] = None


class ChunkChoice(BaseModel):
    """What a chunk adds to one of `n` answers."""

    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    """A part of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None


class CompletionLogprobs(BaseModel):
    """The tokens of a completion, in the older form."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One of `n` completions, or what a chunk adds to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None


class Completion(BaseModel):
    """Answer to a completion request, or a part of it where it is streamed."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "raytune_llama"


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorBody(BaseModel):
    """What is wrong, in OpenAI's form."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """Answer to a request that was refused or has failed."""

    error: ErrorBody
