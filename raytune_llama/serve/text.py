"""From tokens that come one by one to text that can be sent."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from raytune_llama.serve.parts import REPLACEMENT


class TextStream:
    """Decodes a growing sequence of tokens; what was told is never taken back.

    The parts together are what the tokenizer makes of all tokens at once, without control tokens,
    up to the stop string that is whole first, which is left out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        """Begin with no token.

        Args:
            tokenizer: of the model.
            stops: texts that end the sequence; none is empty.
        """
        assert all(stops)
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._tokens: list[int] = []
        # Decoding looks back: a piece's text depends on the one before it.
        self._context_start = self._told_end = 0
        self._held = ""
        self.is_stopped = False
        """Whether a stop string has come."""

    def push(self, token: int) -> str:
        """Take a token; return the text that is now certain, which may be empty."""
        self._tokens.append(token)
        return self._tell(self._certain(is_last=False), is_last=False)

    def finish(self) -> str:
        """Return the text that was held back; nothing comes behind it."""
        return self._tell(self._certain(is_last=True), is_last=True)

    def _decode(self, tokens: Sequence[int]) -> str:
        text = self._tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
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

    def _tell(self, text: str, *, is_last: bool) -> str:
        """Return what can't become part of a stop string any more."""
        if self.is_stopped:
            return ""
        text = self._held + text
        # The one that is whole first, however the text is cut into tokens.
        found = [(p + len(stop), p) for stop in self._stops if (p := text.find(stop)) >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)[1]]
        kept = 0 if is_last else self._open_length(text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def _open_length(self, text: str) -> int:
        """Return the length of the longest end of a text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
