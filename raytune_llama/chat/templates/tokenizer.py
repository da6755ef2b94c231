"""The tokenizer's own Jinja chat template, with every content located exactly.

A template is a Jinja program: it may change contents, reorder or drop them. So it is first rendered
with a placeholder for each content, which gives the texts between them; then the real conversation
is rendered, and must consist of these texts and the contents, each unchanged or without whitespace
at its ends. Anything else is rejected, not guessed.

The loss covers everything from the end of the generation prompt up to and including the control
token after the answer. The template needs no {% generation %} markers for that.
"""

import hashlib
import json
import logging
import re
from dataclasses import dataclass
from itertools import pairwise

import jinja2
from transformers import PreTrainedTokenizerFast

from raytune_llama.chat.conversations import Conversation
from raytune_llama.chat.templates.segments import (
    PromptBoundary,
    Segment,
    UnrenderableError,
    find_control_tokens,
)
from raytune_llama.config.errors import UserError
from raytune_llama.tokenizer.loader import control_token_strings

logger = logging.getLogger(__name__)

_VERSION = 1
_DATE = "26 Jul 2024"  # the default date of LLaMA 3's templates
_PLACEHOLDER = "Content{}OfX7q9k2"

Speaker = str
"""A `Role`, or `system`."""


@dataclass(frozen=True, slots=True)
class _RenderedShape:
    """Output of a template for a sequence of speakers, without the contents."""

    texts: tuple[str, ...]
    """Texts before, between and after the contents."""
    segments: tuple[tuple[Segment, ...], ...]
    """The texts, split at control tokens."""


