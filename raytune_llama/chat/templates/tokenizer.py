"""The tokenizer's own Jinja chat template, with every content located exactly.

A template is a Jinja program: it may change contents, reorder or drop them. So it is first rendered
with a placeholder for each content, which gives the texts between them; then the real conversation
is rendered, and must consist of these texts and the contents, each unchanged or without whitespace
at its ends. Anything else is rejected, not guessed.

The loss covers everything from the end of the generation prompt up to and including the control
token after the answer. The template needs no {% generation %} markers for that.

Turns of prompts may have any order, and a prompt may have options. Training's conversations have
neither, so that their answers must begin where the generation prompt ends.
"""

import inspect
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerFast

from raytune_llama.chat.conversations import Conversation, Role
from raytune_llama.chat.templates.options import OPTIONS_FIELD, find_texts, find_variables
from raytune_llama.chat.templates.segments import (
    NO_OPTIONS,
    PromptBoundary,
    Segment,
    UnrenderableError,
    find_control_tokens,
)
from raytune_llama.chat.tools import ChatMessage, ToolCall, join_tool_messages, place_tools
from raytune_llama.config.errors import UserError
from raytune_llama.storage.hashes import hash_bytes
from raytune_llama.tokenizer.loader import control_token_strings

logger = logging.getLogger(__name__)

_VERSION = 1
_DATE = "26 Jul 2024"  # the default date of LLaMA 3's templates
_PROBED_TOOL = "probed_tool_X7q9k2"
_PLACEHOLDER = "Content{}OfX7q9k2"
_GIVEN = frozenset(
    {
        *("messages", "conversations", "tools", "documents", "add_generation_prompt"),
        *("date_string", "strftime_now", "raise_exception"),
    }
)
"""Variables that every rendering gives to a template; options can't set them."""
_FAILURES = (
    jinja2.TemplateError,
    # A template may calculate with an option, or look something up in it.
    *(TypeError, ValueError, ArithmeticError, LookupError, AttributeError),
)
"""Errors of a template that can't render what it is given."""
_MAX_CACHED_CHARACTERS = 2_000_000
"""Size of the cache of rendered shapes; requests may have any number of them."""


@dataclass(frozen=True, slots=True)
class _Speaker:
    """What the shape of a rendered message depends on."""

    role: Role
    is_masked: bool = False
    has_reasoning: bool = False


@dataclass(frozen=True, slots=True)
class _Slot:
    """A content in the output of a template."""

    message: int
    """Index of its message."""
    is_reasoning: bool
    """Whether it is the message's reasoning, which the template may drop in earlier turns."""


@dataclass(frozen=True, slots=True)
class _RenderedShape:
    """Output of a template for a sequence of speakers, without the contents."""

    slots: tuple[_Slot, ...]
    """The contents in it."""
    texts: tuple[str, ...]
    """Texts before, between and after the contents."""
    segments: tuple[tuple[Segment, ...], ...]
    """The texts, split at control tokens."""


