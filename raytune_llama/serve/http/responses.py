"""Builds OpenAI's responses and chunks from a model's output deltas."""

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel

from raytune_llama.chat.tools import ToolCallChunk
from raytune_llama.serve.generation.output import OutputDelta, OutputToken, token_text
from raytune_llama.serve.protocol.chat import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    ChoiceLogprobs,
    ChunkChoice,
    ContentLogprob,
    Delta,
    FinishReason,
    TokenLogprob,
    Usage,
)
from raytune_llama.serve.protocol.completions import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from raytune_llama.serve.protocol.tools import (
    CalledFunction,
    FunctionDelta,
    ToolCall,
    ToolCallDelta,
)


@dataclass
class ChoiceAccumulator:
    """One of a request's `n` choices, as generated so far."""

    text: str = ""
    deltas: list[OutputDelta] = field(default_factory=list)
    finish_reason: FinishReason = "stop"
    calls: list[ToolCall] = field(default_factory=list)

    def add(self, delta: OutputDelta) -> None:
        """Append a delta."""
        self.text += delta.text
        self.deltas.append(delta)
        self.finish_reason = delta.finish_reason or self.finish_reason
        for chunk in delta.calls:
            if chunk.id is not None and chunk.name is not None:
                function = CalledFunction(name=chunk.name, arguments="")
                self.calls.append(ToolCall(id=chunk.id, function=function))
            self.calls[chunk.index].function.arguments += chunk.arguments


@dataclass
class TokenCounts:
    """Number of prompt and completion tokens of a request."""

    prompt: int = 0
    completion: int = 0

    @property
    def usage(self) -> Usage:
        """Counts in OpenAI's format."""
        return Usage(
            prompt_tokens=self.prompt,
            completion_tokens=self.completion,
            total_tokens=self.prompt + self.completion,
        )


class ChatResponseBuilder:
    """Builds the responses of `/v1/chat/completions`."""

    def __init__(self, request: ChatRequest) -> None:
        self._model, self._wants_logprobs = request.model, request.logprobs
        # A message that has only tool calls has null content, not an empty string.
        self._begin = Delta(role="assistant", content=None if request.shown_tools else "")
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    def build_response(
        self, answers: Sequence[ChoiceAccumulator], counts: TokenCounts
    ) -> BaseModel:
        """Return the response to a request that is not streamed."""
        choices = [
            ChatChoice(
                index=index,
                message=AnswerMessage(
                    content=None if answer.calls and not answer.text else answer.text,
                    tool_calls=answer.calls or None,
                ),
                logprobs=self._logprobs(answer.deltas),
                finish_reason=answer.finish_reason,
            )
            for index, answer in enumerate(answers)
        ]
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=counts.usage,
        )

    def build_first_chunks(self, num_choices: int) -> Iterator[BaseModel]:
        """Yield the chunks that precede the first delta."""
        for index in range(num_choices):
            yield self._chunk(index, self._begin)

    def build_chunk(self, part: OutputDelta) -> BaseModel:
        """Return the chunk of a delta."""
        has_tokens = any(not token.is_end for token in part.tokens)
        has_text = part.text or (has_tokens and not part.calls)
        calls = [_call_delta(chunk) for chunk in part.calls]
        delta = Delta(content=part.text if has_text else None, tool_calls=calls or None)
        chunk = self._chunk(part.index, delta)
        chunk.choices[0].logprobs = self._logprobs([part])
        chunk.choices[0].finish_reason = part.finish_reason
        return chunk

    def build_usage_chunk(self, counts: TokenCounts) -> BaseModel:
        """Return the last chunk, with the token counts."""
        return self._chunk(None, Delta(), counts.usage)

    def _chunk(self, index: int | None, delta: Delta, usage: Usage | None = None) -> ChatChunk:
        choices = [] if index is None else [ChunkChoice(index=index, delta=delta)]
        return ChatChunk(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=usage
        )

    def _logprobs(self, parts: Sequence[OutputDelta]) -> ChoiceLogprobs | None:
        if not self._wants_logprobs:
            return None
        return ChoiceLogprobs(content=[one for part in parts for one in _content_logprobs(part)])


class CompletionResponseBuilder:
    """Builds the responses of `/v1/completions`."""

    def __init__(self, request: CompletionRequest) -> None:
        self._model, self._wants_logprobs = request.model, request.logprobs is not None
        self._id, self._created = f"cmpl-{uuid.uuid4().hex}", int(time.time())

    def build_response(
        self, answers: Sequence[ChoiceAccumulator], counts: TokenCounts
    ) -> BaseModel:
        """Return the response to a request that is not streamed."""
        choices = [
            CompletionChoice(
                index=index,
                text=answer.text,
                logprobs=self._logprobs(answer.deltas),
                finish_reason=answer.finish_reason,
            )
            for index, answer in enumerate(answers)
        ]
        return self._completion(choices, counts.usage)

    def build_first_chunks(self, num_choices: int) -> Iterator[BaseModel]:  # noqa: ARG002
        """Yield the chunks that precede the first delta: none."""
        return iter(())

    def build_chunk(self, part: OutputDelta) -> BaseModel:
        """Return the chunk of a delta."""
        choice = CompletionChoice(
            index=part.index,
            text=part.text,
            logprobs=self._logprobs([part]),
            finish_reason=part.finish_reason,
        )
        return self._completion([choice])

    def build_usage_chunk(self, counts: TokenCounts) -> BaseModel:
        """Return the last chunk, with the token counts."""
        return self._completion([], counts.usage)

    def _completion(
        self, choices: list[CompletionChoice], usage: Usage | None = None
    ) -> Completion:
        return Completion(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=usage
        )

    def _logprobs(self, parts: Sequence[OutputDelta]) -> CompletionLogprobs | None:
        if not self._wants_logprobs:
            return None
        tokens = [token for part in parts for token in part.tokens]
        return CompletionLogprobs(
            tokens=[token_text(token.content) for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=[_top_logprobs(token) for token in tokens],
            text_offset=[token.offset for token in tokens],
        )


ResponseBuilder = ChatResponseBuilder | CompletionResponseBuilder
"""Response builder of either endpoint."""


def _call_delta(chunk: ToolCallChunk) -> ToolCallDelta:
    return ToolCallDelta(
        index=chunk.index,
        id=chunk.id,
        type=None if chunk.id is None else "function",
        function=FunctionDelta(name=chunk.name, arguments=chunk.arguments),
    )


def _content_logprobs(part: OutputDelta) -> Iterator[ContentLogprob]:
    for token in part.tokens:
        if not token.is_end and token.logprob is not None:
            yield ContentLogprob(
                token=token_text(token.content),
                logprob=token.logprob,
                bytes=list(token.content),
                top_logprobs=[
                    TokenLogprob(token=token_text(content), logprob=value, bytes=list(content))
                    for content, value in token.top_logprobs
                ],
            )


def _top_logprobs(token: OutputToken) -> dict[str, float] | None:
    """Return the log probabilities of a place by text, the token's own included.

    Tokens with the same text get a number, so that none is lost.
    """
    if token.logprob is None:
        return None
    found: dict[str, float] = {}
    own = (token.content, token.logprob)
    pairs = token.top_logprobs if own in token.top_logprobs else (*token.top_logprobs, own)
    for content, value in pairs:
        text = token_text(content)
        number = 2
        while text in found:
            text = f"{token_text(content)} ({number})"
            number += 1
        found[text] = value
    return found
