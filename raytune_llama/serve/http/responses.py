"""Builds OpenAI's responses and chunks from a model's output deltas."""

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel

from raytune_llama.chat.tools import ToolCallChunk
from raytune_llama.serve.generation.output import OutputDelta, text_bytes
from raytune_llama.serve.protocol.chat import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    ChoiceLogprobs,
    ChunkChoice,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    ContentLogprob,
    Delta,
    FinishReason,
    TokenLogprob,
    Usage,
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
        has_text = part.text or (part.tokens and not part.calls)
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

    def __init__(self, request: CompletionRequest, prompt_text: str = "") -> None:
        """Create a builder for one request.

        Args:
            request: request to respond to.
            prompt_text: prompt echoed before each completion; empty without `echo`.
        """
        self._model, self._wants_logprobs = request.model, request.logprobs is not None
        self._prompt_text = prompt_text
        self._id, self._created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        self._num_sent_characters: dict[int, int] = {}

    def build_response(
        self, answers: Sequence[ChoiceAccumulator], counts: TokenCounts
    ) -> BaseModel:
        """Return the response to a request that is not streamed."""
        choices = [
            CompletionChoice(
                index=index,
                text=self._prompt_text + answer.text,
                logprobs=self._logprobs(answer.deltas, len(self._prompt_text)),
                finish_reason=answer.finish_reason,
            )
            for index, answer in enumerate(answers)
        ]
        return self._completion(choices, counts.usage)

    def build_first_chunks(self, num_choices: int) -> Iterator[BaseModel]:
        """Yield the chunks that precede the first delta."""
        for index in range(num_choices if self._prompt_text else 0):
            self._num_sent_characters[index] = len(self._prompt_text)
            choice = CompletionChoice(index=index, text=self._prompt_text, finish_reason=None)
            yield self._completion([choice])

    def build_chunk(self, part: OutputDelta) -> BaseModel:
        """Return the chunk of a delta."""
        start = self._num_sent_characters.get(part.index, 0)
        self._num_sent_characters[part.index] = start + len(part.text)
        choice = CompletionChoice(
            index=part.index,
            text=part.text,
            logprobs=self._logprobs([part], start),
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

    def _logprobs(self, parts: Sequence[OutputDelta], start: int) -> CompletionLogprobs | None:
        if not self._wants_logprobs:
            return None
        tokens = [token for part in parts for token in part.tokens]
        offsets: list[int] = []
        for token in tokens:
            offsets.append(start)
            start += len(token.text)
        return CompletionLogprobs(
            tokens=[token.text for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=[dict(token.top_logprobs) for token in tokens],
            text_offset=offsets,
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
        yield ContentLogprob(
            token=token.text,
            logprob=token.logprob,
            bytes=text_bytes(token.text),
            top_logprobs=[
                TokenLogprob(token=text, logprob=value, bytes=text_bytes(text))
                for text, value in token.top_logprobs
            ],
        )