_ShapeKey = tuple[tuple[_Speaker, ...], str]
"""Speakers of a conversation, and the options in JSON."""


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
        self._skeletons: dict[_ShapeKey, _RenderedShape] = {}
        self._num_cached_characters = 0
        if tokenizer.chat_template is None:
            raise UserError(
                f"template: {tokenizer.name_or_path} has no chat template; set another template, "
                "or add the model's chat_template.jinja to that directory"
            )
        text = tokenizer.get_chat_template()
        self._check_date(text)
        self._content = json.dumps([self.name, _VERSION, _DATE, text], ensure_ascii=False).encode()
        self.allows_system, self.needs_system, self.stop_ids = self._probe()
        self.variables = find_variables(text) - _GIVEN - self._find_reserved()

    def hash(self, like: str | None = None) -> str:
        """See `Template.hash`."""
        return hash_bytes(self._content, like)

    def render(
        self, conversation: Conversation, options: Mapping[str, Any] = NO_OPTIONS
    ) -> list[Segment]:
        """See `Template.render`."""
        self._check_options(options)
        speakers = [
            _Speaker(
                turn.role, turn.role == "assistant" and not turn.is_trained, bool(turn.reasoning)
            )
            for turn in conversation.turns
        ]
        contents = [(turn.reasoning or "", turn.content) for turn in conversation.turns]
        if conversation.system is not None:
            speakers.insert(0, _Speaker("system"))
            contents.insert(0, ("", conversation.system))
        skeleton = self._get_rendered_shape(tuple(speakers), options, _name_messages(conversation))
        text = self._write(speakers, contents, options)
        said = [contents[slot.message][not slot.is_reasoning] for slot in skeleton.slots]
        spans = _match(text, skeleton.texts, said)
        if spans is None:
            raise UnrenderableError(
                "the chat template changes contents by more than stripping whitespace"
            )
        written = list(skeleton.segments[0])
        for slot, span, between in zip(skeleton.slots, spans, skeleton.segments[1:], strict=True):
            speaker = speakers[slot.message]
            is_answer = speaker.role == "assistant"
            written.append(
                Segment(speaker.role, span, is_target=is_answer, is_masked=speaker.is_masked)
            )
            written += between
        return written

    def has_other_tool_format(self) -> bool:
        """Whether the template itself writes tools, but not as `raytune_llama.chat.tools` does."""
        tool = {"type": "function", "function": {"name": _PROBED_TOOL, "parameters": {}}}
        own = self._write_own_tools(tool, {"a": 1}) or self._write_own_tools(tool, '{"a": 1}')
        if own is None or _PROBED_TOOL not in own:
            return False
        said = [
            ChatMessage("user", "B"),
            ChatMessage("assistant", "", (ToolCall(_PROBED_TOOL, '{"a": 1}'),)),
            ChatMessage("tool", "D"),
            ChatMessage("assistant", "E"),
        ]
        ours = Conversation(join_tool_messages(said).turns, "A", tools=(json.dumps(tool),))
        try:
            written = self.render(place_tools(ours, allows_system=self.allows_system))
        except UnrenderableError:
            return True
        return "".join(segment.text for segment in written) != own

    def _write_own_tools(self, tool: dict[str, Any], arguments: object) -> str | None:
        """Render a conversation with a tool as the template does; None if it fails."""
        call = {"id": "c", "function": {"name": _PROBED_TOOL, "arguments": arguments}}
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": "A"},
            {"role": "user", "content": "B"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "name": _PROBED_TOOL, "content": "D"},
            {"role": "assistant", "content": "E"},
        ]
        try:
            own = self._tokenizer.apply_chat_template(
                messages, tools=[tool], tokenize=False, date_string=_DATE
            )
        except (jinja2.TemplateError, TypeError, ValueError):
            return None
        return str(own)

    def _find_reserved(self) -> set[str]:
        """Return the names of special tokens, and of parameters of transformers."""
        tokens = {*self._tokenizer.SPECIAL_TOKENS_ATTRIBUTES, *self._tokenizer.special_tokens_map}
        return tokens | set(inspect.signature(self._tokenizer.apply_chat_template).parameters)

    def _check_options(self, options: Mapping[str, Any]) -> None:
        """Check that no option writes a control token: only the template does."""
        for name, value in options.items():
            found = next(filter(None, map(self._spelled.search, find_texts(value))), None)
            if found is not None:
                raise UserError(
                    f"{OPTIONS_FIELD}.{name}: has the control token {found[0]!r}; only the chat "
                    "template writes control tokens, so remove it"
                )

    def _write(
        self,
        speakers: Sequence[_Speaker],
        contents: Sequence[tuple[str, str]],
        options: Mapping[str, Any],
        *,
        is_prompt: bool = False,
    ) -> str:
        """Render a conversation, as a generation prompt if its last turn is not the assistant's.

        Args:
            speakers: Author of each message.
            contents: Reasoning and content of each message.
            options: Values of the template's variables.
            is_prompt: Whether it is a generation prompt whatever its last turn is.
        """
        is_prompt = is_prompt or speakers[-1].role != "assistant"
        messages = [
            {"role": speaker.role, "content": content}
            | ({"reasoning_content": reasoning} if speaker.has_reasoning else {})
            for speaker, (reasoning, content) in zip(speakers, contents, strict=True)
        ]
        try:
            written = self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=is_prompt,
                date_string=_DATE,
                **options,
            )
        except _FAILURES as error:
            raise UnrenderableError(f"the chat template fails: {error}") from error
        assert isinstance(written, str)
        return written

    def _get_rendered_shape(
        self,
        speakers: tuple[_Speaker, ...],
        options: Mapping[str, Any] = NO_OPTIONS,
        names: Sequence[str] | None = None,
    ) -> _RenderedShape:
        key = (speakers, json.dumps(dict(options), sort_keys=True))
        shape = self._skeletons.get(key)
        if shape is None:
            shape = self._build_rendered_shape(
                speakers, options, names or [f"message {number}" for number in range(len(speakers))]
            )
            self._num_cached_characters += sum(map(len, shape.texts)) + len(key[1])
            if self._num_cached_characters > _MAX_CACHED_CHARACTERS:
                self._skeletons.clear()
                self._num_cached_characters = 0
            self._skeletons[key] = shape
        return shape

    def _build_rendered_shape(
        self, speakers: Sequence[_Speaker], options: Mapping[str, Any], names: Sequence[str]
    ) -> _RenderedShape:
        contents = [
            (_PLACEHOLDER.format(f"{number}Reasoning"), _PLACEHOLDER.format(number))
            for number in range(len(speakers))
        ]
        text = self._write(speakers, contents, options)
        slots, places = _find_slots(text, speakers, contents, names)
        texts = [text[start:stop] for start, stop in list(pairwise(places))[::2]]
        said = [0] * len(texts)
        for number, slot in enumerate(slots):
            if speakers[slot.message].role != "assistant":
                continue
            if number and slots[number - 1].message == slot.message:
                said[number] = len(texts[number])  # between reasoning and answer
                continue
            start, stop = places[2 * number], places[2 * number + 1]
            said[number] = self._count_said(
                text[:stop], start, speakers[: slot.message], contents[: slot.message], options
            )
        # Between reasoning and answer nothing ends.
        authors = [speakers[slot.message] for slot in slots]
        ended = [
            author if author.role == "assistant" and not slot.is_reasoning else None
            for author, slot in zip(authors, slots, strict=True)
        ]
        segments = tuple(
            self._split(*part)
            for part in zip(texts, said, [None, *ended], [*authors, None], strict=True)
        )
        return _RenderedShape(tuple(slots), tuple(texts), segments)

    def _count_said(
        self,
        text: str,
        start: int,
        speakers: Sequence[_Speaker],
        contents: Sequence[tuple[str, str]],
        options: Mapping[str, Any],
    ) -> int:
        """Return how many characters at the end of a text the assistant says itself.

        These are all after the generation prompt. Where training never has such a prompt, a
        template may write another one before its answers: then they begin with their content.

        Args:
            text: Rendered text up to the content of an answer.
            start: End of the content before it.
            speakers: Authors of the messages before it.
            contents: Contents of these messages.
            options: Values of the template's variables.

        Raises:
            UnrenderableError: The text does not begin with the prompt of an answer that training
                may have.
        """
        is_trained = not options and bool(speakers) and speakers[-1].role == "user"
        try:
            prompt = self._write(speakers, contents, options, is_prompt=True)
        except UnrenderableError:
            if is_trained:
                raise
            return 0
        if text.startswith(prompt) and len(prompt) >= start:
            return len(text) - len(prompt)
        if is_trained:
            raise UnrenderableError(
                "the generation prompt of the chat template is not a prefix of its answers"
            )
        return 0

    def _split(
        self, text: str, num_said: int, ended: _Speaker | None, after: _Speaker | None
    ) -> tuple[Segment, ...]:
        """Split a template's text at control tokens.

        Args:
            text: Text between two contents.
            num_said: Number of characters at its end that belong to the next answer.
            ended: Author of the answer before it, which its first control token ends; None: none.
            after: Author of the content after it; None: it is the last text.
        """
        head, said = text[: len(text) - num_said], text[len(text) - num_said :]
        segments: list[Segment] = []
        is_target = ended is not None
        is_masked = ended is not None and ended.is_masked
        for part in filter(None, self._spelled.split(head)):
            segments.append(
                self._segment(part, is_target=is_target, is_masked=is_target and is_masked)
            )
            is_target = is_target and segments[-1].token_id is None
        if is_target:
            raise UnrenderableError("the chat template ends an answer without a control token")
        is_masked = after is not None and after.is_masked
        parts = filter(None, self._spelled.split(said))
        return (
            *segments,
            *(self._segment(part, is_target=True, is_masked=is_masked) for part in parts),
        )

    def _segment(self, part: str, *, is_target: bool, is_masked: bool) -> Segment:
        if not self._spelled.fullmatch(part):
            return Segment("template", part, is_target=is_target, is_masked=is_masked)
        token_id = self._tokenizer.convert_tokens_to_ids(part)
        assert isinstance(token_id, int)
        return Segment("control", part, token_id, is_target=is_target, is_masked=is_masked)

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
        one, errors = (_Speaker("user"), _Speaker("assistant")), []
        works: list[bool] = []
        for start in ((), (_Speaker("system"),)):
            try:
                self._get_rendered_shape((*start, *one, *one))
                self._get_rendered_shape((*start, one[0]))
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
            for (speakers, _), skeleton in self._skeletons.items()
            for slot, after in zip(skeleton.slots, skeleton.segments[1:], strict=True)
            if speakers[slot.message].role == "assistant"
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


