"""Ids of the stretches of text between control tokens, and where in them an answer begins.

A stretch behind a control token is not always encoded like a text of its own: SentencePiece puts
a space before a text, and `transformers` puts none behind a control token. Such a stretch is
encoded behind a line break, of which the ids are then taken away.
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
    """A stretch of which the ids can't be told from those of what stands before it."""


@dataclass(frozen=True, slots=True)
class TextSpan:
    """Text that is encoded as one."""

    text: str
    """The template's text and contents, one after the other."""
    num_prompt: int
    """How many of its characters stand before the answer; all where there is none in it."""
    has_preceding_text: bool
    """Whether something stands before it."""


RenderedSpan = Segment | TextSpan
"""A control token, or text."""


@dataclass(frozen=True, slots=True)
class EncodedSpan:
    """The ids of a stretch."""

    ids: NDArray[np.uint32]
    """All of them."""
    num_prompt: int
    """How many of them stand before the answer."""
    is_split: bool
    """Whether prompt and answer had to be encoded apart: encoded as one, a token holds the end of
    the prompt and the beginning of the answer, which serving would never meet."""


def join_segments(segments: Sequence[Segment], boundary: PromptBoundary) -> list[RenderedSpan]:
    """Join the texts of segments that are encoded as one; control tokens stay as they are."""
    pieces: list[RenderedSpan] = []
    groups = groupby(
        segments,
        # Apart, a change from prompt to answer divides too.
        lambda part: (part.token_id is not None, part.is_target and boundary == "apart"),
    )
    for (is_control, _), group in groups:
        parts = list(group)
        if is_control:
            pieces += parts
            continue
        text = "".join(part.text for part in parts)
        prompt = "".join(part.text for part in parts if not part.is_target)
        assert text.startswith(prompt), "an answer ends with a control token"
        if text:
            pieces.append(TextSpan(text, len(prompt), bool(pieces)))
    return pieces


class SpanEncoder:
    """Encodes stretches with a reference."""

    def __init__(self, encoder: TextEncoder, *, is_anchored: bool) -> None:
        """Prepare it.

        Args:
            encoder: What makes ids.
            is_anchored: Whether a stretch inside a text is encoded behind a line break.
        """
        self._encoder = encoder
        self._is_anchored = is_anchored
        (self._anchor,) = encoder.encode([_ANCHOR])
        # Whether a text that stands alone gets a space that it has not behind another one.
        alone, behind = encoder.encode(["a", _ANCHOR + "a"])
        self._marks_start = not np.array_equal(alone, behind[len(self._anchor) :])

    def encode(self, stretches: Sequence[TextSpan]) -> list[EncodedSpan]:
        """Encode stretches.

        Raises:
            NoBoundaryError: A stretch begins with a token that holds what stands before it.
            UncuttableTextError: As `TextEncoder.encode`.
        """
        texts: list[str] = []
        for stretch in stretches:
            before = self._before(stretch)
            texts.append(before + stretch.text)
            if 0 < stretch.num_prompt < len(stretch.text):
                texts.append(before + stretch.text[: stretch.num_prompt])
        encoded = iter(self._encoder.encode(texts))
        results: list[EncodedSpan] = []
        for stretch in stretches:
            ids = self._without_anchor(next(encoded), stretch)
            if not 0 < stretch.num_prompt < len(stretch.text):
                results.append(EncodedSpan(ids, len(ids) if stretch.num_prompt else 0, False))
                continue
            prompt = self._without_anchor(next(encoded), stretch)
            is_split = not np.array_equal(ids[: len(prompt)], prompt)
            if is_split:
                ids = np.concatenate(
                    [prompt, self._encode_answer(stretch.text[stretch.num_prompt :])]
                )
            results.append(EncodedSpan(ids, len(prompt), is_split))
        return results

    def _before(self, stretch: TextSpan) -> str:
        return _ANCHOR if self._is_anchored and stretch.has_preceding_text else ""

    def _without_anchor(self, ids: NDArray[np.uint32], stretch: TextSpan) -> NDArray[np.uint32]:
        return self._strip(ids) if self._before(stretch) else ids

    def _strip(self, ids: NDArray[np.uint32]) -> NDArray[np.uint32]:
        if not np.array_equal(ids[: len(self._anchor)], self._anchor):
            raise NoBoundaryError("the tokenizer joins a line break with what follows it")
        return ids[len(self._anchor) :]

    def _encode_answer(self, text: str) -> NDArray[np.uint32]:
        """Encode an answer that can't be encoded together with its prompt."""
        if not self._marks_start:
            return self._encoder.encode([text])[0]
        return self._strip(self._encoder.encode([_ANCHOR + text])[0])
