"""Encode conversations as token ids and a loss mask, and prompts as ids for serving.

    encoder = build_chat_encoder(load_tokenizer(path), ChatConfig(template="alpaca"))
    rows = encoder.encode(conversations)        # `EncodedConversation` or `Defect`
    counts = count_encoded(rows)
    ids = encoder.encode_prompt(conversation)   # the answer comes next, or continues

Content is plain text: a control token that is written in it stays text. The loss is on answers and
the tokens that end them. The ids of a prompt are a prefix of those that training uses for the same
conversation. A prompt may also have what training refuses, such as two turns of one speaker in a
row; see `prompts`.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from raytune_llama.chat.config import ChatConfig
from raytune_llama.chat.conversations import (
    Conversation,
    Defect,
    Turn,
    find_defect,
    find_prompt_defect,
)
from raytune_llama.chat.prompts import leave_open, list_forms
from raytune_llama.chat.spans import NoBoundaryError, SpanEncoder, TextSpan, join_segments
from raytune_llama.chat.templates.choice import build_template
from raytune_llama.chat.templates.options import check_options
from raytune_llama.chat.templates.segments import (
    NO_OPTIONS,
    Segment,
    Template,
    UnrenderableError,
)
from raytune_llama.chat.tools import place_tools
from raytune_llama.chat.truncation import truncate
from raytune_llama.config.errors import UserError
from raytune_llama.tokenizer.loader import build_reference_encoder
from raytune_llama.tokenizer.reference import TextEncoder
from raytune_llama.tokenizer.split_points import UnsplittableTextError


@dataclass(frozen=True, slots=True)
class EncodedConversation:
    """A conversation as token ids and targets."""

    ids: NDArray[np.uint32]
    """Token ids, shape (T,)."""
    targets: NDArray[np.bool_]
    """Mask of the trained tokens, shape (T,): `targets[i]` applies to `ids[i]`, not to the next."""
    num_cut: int
    """Number of tokens removed by truncation."""
    num_splits: int
    """Number of answers encoded separately from their prompt; see `EncodedSpan.is_split`."""
    lost_prompt: bool = False
    """Whether truncation removed the question, so that an answer is learned without it."""


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A conversation before it is truncated."""

    ids: NDArray[np.uint32]
    answers: NDArray[np.bool_]
    """Mask of answers and of the tokens that end them, shape (T,)."""
    masked: NDArray[np.bool_]
    """Mask of the answers that are marked as not trained, shape (T,)."""
    num_splits: int


@dataclass(slots=True)
class EncodingCounts:
    """Counts of encoded, truncated and dropped conversations."""

    conversations: int = 0
    """Number of conversations."""
    encoded: int = 0
    """Number of conversations that can be trained on."""
    truncated: int = 0
    """Number of encoded conversations that were truncated."""
    cut_tokens: int = 0
    """Number of tokens removed by truncation, in total."""
    split_boundaries: int = 0
    """Number of answers encoded separately from their prompt."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Number of dropped conversations, per reason."""


def count_encoded(rows: Iterable[EncodedConversation | Defect]) -> EncodingCounts:
    """Count outcomes; `encoded` and the values of `dropped` add up to `conversations`."""
    counts = EncodingCounts()
    for row in rows:
        counts.conversations += 1
        if isinstance(row, Defect):
            counts.dropped[row.reason] += 1
            continue
        counts.encoded += 1
        counts.truncated += row.num_cut > 0
        counts.cut_tokens += row.num_cut
        counts.split_boundaries += row.num_splits
    return counts


@dataclass(frozen=True, slots=True)
class _Rendered:
    spans: list[Segment | TextSpan]

    @property
    def text_spans(self) -> list[TextSpan]:
        return [span for span in self.spans if isinstance(span, TextSpan)]


