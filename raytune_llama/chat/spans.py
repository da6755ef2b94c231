"""Encode the text spans between control tokens, and find where an answer begins in their ids.

A span after a control token is not always encoded like a separate text: SentencePiece prepends a
space to a text, and `transformers` adds none after a control token. Such a span is encoded with a
line break before it, whose ids are then dropped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from raytune_llama.chat.templates.segments import PromptBoundary, Segment, UnrenderableError
from raytune_llama.tokenizer.reference import TextEncoder

_ANCHOR = "\n"


class NoBoundaryError(UnrenderableError):
    """The ids of a span can't be separated from those of the text before it."""


@dataclass(frozen=True, slots=True)
class TextSpan:
    """A span of text between control tokens, encoded in one go."""

    text: str
    """Template text and message contents, concatenated."""
    num_prompt: int
    """Number of characters before the answer; all of them if the span contains no answer."""
    has_preceding_text: bool
    """Whether another span or control token precedes it."""
    is_masked: bool = False
    """Whether the loss leaves out its answer; see `Segment.is_masked`."""


RenderedSpan = Segment | TextSpan
"""A control token or a text span."""


@dataclass(frozen=True, slots=True)
class EncodedSpan:
    """The ids of a text span."""

    ids: NDArray[np.uint32]
    """Token ids, shape (T,)."""
    num_prompt: int
    """Number of ids before the answer."""
    is_split: bool
    """Whether prompt and answer were encoded separately: encoded together, one token would span the
    end of the prompt and the beginning of the answer, which never occurs in serving."""


def join_segments(segments: Sequence[Segment], boundary: PromptBoundary) -> list[RenderedSpan]:
    """Join adjacent text segments that are encoded together; control tokens stay unchanged."""
    spans: list[RenderedSpan] = []
    groups = groupby(
        segments,
        # With "apart", a span also ends where a prompt or an answer ends.
        lambda part: (part.token_id is not None, part.is_target and boundary == "apart"),
    )
    for (is_control, _), group in groups:
        parts = list(group)
        if is_control:
            spans += parts
            continue
        text = "".join(part.text for part in parts)
        prompt = "".join(part.text for part in parts if not part.is_target)
        assert text.startswith(prompt), "an answer ends with a control token"
        if text:
            is_masked = any(part.is_masked for part in parts)
            spans.append(TextSpan(text, len(prompt), bool(spans), is_masked))
    return spans


class SpanEncoder:
    """Encodes text spans with a `TextEncoder`."""

    def __init__(self, encoder: TextEncoder, *, is_anchored: bool) -> None:
        """Initialize, with two calls of `encoder`.

        Args:
            encoder: Encoder of the texts.
            is_anchored: Whether a span that follows another is encoded with a line break before it.
        """
        self._encoder = encoder
        self._is_anchored = is_anchored
        (self._anchor,) = encoder.encode([_ANCHOR])
        # Whether the tokenizer prepends a space at the start of a text.
        alone, anchored = encoder.encode(["a", _ANCHOR + "a"])
        self._marks_start = not np.array_equal(alone, anchored[len(self._anchor) :])

    def encode(self, spans: Sequence[TextSpan]) -> list[EncodedSpan]:
        """Return the ids of each span.

        Raises:
            NoBoundaryError: The first token of a span also covers text before it.
            UnsplittableTextError: As `TextEncoder.encode`.
        """
        texts: list[str] = []
        for span in spans:
            before = self._before(span)
            texts.append(before + span.text)
            if 0 < span.num_prompt < len(span.text):
                texts.append(before + span.text[: span.num_prompt])
        encoded = iter(self._encoder.encode(texts))
        results: list[EncodedSpan] = []
        for span in spans:
            ids = self._without_anchor(next(encoded), span)
            if not 0 < span.num_prompt < len(span.text):
                results.append(EncodedSpan(ids, len(ids) if span.num_prompt else 0, False))
                continue
            prompt = self._without_anchor(next(encoded), span)
            is_split = not np.array_equal(ids[: len(prompt)], prompt)
            if is_split:
                ids = np.concatenate([prompt, self._encode_answer(span.text[span.num_prompt :])])
            results.append(EncodedSpan(ids, len(prompt), is_split))
        return results

    def _before(self, span: TextSpan) -> str:
        return _ANCHOR if self._is_anchored and span.has_preceding_text else ""

    def _without_anchor(self, ids: NDArray[np.uint32], span: TextSpan) -> NDArray[np.uint32]:
        return self._strip(ids) if self._before(span) else ids

    def _strip(self, ids: NDArray[np.uint32]) -> NDArray[np.uint32]:
        if not np.array_equal(ids[: len(self._anchor)], self._anchor):
            raise NoBoundaryError("the tokenizer merges a line break with the text after it")
        return ids[len(self._anchor) :]

    def _encode_answer(self, text: str) -> NDArray[np.uint32]:
        """Encode an answer separately from its prompt."""
        if not self._marks_start:
            return self._encoder.encode([text])[0]
        return self._strip(self._encoder.encode([_ANCHOR + text])[0])
