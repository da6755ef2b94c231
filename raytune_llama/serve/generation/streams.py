"""From the streamed tokens of an answer to its text and tool calls."""

from collections.abc import Sequence
from typing import Literal

from transformers import PreTrainedTokenizerBase

from raytune_llama.chat.tools import (
    TOOL_CALL_CLOSE_TAG,
    TOOL_CALL_OPEN_TAG,
    ToolCallChunk,
    ToolCallParser,
)
from raytune_llama.serve.generation.detokenizer import IncrementalDetokenizer, StopStringFilter


class CompletionDecoder:
    """Decodes the streamed tokens of an answer into text and tool calls."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], *, must_call: bool | None
    ) -> None:
        """Start without tokens.

        Args:
            tokenizer: tokenizer of the model.
            stops: stop strings of the answer's text; tool calls are not searched for them.
            must_call: whether the answer is tool calls only; None: the request has no tools.
        """
        self._cutter = StopStringFilter(stops)
        self._parser = None if must_call is None else ToolCallParser(must_call=must_call)
        # If these are single tokens, they may be control tokens, which are hidden by default.
        added = tokenizer.added_tokens_decoder if self._parser else {}
        shown = {
            id_
            for id_, token in added.items()
            if token.content in (TOOL_CALL_OPEN_TAG, TOOL_CALL_CLOSE_TAG)
        }
        self._stream = IncrementalDetokenizer(tokenizer, shown=shown)

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string has been found."""
        return self._cutter.is_stopped

    @property
    def _num_calls(self) -> int:
        return self._parser.num_calls if self._parser else 0

    @property
    def finish_reason(self) -> Literal["stop", "tool_calls"]:
        """Finish reason of an answer that has not hit its length limit."""
        return "tool_calls" if self._num_calls and not self.is_stopped else "stop"

    def push(self, token: int | None, *, is_last: bool) -> tuple[str, tuple[ToolCallChunk, ...]]:
        """Add a token; None for a token that only ends the answer.

        Returns:
            The text and the tool call chunks that are now final; calls come after all text.
        """
        text = "" if token is None else self._stream.push(token)
        if is_last:
            text += self._stream.finish()
        chunks: list[ToolCallChunk] = []
        if self._parser is not None:
            text, chunks = self._parser.push(text)
            text += self._parser.finish() if is_last else ""
        final = self._cutter.push(text)
        if is_last or self._num_calls:
            final += self._cutter.finish()
        return final, () if self.is_stopped else tuple(chunks)