def _name_messages(conversation: Conversation) -> list[str]:
    """Return how errors name the rendered messages: as the request counts them, if it is one."""
    num_systems = int(conversation.system is not None)
    places = conversation.places
    if not places:
        return [f"message {number}" for number in range(num_systems + len(conversation.turns))]
    return [*["messages.0"] * num_systems, *(f"messages.{place}" for place in places)]


def _find_slots(
    text: str,
    speakers: Sequence[_Speaker],
    placeholders: Sequence[tuple[str, str]],
    names: Sequence[str],
) -> tuple[list[_Slot], list[int]]:
    """Return the contents in a rendered text, and the ends of the texts around them, from 0.

    Args:
        text: Rendered text.
        speakers: Author of each message.
        placeholders: Reasoning and content of each message in the text.
        names: Name of each message in errors.

    Raises:
        UnrenderableError: A content is missing, repeated or out of order. Reasoning may be missing
            in any message but the last: templates drop it from earlier turns.
    """
    slots: list[_Slot] = []
    places = [0]
    for number, speaker in enumerate(speakers):
        for is_reasoning in (True, False):
            placeholder = placeholders[number][not is_reasoning]
            times = text.count(placeholder)
            if is_reasoning and (
                not speaker.has_reasoning or (not times and number + 1 < len(speakers))
            ):
                continue
            if is_reasoning and not times:
                raise UnrenderableError("the chat template does not take reasoning_content")
            if times != 1 or text.index(placeholder) < places[-1]:
                what = "reasoning" if is_reasoning else "content"
                raise UnrenderableError(
                    f"the chat template renders the {speaker.role} {what} of {names[number]} "
                    f"{times} times, or out of order"
                )
            places += [text.index(placeholder), text.index(placeholder) + len(placeholder)]
            slots.append(_Slot(number, is_reasoning))
    return slots, [*places, len(text)]


def _match(text: str, texts: tuple[str, ...], contents: list[str]) -> list[str] | None:
    """Locate contents in a rendered text, unchanged or without whitespace at their ends.

    Returns:
        The contents as found in the text; None if the text does not match.
    """
    # All partial matches, by their end position; unchanged contents come first.
    matches: dict[int, list[str]] = {len(texts[0]): []} if text.startswith(texts[0]) else {}
    for content, between in zip(contents, texts[1:], strict=True):
        candidates = (
            *(content, content.strip(), content.rstrip(), content.lstrip()),
            *(content.strip("\n"), content.rstrip("\n"), content.lstrip("\n")),
        )
        longer: dict[int, list[str]] = {}
        for place, found in matches.items():
            for candidate in dict.fromkeys(candidates):
                if text.startswith(candidate + between, place):
                    end = place + len(candidate) + len(between)
                    longer.setdefault(end, [*found, candidate])
        matches = longer
    return matches.get(len(text))