class ChatEncoder:
    """Encodes conversations; picklable. Build one with `build_chat_encoder`."""

    def __init__(
        self, template: Template, span_encoder: SpanEncoder, config: ChatConfig, bos_id: int | None
    ) -> None:
        self.template = template
        """Template that renders the conversations."""
        self.config = config
        """Settings given to `build_chat_encoder`."""
        self._span_encoder = span_encoder
        self._bos_id = bos_id

    def encode(self, conversations: Sequence[Conversation]) -> list[EncodedConversation | Defect]:
        """Return the ids and targets of each conversation, or why it is dropped.

        All are encoded in one batch: pass a few hundred at a time.
        """
        rendered = [self._render(conversation) for conversation in conversations]
        usable = [one for one in rendered if isinstance(one, _Rendered)]
        encoded = iter(self._encode_all(usable))
        return [
            self._truncate(next(encoded)) if isinstance(one, _Rendered) else one for one in rendered
        ]

    def encode_prompt(
        self, conversation: Conversation, options: Mapping[str, Any] = NO_OPTIONS
    ) -> NDArray[np.uint32]:
        """Return the ids of a prompt, the same as before the answer in training.

        If the assistant has the last turn, its answer is continued: the ids end with its content.
        What the template can't render is joined; see `list_forms`.

        Args:
            conversation: Turns of any role, in any order.
            options: Values of `Template.variables`, in plain JSON.

        Raises:
            UserError: The conversation has a defect, the template can't render it even when joined,
                or an option is not a variable of the template or has a wrong value.
        """
        defect = find_prompt_defect(conversation)
        if defect is not None:
            raise UserError(f"messages: {defect.reason}: {defect.detail}")
        check_options(options, self.template.variables)
        segments = self._write_prompt(conversation, options)
        if not any(segment.text for segment in segments):
            raise UserError("messages: the prompt is empty; send a message that is not")
        row = self.encode_segments(segments)
        if isinstance(row, Defect):
            raise UserError(f"messages: {row.reason}: {row.detail}")
        return row.ids

    def _write_prompt(
        self, conversation: Conversation, options: Mapping[str, Any]
    ) -> list[Segment]:
        """Return the segments of the first form of a conversation that the template renders."""
        reason: UnrenderableError | None = None
        for form in list_forms(conversation, allows_system=self.template.allows_system):
            try:
                segments = self.template.render(form, options)
            except UnrenderableError as error:
                reason = error
            else:
                return leave_open(segments, form)
        raise UserError(f"messages: {reason}") from reason

    def encode_segments(self, segments: Sequence[Segment]) -> EncodedConversation | Defect:
        """Return ids and targets of rendered segments, not truncated."""
        made = self._encode_one(_Rendered(join_segments(segments, self.template.boundary)))
        if isinstance(made, Defect):
            return made
        return EncodedConversation(made.ids, made.answers & ~made.masked, 0, made.num_splits)

    def _write(self, conversation: Conversation) -> list[Segment]:
        placed = place_tools(conversation, allows_system=self.template.allows_system)
        return self.template.render(placed)

    def _render(self, conversation: Conversation) -> _Rendered | Defect:
        defect = find_defect(conversation)
        if defect is not None:
            return defect
        try:
            segments = self._write(conversation)
        except UnrenderableError as error:
            return Defect("unrenderable", str(error))
        return _Rendered(join_segments(segments, self.template.boundary))

    def _encode_all(self, rendered: list[_Rendered]) -> list[_Encoded | Defect]:
        try:
            return self._encode_at_once(rendered)
        except (NoBoundaryError, UnsplittableTextError):
            return [self._encode_one(one) for one in rendered]

    def _encode_one(self, rendered: _Rendered) -> _Encoded | Defect:
        try:
            return self._encode_at_once([rendered])[0]
        except NoBoundaryError as error:
            return Defect("no_boundary", str(error))
        except UnsplittableTextError as error:
            return Defect("uncuttable", str(error))

    def _encode_at_once(self, rendered: list[_Rendered]) -> list[_Encoded | Defect]:
        text_spans = [span for one in rendered for span in one.text_spans]
        encoded = iter(self._span_encoder.encode(text_spans))
        rows: list[_Encoded | Defect] = []
        for one in rendered:
            ids: list[NDArray[np.uint32]] = []
            answers: list[NDArray[np.bool_]] = []
            masked: list[NDArray[np.bool_]] = []
            num_splits = 0
            for span in one.spans:
                if isinstance(span, TextSpan):
                    made = next(encoded)
                    ids.append(made.ids)
                    answers.append(np.arange(len(made.ids)) >= made.num_prompt)
                    num_splits += made.is_split
                else:
                    ids.append(np.array([span.token_id], dtype=np.uint32))
                    answers.append(np.array([span.is_target]))
                masked.append(answers[-1] & span.is_masked)
            parts = (np.concatenate(ids), np.concatenate(answers), np.concatenate(masked))
            rows.append(_Encoded(*parts, num_splits))
        return rows

    def _truncate(self, row: _Encoded | Defect) -> EncodedConversation | Defect:
        """Truncate a conversation to `max_tokens`, or drop it if no answer token is left."""
        if isinstance(row, Defect):
            return row
        config, num_ids = self.config, len(row.ids)
        kept, begins = np.arange(num_ids), row.ids[0] == self._bos_id
        if config.max_tokens is not None and num_ids > config.max_tokens:
            kept = truncate(
                # Of answers that are not trained, none is worth keeping.
                row.answers & ~row.masked,
                config.max_tokens,
                config.truncation,
                begins_with_bos=bool(begins),
            )
            if not len(kept):
                detail = f"{num_ids} tokens, max_tokens is {config.max_tokens}"
                is_drop = config.truncation == "drop"
                return Defect("too_long" if is_drop else "no_target", detail, num_ids)
        answers, masked = row.answers[kept], row.masked[kept]
        targets = answers & ~masked
        if targets.sum() < 2:  # only an end token
            detail = f"{num_ids} tokens, none of them in an answer to train on"
            return Defect("no_target", detail, num_ids)
        if config.train_on_prompt:
            targets = ~masked
        num_cut = num_ids - len(kept)
        lost_prompt = num_cut > 0 and bool(answers[int(begins)])
        return EncodedConversation(row.ids[kept], targets, num_cut, row.num_splits, lost_prompt)


