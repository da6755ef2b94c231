"""From tokens that come one by one to text that can be sent."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from transformers import PreTrainedTokenizerBase

from raytune_llama.serve.generation.output import REPLACEMENT
from raytune_llama.tokenizer.loader import control_token_ids


class IncrementalDetokenizer:
    """Decodes a growing sequence of tokens; what was told is never taken back.

    The parts together are what the tokenizer makes of all tokens at once, without control tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        shown: AbstractSet[int] = frozenset(),
    ) -> None:
        """Begin with no token.

        Args:
            tokenizer: of the model.
            shown: control tokens that are text all the same.
        """
        self._tokenizer = tokenizer
        self._skips_control = not shown
        self._hidden = control_token_ids(tokenizer) - shown if shown else frozenset()
        self._tokens: list[int] = []
        # Decoding looks back: a piece's text depends on the one before it.
        self._context_start = self._told_end = 0

    def push(self, token: int) -> str:
        """Take a token; return the text that is now certain, which may be empty."""
        if token not in self._hidden:
            self._tokens.append(token)
        return self._certain(is_last=False)

    def finish(self) -> str:
        """Return the text that was held back; nothing comes behind it."""
        return self._certain(is_last=True)

    def _decode(self, tokens: Sequence[int]) -> str:
        text = self._tokenizer.decode(
            list(tokens),
            skip_special_tokens=self._skips_control,
            clean_up_tokenization_spaces=False,
        )
        assert isinstance(text, str)
        return text

    def _certain(self, *, is_last: bool) -> str:
        """Return the text of the newest tokens, or nothing where a character is not whole yet."""
        known = self._decode(self._tokens[self._context_start : self._told_end])
        text = self._decode(self._tokens[self._context_start :])
        # Bytes that are no character may stand before the beginning of one: all of them wait.
        if not is_last and (text.endswith(REPLACEMENT) or len(text) <= len(known)):
            return ""
        self._context_start, self._told_end = self._told_end, len(self._tokens)
        return text[len(known) :]


class StopStringFilter:
    """Cuts a text that comes in pieces before the stop string that is whole first."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Begin with no text; no stop string is empty."""
        assert all(stops)
        self._stops, self._held = tuple(stops), ""
        self.is_stopped = False
        """Whether a stop string has come."""

    def push(self, text: str) -> str:
        """Take what comes next; return what can't become part of a stop string any more."""
        if self.is_stopped:
            return ""
        text = self._held + text
        # The one that is whole first, however the text is cut into tokens.
        found = [(p + len(stop), p) for stop in self._stops if (p := text.find(stop)) >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)[1]]
        kept = self._open_length(text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def finish(self) -> str:
        """Return the text that was held back; nothing comes behind it."""
        held, self._held = self._held, ""
        return held

    def _open_length(self, text: str) -> int:
        """Return the length of the longest end of a text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
