"""From the streamed tokens of a choice to the text and the tool calls that can be sent.

Read `CompletionDecoder` first, which uses the others.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Literal

from transformers import PreTrainedTokenizerBase

from raytune_llama.chat.tools import (
    TOOL_CALL_CLOSE_TAG,
    TOOL_CALL_OPEN_TAG,
    ToolCallChunk,
    ToolCallParser,
)
from raytune_llama.serve.generation.output import REPLACEMENT
from raytune_llama.tokenizer.loader import control_token_ids


class IncrementalDetokenizer:
    """Decodes a growing sequence of tokens; emitted text is never revised.

    Concatenated, the parts equal the decoding of all tokens at once, without control tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        shown: AbstractSet[int] = frozenset(),
        context: Sequence[int] = (),
    ) -> None:
        """Start without tokens.

        Args:
            tokenizer: tokenizer of the model.
            shown: control tokens to decode as text.
            context: tokens before the first one, whose text is not returned.
        """
        self._tokenizer = tokenizer
        self._skips_control = not shown
        self._hidden = control_token_ids(tokenizer) - shown if shown else frozenset()
        self._tokens = list(context)
        # Decoding needs context: a token's text depends on the token before it.
        self._context_start, self._emitted_end = 0, len(self._tokens)
        # A context may end within a character, which is then returned once it is complete.
        while self._emitted_end and self._decode(self._tokens[: self._emitted_end]).endswith(
            REPLACEMENT
        ):
            self._emitted_end -= 1
        self._num_characters = 0

    def push(self, token: int) -> str:
        """Add a token; return the text that is now final, which may be empty."""
        if token not in self._hidden:
            self._tokens.append(token)
        return self._certain(is_last=False)

    def finish(self) -> str:
        """Return the held-back text, once no more input follows."""
        return self._certain(is_last=True)

    def find_offset(self, content: bytes) -> int:
        """Return the place of the token that is pushed next, in characters from the first token.

        Args:
            content: bytes of the token; one that continues a character is at its beginning.
        """
        known = self._decode(self._tokens[self._context_start : self._emitted_end])
        held = self._decode(self._tokens[self._context_start :])[len(known) :]
        if content and content[0] & 0xC0 == 0x80:
            held = held.rstrip(REPLACEMENT)
        return self._num_characters + len(held)

    def _decode(self, tokens: Sequence[int]) -> str:
        text = self._tokenizer.decode(
            list(tokens),
            skip_special_tokens=self._skips_control,
            clean_up_tokenization_spaces=False,
        )
        assert isinstance(text, str)
        return text

    def _certain(self, *, is_last: bool) -> str:
        """Return the text of the newest tokens, or nothing while a character is incomplete."""
        known = self._decode(self._tokens[self._context_start : self._emitted_end])
        text = self._decode(self._tokens[self._context_start :])
        # Invalid bytes may precede an incomplete character: all of them are held back.
        if not is_last and (text.endswith(REPLACEMENT) or len(text) <= len(known)):
            return ""
        self._context_start, self._emitted_end = self._emitted_end, len(self._tokens)
        self._num_characters += len(text) - len(known)
        return text[len(known) :]


class StopStringFilter:
    """Cuts a streamed text before the stop string that is complete first."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Start without text; no stop string may be empty."""
        assert all(stops)
        self._stops, self._held = tuple(stops), ""
        self.is_stopped = False
        """Whether a stop string has been found."""

    def push(self, text: str) -> str:
        """Add text; return the text that can no longer become part of a stop string."""
        if self.is_stopped:
            return ""
        text = self._held + text
        # The one that is complete first, however the text is split into tokens.
        found = [(p + len(stop), p) for stop in self._stops if (p := text.find(stop)) >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)[1]]
        kept = self._open_length(text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def finish(self) -> str:
        """Return the held-back text, once no more input follows."""
        held, self._held = self._held, ""
        return held

    def _open_length(self, text: str) -> int:
        """Return the length of the longest suffix of a text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


class CompletionDecoder:
    """Decodes the streamed tokens of an answer into text and tool calls."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stops: Sequence[str],
        *,
        must_call: bool | None = None,
        context: Sequence[int] = (),
    ) -> None:
        """Start without tokens.

        Args:
            tokenizer: tokenizer of the model.
            stops: stop strings of the answer's text; tool calls are not searched for them.
            must_call: whether the answer is tool calls only; None: the request has no tools.
            context: last tokens of the prompt that the answer continues, as in "a" and " b".
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
        self._stream = IncrementalDetokenizer(tokenizer, shown=shown, context=context)

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string has been found."""
        return self._cutter.is_stopped

    def find_offset(self, content: bytes) -> int:
        """Return the place of the next token in the text; see `IncrementalDetokenizer`."""
        return self._stream.find_offset(content)

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