def build_chat_encoder(
    tokenizer: PreTrainedTokenizerFast, config: ChatConfig, encoder: TextEncoder | None = None
) -> ChatEncoder:
    """Return an encoder of conversations.

    Args:
        tokenizer: Tokenizer from `load_tokenizer`.
        config: Settings of the encoder.
        encoder: Encoder of texts, such as one from `select_encoder`; None for the reference.

    Raises:
        ValueError: The tokenizer has no EOS, or its own chat template is requested but can't be
            used.
    """
    template = build_template(config.template, tokenizer)
    text_encoder = build_reference_encoder(tokenizer) if encoder is None else encoder
    bos = tokenizer.bos_token_id
    bos_id = bos if isinstance(bos, int) else None
    if template.boundary == "apart":
        span_encoder = SpanEncoder(text_encoder, is_anchored=False)
        return ChatEncoder(template, span_encoder, config, bos_id)
    for is_anchored in (False, True):
        span_encoder = SpanEncoder(text_encoder, is_anchored=is_anchored)
        chat_encoder = ChatEncoder(template, span_encoder, config, bos_id)
        if _matches_transformers(chat_encoder, tokenizer):
            return chat_encoder
    raise UserError(
        f"template: the chat template of {tokenizer.name_or_path} can't be encoded to the same ids "
        "as in transformers (its tokens strip adjacent whitespace, or its tokenizer.model "
        "differs); set another template"
    )


_PROBES = (
    ("fox", "dog"),
    ("a lazy dog", "The quick brown fox."),
    (" fox", "the\n dog"),
    ("1 + 1?\n", "\u00e9"),
)


def _matches_transformers(encoder: ChatEncoder, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the ids of a few probe conversations are the same as in transformers."""
    template = encoder.template
    for user, answer in _PROBES:
        turns = (Turn("user", user), Turn("assistant", answer), Turn("user", "ox"))
        for length in (1, 2, 3):
            system = "a fox" if template.needs_system else None
            try:
                segments = template.render(Conversation(turns[:length], system))
            except UnrenderableError as error:
                raise UserError(
                    f"template: the chat template of {tokenizer.name_or_path} can't be used: "
                    f"{error}; set another template"
                ) from error
            row = encoder.encode_segments(segments)
            if isinstance(row, Defect):
                return False
            text = "".join(segment.text for segment in segments)
            wanted = tokenizer(text, add_special_tokens=False, split_special_tokens=False)
            if not row.num_splits and wanted["input_ids"] != row.ids.tolist():
                return False
    return True