class TokenizerTemplate:
    """Runs the tokenizer's own template; text between control tokens is encoded together."""

    name = "tokenizer"
    boundary: PromptBoundary = "joint"

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Probe a tokenizer's template with conversations of several shapes.

        Args:
            tokenizer: Tokenizer from `load_tokenizer`.

        Raises:
            ValueError: The tokenizer has no EOS or no template, or its template does not allow
                contents to be located, or always writes today's date.
        """
        self._tokenizer = tokenizer
        self._controls = find_control_tokens(tokenizer)
        self._spelled = _pattern(control_token_strings(tokenizer))
        self._skeletons: dict[tuple[Speaker, ...], _RenderedShape] = {}
        if tokenizer.chat_template is None:
            raise UserError(
                f"template: {tokenizer.name_or_path} has no chat template; set another template, "
                "or add the model's chat_template.jinja to that directory"
            )
        text = tokenizer.get_chat_template()
        self._check_date(text)
        content = json.dumps([self.name, _VERSION, _DATE, text], ensure_ascii=False)
        self.sha256 = hashlib.sha256(content.encode()).hexdigest()
        self.allows_system, self.needs_system, self.stop_ids = self._probe()

    def render(self, conversation: Conversation) -> list[Segment]:
        """See `Template.render`."""
        speakers: list[Speaker] = [turn.role for turn in conversation.turns]
        contents = [turn.content for turn in conversation.turns]
        if conversation.system is not None:
            speakers, contents = ["system", *speakers], [conversation.system, *contents]
        skeleton = self._get_rendered_shape(tuple(speakers))
        text = self._write(speakers, contents)
        spans = _match(text, skeleton.texts, contents)
        if spans is None:
            raise UnrenderableError(
                "the chat template changes contents by more than stripping whitespace"
            )
        written = list(skeleton.segments[0])
        for speaker, span, between in zip(speakers, spans, skeleton.segments[1:], strict=True):
            kind = speaker if speaker in ("system", "user") else "assistant"
            written.append(Segment(kind, span, is_target=kind == "assistant"))
            written += between
        return written

    def _write(self, speakers: list[Speaker], contents: list[str]) -> str:
        """Render a conversation, as a generation prompt if its last turn is the user's."""
        messages = [
            {"role": speaker, "content": content}
            for speaker, content in zip(speakers, contents, strict=True)
        ]
        try:
            written = self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=speakers[-1] == "user",
                date_string=_DATE,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise UnrenderableError(f"the chat template fails: {error}") from error
        assert isinstance(written, str)
        return written

    def _get_rendered_shape(self, speakers: tuple[Speaker, ...]) -> _RenderedShape:
        if speakers not in self._skeletons:
            self._skeletons[speakers] = self._build_rendered_shape(list(speakers))
        return self._skeletons[speakers]

    def _build_rendered_shape(self, speakers: list[Speaker]) -> _RenderedShape:
        names = [_PLACEHOLDER.format(number) for number in range(len(speakers))]
        text = self._write(speakers, names)
        places = [0]
        for number, name in enumerate(names):
            if text.count(name) != 1 or text.index(name) < places[-1]:
                times = text.count(name)
                raise UnrenderableError(
                    f"the chat template renders the {speakers[number]} content of message {number} "
                    f"{times} times, or out of order"
                )
            places += [text.index(name), text.index(name) + len(name)]
        places.append(len(text))
        texts = [text[start:stop] for start, stop in list(pairwise(places))[::2]]
        said = [0] * len(texts)
        for number, speaker in enumerate(speakers):
            if speaker == "assistant":
                prompt = self._write(speakers[:number], names[:number])
                if not text.startswith(prompt) or len(prompt) > places[2 * number + 1]:
                    raise UnrenderableError(
                        "the generation prompt of the chat template is not a prefix of its answers"
                    )
                said[number] = places[2 * number + 1] - len(prompt)
        parts = zip(texts, said, ["", *speakers], strict=True)
        segments = tuple(
            self._split(part, num_said, follows_answer=before == "assistant")
            for part, num_said, before in parts
        )
        return _RenderedShape(tuple(texts), segments)

    def _split(self, text: str, num_said: int, *, follows_answer: bool) -> tuple[Segment, ...]:
        """Split a template's text at control tokens.

        Args:
            text: Text between two contents.
            num_said: Number of characters at its end that belong to the next answer.
            follows_answer: Whether it follows an answer, which its first control token ends.
        """
        head, said = text[: len(text) - num_said], text[len(text) - num_said :]
        segments: list[Segment] = []
        is_target = follows_answer
        for part in filter(None, self._spelled.split(head)):
            segments.append(self._segment(part, is_target=is_target))
            is_target = is_target and segments[-1].token_id is None
        if is_target:
            raise UnrenderableError("the chat template ends an answer without a control token")
        parts = filter(None, self._spelled.split(said))
        return (*segments, *(self._segment(part, is_target=True) for part in parts))

    def _segment(self, part: str, *, is_target: bool) -> Segment:
        if not self._spelled.fullmatch(part):
            return Segment("template", part, is_target=is_target)
        token_id = self._tokenizer.convert_tokens_to_ids(part)
        assert isinstance(token_id, int)
        return Segment("control", part, token_id, is_target=is_target)

    def _check_date(self, text: str) -> None:
        if "strftime_now" not in text:
            return
        name = _PLACEHOLDER.format("Date")
        messages = [{"role": "user", "content": "A"}]
        written = self._tokenizer.apply_chat_template(messages, tokenize=False, date_string=name)
        if name not in written:
            raise UserError(
                f"template: the chat template of {self._tokenizer.name_or_path} writes today's "
                "date, so training and serving would differ; make it use date_string"
            )
        logger.info("the chat template writes a date: using the fixed date %s", _DATE)

    def _probe(self) -> tuple[bool, bool, frozenset[int]]:
        """Return whether a system message is allowed, whether it is required, and the stop ids."""
        one, errors = ("user", "assistant"), []
        works: list[bool] = []
        for start in ((), ("system",)):
            try:
                self._get_rendered_shape((*start, *one, *one))
                self._get_rendered_shape((*start, "user"))
                works.append(True)
            except UnrenderableError as error:
                works.append(False)
                errors.append(str(error))
        if not any(works):
            raise UserError(
                f"template: the chat template of {self._tokenizer.name_or_path} cannot be used: "
                f"{errors[0]}; set another template"
            )
        ends = {
            next(segment.token_id for segment in after if segment.token_id is not None)
            for speakers, skeleton in self._skeletons.items()
            for speaker, after in zip(speakers, skeleton.segments[1:], strict=True)
            if speaker == "assistant"
        }
        if self._controls.eos.token_id not in ends:
            logger.warning(
                "the chat template ends answers with token ids %s, but the tokenizer's EOS is %s: "
                "serving must stop at the former",
                sorted(ends),
                self._controls.eos.token_id,
            )
        return works[1], not works[0], frozenset(ends)


def _pattern(spelled: frozenset[str]) -> re.Pattern[str]:
    longest_first = sorted(spelled, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})")


def _match(text: str, texts: tuple[str, ...], contents: list[str]) -> list[str] | None:
    """Locate contents in a rendered text, unchanged or without whitespace at their ends.

    Returns:
        The contents as found in the text; None if the text does not match.
    """
    # All partial matches, by their end position; unchanged contents come first.
    matches: dict[int, list[str]] = {len(texts[0]): []} if text.startswith(texts[0]) else {}
    for content, between in zip(contents, texts[1:], strict=True):
        candidates = (content, content.strip(), content.rstrip(), content.lstrip())
        longer: dict[int, list[str]] = {}
        for place, found in matches.items():
            for candidate in dict.fromkeys(candidates):
                if text.startswith(candidate + between, place):
                    end = place + len(candidate) + len(between)
                    longer.setdefault(end, [*found, candidate])
        matches = longer
    return matches.get(len(text))
