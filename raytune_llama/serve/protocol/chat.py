"""OpenAI's chat requests and responses, and what all requests for text share; numbers are bounded.

`fields.py` says which fields are used, have no effect, are refused or ignored.
"""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, model_validator

from raytune_llama.serve.protocol.fields import (
    INVALID,
    MISSING,
    FieldError,
    RequestModel,
    Unsupported,
)
from raytune_llama.serve.protocol.tools import (
    MAX_CALLS,
    MAX_TOOLS,
    AllowedTools,
    NamedTool,
    Tool,
    ToolCall,
    ToolCallDelta,
    ToolChoice,
    check_tools,
    is_absent,
)

MAX_CHOICES = 16
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_BIASED_TOKENS = 1024
MAX_MESSAGES = 4096
MAX_TOKENS = 1_000_000
"""Bound on the number itself; the model's context bounds the generated tokens."""

ANY_OBJECT = {"type": "object"}
"""Schema of `response_format: {"type": "json_object"}`."""

Stop = Annotated[str, Field(max_length=MAX_STOP_CHARACTERS)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
TokenIdText = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
"""Token ID as the key of a JSON object."""

GUIDED_DECODING = (
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar"),
    *("structured_outputs", "structural_tag"),
)
"""Fields of other servers that restrict what the response may be."""

OTHER_SERVERS = {
    # Documented by vLLM or Hugging Face, and sent by clients of theirs.
    **dict.fromkeys(
        (
            *("allowed_token_ids", "bad_words", "stop_token_ids", "min_tokens", "ignore_eos"),
            *("use_beam_search", "early_stopping", "logits_processors", "truncate_prompt_tokens"),
            *("include_stop_str_in_output", "prompt_logprobs", "vllm_xargs"),
        ),
        Unsupported(),
    ),
    **dict.fromkeys(
        GUIDED_DECODING,
        Unsupported("use response_format with a JSON schema"),
    ),
    "num_beams": Unsupported(neutral=(1,)),
    "length_penalty": Unsupported(neutral=(1,)),
    "typical_p": Unsupported(neutral=(1,)),
    "do_sample": Unsupported("set temperature to 0 for greedy decoding", neutral=(True,)),
    "skip_special_tokens": Unsupported(neutral=(True,)),
    "spaces_between_special_tokens": Unsupported(neutral=(True,)),
}
"""Fields of other servers that would change the response."""


class StreamOptions(RequestModel):
    """Options of a streamed response."""

    no_effect: ClassVar[frozenset[str]] = frozenset({"include_obfuscation"})

    include_usage: bool = False
    """Whether to send a last chunk with the token counts."""


class GenerationRequest(RequestModel):
    """Fields that chat and completion requests share."""

    no_effect: ClassVar[frozenset[str]] = frozenset(
        {
            *("user", "metadata", "store", "service_tier", "prediction", "safety_identifier"),
            *("prompt_cache_key", "prompt_cache_retention"),
        }
    )
    unsupported: ClassVar[Mapping[str, Unsupported]] = OTHER_SERVERS

    model: Annotated[str, Field(min_length=1, max_length=512)]
    """Name of a model, or `model:adapter`."""

    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    """Maximum number of generated tokens; null: limited only by the context."""

    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    frequency_penalty: Annotated[Finite, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[Finite, Field(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[
        dict[TokenIdText, Annotated[Finite, Field(ge=-100, le=100)]],
        Field(max_length=MAX_BIASED_TOKENS),
    ] = {}
    """Values added to the logits of tokens, by token ID."""

    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] | None = None
    """Number of most likely tokens to sample from; 0 or -1: all. It and the
    next two are not in OpenAI's API; vLLM and others support them."""

    min_p: Annotated[Finite, Field(ge=0, le=1)] = 0.0
    """Tokens less likely than this share of the most likely token's probability are not sampled."""

    repetition_penalty: Annotated[Finite, Field(ge=0.01, le=10)] | None = None

    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    """Number of choices, sampled independently."""

    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return tuple(filter(None, [self.stop] if isinstance(self.stop, str) else self.stop))

    @property
    def num_choices(self) -> int:
        """Number of choices of the response."""
        return self.n

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class ContentPart(RequestModel):
    """A part of a message's content; images, audio and files are not supported."""

    type: Literal["text", "refusal"]
    text: str = ""
    refusal: str = ""
    """Text of the assistant's refusal."""

    @model_validator(mode="after")
    def _check(self) -> "ContentPart":
        if self.type not in self.model_fields_set:
            raise FieldError(self.type, f"missing; a {self.type} part needs it", MISSING)
        return self


class Message(RequestModel):
    """A message of a conversation."""

    no_effect: ClassVar[frozenset[str]] = frozenset({"name"})
    # Clients send responses back unchanged, with empty values for what they do not have.
    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "audio": Unsupported("send the message's text"),
        "function_call": Unsupported("use tool_calls"),
        "annotations": Unsupported("put what the answer has to know into the content"),
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[ContentPart], Field(max_length=256)] | None = None
    message: str | None = None
    """Older name of `content` in the servers of the Chinese-LLaMA scripts."""

    refusal: str | None = None
    """The assistant's refusal to answer."""

    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS)] = []
    """Tool calls that the assistant has made."""

    tool_call_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """ID of the tool call that a tool message is the result of."""

    @model_validator(mode="after")
    def _check(self) -> "Message":
        if self.content is not None and self.message is not None:
            raise FieldError("content", "got both content and message, expected one", INVALID)
        if self.role != "assistant":
            if self.content is None and self.message is None:
                raise FieldError("content", "missing; this field is required", MISSING)
            if self.tool_calls or self.refusal:
                name = "tool_calls" if self.tool_calls else "refusal"
                raise FieldError(name, "only allowed with role=assistant", INVALID)
        if (self.tool_call_id is not None) != (self.role == "tool"):
            code = INVALID if self.tool_call_id else MISSING
            text = "required with role=tool, not allowed otherwise"
            raise FieldError("tool_call_id", text, code)
        return self

    @property
    def text(self) -> str:
        """Content as a single string."""
        if isinstance(self.content, list):
            return "".join(part.text or part.refusal for part in self.content)
        return self.content or self.message or self.refusal or ""


