"""Conversations become token ids and a mask of what is learned; prompts become ids for serving.

    encoder = build_chat_encoder(load_tokenizer(path), ChatConfig(template="alpaca"))
    rows = encoder.encode(conversations)        # an `EncodedConversation` or a `Defect` each
    counts = count_encoded(rows)
    ids = encoder.encode_prompt(conversation)   # the user speaks last

Content is plain text: a control token that is written in it stays text. The loss is on answers and
what ends them. A prompt's ids are the beginning of what training sees of the same conversation.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from transformers import PreTrainedTokenizerFast

from raytune_llama.chat.conversations import (
    Conversation,
    Defect,
    Turn,
    find_defect,
    find_prompt_defect,
)
from raytune_llama.chat.spans import NoBoundaryError, SpanEncoder, TextSpan, join_segments
from raytune_llama.chat.templates.choice import build_template
from raytune_llama.chat.templates.names import TemplateName
from raytune_llama.chat.templates.segments import Segment, Template, UnrenderableError
from raytune_llama.chat.truncation import Truncation, truncate
from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import settings
from raytune_llama.tokenizer.loader import build_reference_encoder
from raytune_llama.tokenizer.reference import TextEncoder
from raytune_llama.tokenizer.split_points import UnsplittableTextError


@settings
class ChatConfig:
    """How conversations become token ids."""

    template: TemplateName = "tokenizer"
    """How they are written: the tokenizer's own chat template, or a form of the seeds' projects."""
    max_tokens: Annotated[int, Field(ge=2)] | None = None
    """Longest conversation in tokens; null: none is cut."""
    truncation: Truncation = "keep_eos"
    """What becomes of longer ones. `keep_eos`: the beginning stays, an answer that is cut ends with
    EOS, a question that is cut goes; `drop`; `cut_left`: the end stays."""
    train_on_prompt: bool = False
    """Whether all tokens are learned, and not only answers and what ends them."""


@dataclass(frozen=True, slots=True)
class EncodedConversation:
    """A conversation as a model sees it."""

    ids: NDArray[np.uint32]
    """Token ids, shape (T,)."""
    targets: NDArray[np.bool_]
    """Which tokens are learned, shape (T,): `targets[i]` says it of `ids[i]`, not of the next."""
    num_cut: int
    """Tokens of the conversation that are not in `ids`, for it was too long."""
    num_splits: int
    """Answers that were encoded apart from their prompt; see `EncodedSpan.is_split`."""


@dataclass(slots=True)
class EncodingCounts:
    """What became of conversations."""

    conversations: int = 0
    """How many there were."""
    encoded: int = 0
    """How many of them can be learned from."""
    truncated: int = 0
    """How many of these are cut."""
    cut_tokens: int = 0
    """Tokens that these lack."""
    split_boundaries: int = 0
    """Answers that were encoded apart from their prompt."""
    dropped: Counter[str] = field(default_factory=Counter)
    """The rest, by reason."""


def count_encoded(rows: Iterable[EncodedConversation | Defect]) -> EncodingCounts:
    """Count what became of conversations; `encoded` and `dropped` add up to `conversations`."""
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
        return [piece for piece in self.spans if isinstance(piece, TextSpan)]


class ChatEncoder:
    """Makes ids of conversations; made by `build_chat_encoder`, picklable."""

    def __init__(
        self, template: Template, stretches: SpanEncoder, config: ChatConfig, bos_id: int | None
    ) -> None:
        self.template = template
        """How conversations are written."""
        self.config = config
        """As asked for."""
        self._stretches = stretches
        self._bos_id = bos_id

    def encode(self, conversations: Sequence[Conversation]) -> list[EncodedConversation | Defect]:
        """Return the ids and targets of each conversation, or why it is dropped.

        All are encoded with one call, so give some hundreds at a time.
        """
        rendered = [self._render(conversation) for conversation in conversations]
        usable = [one for one in rendered if isinstance(one, _Rendered)]
        encoded = iter(self._encode_all(usable))
        return [self._cut(next(encoded)) if isinstance(one, _Rendered) else one for one in rendered]

    def encode_prompt(self, conversation: Conversation) -> NDArray[np.uint32]:
        """Return the ids after which a model is to answer: what it learned to answer after.

        Raises:
            ValueError: The conversation has a defect, or can't be written by the template.
        """
        defect = find_prompt_defect(conversation)
        if defect is not None:
            raise UserError(f"messages: {defect.reason}: {defect.detail}")
        row = self.encode_segments(self.template.render(conversation))
        if isinstance(row, Defect):
            raise UserError(f"messages: {row.reason}: {row.detail}")
        return row.ids

    def encode_segments(self, segments: Sequence[Segment]) -> EncodedConversation | Defect:
        """Return ids and targets of what the template has written, not cut."""
        return self._encode_one(_Rendered(join_segments(segments, self.template.boundary)))

    def _render(self, conversation: Conversation) -> _Rendered | Defect:
        defect = find_defect(conversation)
        if defect is not None:
            return defect
        try:
            segments = self.template.render(conversation)
        except UnrenderableError as error:
            return Defect("unrenderable", str(error))
        return _Rendered(join_segments(segments, self.template.boundary))

    def _encode_all(self, rendered: list[_Rendered]) -> list[EncodedConversation | Defect]:
        try:
            return self._encode_at_once(rendered)
        except (NoBoundaryError, UnsplittableTextError):
            return [self._encode_one(one) for one in rendered]

    def _encode_one(self, rendered: _Rendered) -> EncodedConversation | Defect:
        try:
            return self._encode_at_once([rendered])[0]
        except NoBoundaryError as error:
            return Defect("no_boundary", str(error))
        except UnsplittableTextError as error:
            return Defect("uncuttable", str(error))

    def _encode_at_once(self, rendered: list[_Rendered]) -> list[EncodedConversation | Defect]:
        stretches = [stretch for one in rendered for stretch in one.text_spans]
        encoded = iter(self._stretches.encode(stretches))
        rows: list[EncodedConversation | Defect] = []
        for one in rendered:
            ids: list[NDArray[np.uint32]] = []
            targets: list[NDArray[np.bool_]] = []
            num_splits = 0
            for piece in one.spans:
                if isinstance(piece, TextSpan):
                    made = next(encoded)
                    ids.append(made.ids)
                    targets.append(np.arange(len(made.ids)) >= made.num_prompt)
                    num_splits += made.is_split
                else:
                    ids.append(np.array([piece.token_id], dtype=np.uint32))
                    targets.append(np.array([piece.is_target]))
            rows.append(
                EncodedConversation(np.concatenate(ids), np.concatenate(targets), 0, num_splits)
            )
        return rows

    def _cut(self, row: EncodedConversation | Defect) -> EncodedConversation | Defect:
        """Shorten a conversation to what the config allows, and drop what teaches nothing."""
        if isinstance(row, Defect):
            return row
        config, num_ids = self.config, len(row.ids)
        if config.max_tokens is not None and num_ids > config.max_tokens:
            ids, targets = truncate(
                row.ids, row.targets, config.max_tokens, config.truncation, bos_id=self._bos_id
            )
            row = replace(row, ids=ids, targets=targets, num_cut=num_ids - len(ids))
            if not len(ids):
                detail = f"{num_ids} tokens, max_tokens is {config.max_tokens}"
                is_drop = config.truncation == "drop"
                return Defect("too_long" if is_drop else "no_target", detail)
        if row.targets.sum() < 2:  # an end token alone
            return Defect("no_target", f"{num_ids} tokens, none of them of an answer")
        if config.train_on_prompt:
            return replace(row, targets=np.ones(len(row.ids), dtype=np.bool_))
        return row


def build_chat_encoder(
    tokenizer: PreTrainedTokenizerFast, config: ChatConfig, encoder: TextEncoder | None = None
) -> ChatEncoder:
    """Return what encodes conversations.

    Args:
        tokenizer: From `load_tokenizer`.
        config: How.
        encoder: What makes ids of text, such as `select_encoder` returns; None for the reference.

    Raises:
        ValueError: The tokenizer has no EOS, or its own chat template is asked for and can't be
            used.
    """
    template = build_template(config.template, tokenizer)
    text_encoder = build_reference_encoder(tokenizer) if encoder is None else encoder
    bos = tokenizer.bos_token_id
    bos_id = bos if isinstance(bos, int) else None
    if template.boundary == "apart":
        stretches = SpanEncoder(text_encoder, is_anchored=False)
        return ChatEncoder(template, stretches, config, bos_id)
    for is_anchored in (False, True):
        stretches = SpanEncoder(text_encoder, is_anchored=is_anchored)
        made = ChatEncoder(template, stretches, config, bos_id)
        if _matches_transformers(made, tokenizer):
            return made
    raise UserError(
        f"template: the ids of the chat template of {tokenizer.name_or_path} can't be made as "
        "transformers makes them (tokens that take the white space beside them, or another "
        "tokenizer.model); name another template"
    )


_PROBES = (
    ("fox", "dog"),
    ("a lazy dog", "The quick brown fox."),
    (" fox", "the\n dog"),
    ("1 + 1?\n", "\u00e9"),
)


def _matches_transformers(encoder: ChatEncoder, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Compare the ids of some conversations, with and without an answer."""
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
                    f"{error}; name another template"
                ) from error
            row = encoder.encode_segments(segments)
            if isinstance(row, Defect):
                return False
            text = "".join(segment.text for segment in segments)
            wanted = tokenizer(text, add_special_tokens=False, split_special_tokens=False)
            if not row.num_splits and wanted["input_ids"] != row.ids.tolist():
                return False
    return True
