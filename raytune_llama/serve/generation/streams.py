"""From the tokens of an answer, one by one, to its text and calls."""

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
    """Text and calls of an answer whose tokens come one by one."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], *, must_call: bool | None
    ) -> None:
        """Begin without any token.

        Args:
            tokenizer: of the model.
            stops: texts that end the answer's text; in calls none is looked for.
            must_call: whether the answer is calls of tools alone; None: there are no tools.
        """
        self._cutter = StopStringFilter(stops)
        self._parser = None if must_call is None else ToolCallParser(must_call=must_call)
        # Where they are tokens of their own, these may be control tokens, which are not shown.
        added = tokenizer.added_tokens_decoder if self._parser else {}
        shown = {
            id_
            for id_, token in added.items()
            if token.content in (TOOL_CALL_OPEN_TAG, TOOL_CALL_CLOSE_TAG)
        }
        self._stream = IncrementalDetokenizer(tokenizer, shown=shown)

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._cutter.is_stopped

    @property
    def _num_calls(self) -> int:
        return self._parser.num_calls if self._parser else 0

    @property
    def finish_reason(self) -> Literal["stop", "tool_calls"]:
        """Why an answer that is whole has ended."""
        return "tool_calls" if self._num_calls and not self.is_stopped else "stop"

    def push(self, token: int | None, *, is_last: bool) -> tuple[str, tuple[ToolCallChunk, ...]]:
        """Take a token, None for one that does no more than end the answer.

        Returns:
            The text and the pieces of calls that are now certain; all calls come behind all text.
        """
        text = "" if token is None else self._stream.push(token)
        if is_last:
            text += self._stream.finish()
        pieces: list[ToolCallChunk] = []
        if self._parser is not None:
            text, pieces = self._parser.push(text)
            text += self._parser.finish() if is_last else ""
        told = self._cutter.push(text)
        if is_last or self._num_calls:
            told += self._cutter.finish()
        return told, () if self.is_stopped else tuple(pieces)