class JsonSchema(RequestModel):
    """JSON schema that the response follows."""

    name: Annotated[str, Field(max_length=64)]
    description: Annotated[str, Field(max_length=4096)] | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = ANY_OBJECT
    strict: bool | None = None
    """Accepted; the schema is always enforced."""


class ResponseFormat(RequestModel):
    """Format of the response."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            code = INVALID if self.json_schema else MISSING
            text = "required with type=json_schema, not allowed otherwise"
            raise FieldError("json_schema", text, code)
        return self

    @property
    def kept(self) -> dict[str, Any] | None:
        """Schema that the response follows; None: any text."""
        if self.type == "text":
            return None
        return self.json_schema.schema_ if self.json_schema else ANY_OBJECT


class ChatRequest(GenerationRequest):
    """Body of `POST /v1/chat/completions`."""

    # An assistant message at the end is always continued, which these two ask for.
    no_effect: ClassVar[frozenset[str]] = GenerationRequest.no_effect | {
        "continue_final_message",
        "add_generation_prompt",
    }
    unsupported: ClassVar[Mapping[str, Unsupported]] = OTHER_SERVERS | {
        "audio": Unsupported("this model generates text only"),
        "modalities": Unsupported("this model generates text only", neutral=(["text"],)),
        "verbosity": Unsupported("ask for it in a message", neutral=("medium",)),
        "web_search_options": Unsupported("this model can't search the web"),
        "functions": Unsupported("use tools"),
        "function_call": Unsupported("use tool_choice", neutral=("none", "auto")),
        "best_of": Unsupported("use n", neutral=(1,)),
        "echo": Unsupported("use /v1/completions"),
        "suffix": Unsupported(),
        "chat_template": Unsupported("set template in the endpoint's config"),
        "documents": Unsupported("put them into a message"),
    }

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    """OpenAI's newer name of `max_tokens`; set only one of them."""

    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] = []
    tool_choice: ToolChoice | None = None
    """Whether tools are called; null: `auto` if `tools` is given."""

    parallel_tool_calls: bool = True
    """Whether a response may have several tool calls."""

    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    chat_template_kwargs: dict[str, Any] = {}
    """Variables of the chat template, such as `enable_thinking`; not in OpenAI's API."""

    reasoning_effort: Annotated[str, Field(max_length=64)] | None = None
    """Variable `reasoning_effort` of the chat template; null or `none`: not set. Without effect on
    a model whose template does not read it: agents send it to all models."""

    @model_validator(mode="after")
    def _check_chat(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise FieldError("top_logprobs", "only allowed when logprobs=true", INVALID)
        if self.max_tokens == 0:
            raise FieldError("max_tokens", "got 0, expected at least 1", "integer_below_min_value")
        if self.max_completion_tokens not in (None, self.max_tokens) and self.max_tokens:
            message = "differs from max_completion_tokens; set only one of them"
            raise FieldError("max_tokens", message, INVALID)
        check_tools(self.tools, self.tool_choice)
        return self

    @property
    def shown_tools(self) -> list[Tool]:
        """Tools that the prompt describes to the model."""
        return [] if self.tool_choice == "none" else self.tools

    @property
    def callable_tools(self) -> list[Tool]:
        """Tools that the response may call."""
        match self.tool_choice:
            case NamedTool(function=function):
                names = {function.name}
            case AllowedTools(allowed_tools=allowed):
                names = {tool.function.name for tool in allowed.tools}
            case _:
                return self.shown_tools
        return [tool for tool in self.tools if tool.function.name in names]

    @property
    def may_be_text(self) -> bool:
        """Whether a response may be any text."""
        schema = self.response_format.kept if self.response_format else None
        return schema is None and not self.must_call

    @property
    def calls_one_tool(self) -> bool:
        """Whether a response may have one tool call only; so it is where a function is named."""
        return not self.parallel_tool_calls or isinstance(self.tool_choice, NamedTool)

    @property
    def must_call(self) -> bool:
        """Whether the response has to consist of tool calls only."""
        if isinstance(self.tool_choice, AllowedTools):
            return self.tool_choice.allowed_tools.mode == "required"
        return bool(self.tools) and self.tool_choice not in (None, "none", "auto")

    def template_options(self, variables: AbstractSet[str]) -> dict[str, Any]:
        """Return the variables of the chat template that the request sets.

        Args:
            variables: variables that the template reads.
        """
        effort = self.reasoning_effort
        if effort in (None, "none") or "reasoning_effort" not in variables:
            return self.chat_template_kwargs
        return {"reasoning_effort": effort, **self.chat_template_kwargs}


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
