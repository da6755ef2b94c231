"""Preview of a corpus: some documents or conversations as the tokens that training will see.

    print(render_preview(config, tokenizer_path, num_documents=3, color=True))

Rows are spread over the files of a source and over the heads of these files, and are the same in
every run. Nothing is built.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerFast

from raytune_llama.chat.conversations import Defect
from raytune_llama.chat.encoding import EncodedConversation, build_chat_encoder
from raytune_llama.chat.formats import read_row
from raytune_llama.chat.row_fields import KeyCounts
from raytune_llama.chat.truncation import truncate
from raytune_llama.config.settings import override
from raytune_llama.data.build.chat_corpus import ChatCorpus, source_field
from raytune_llama.data.build.preparation import open_data
from raytune_llama.data.build.sample import HeadRow, choose_rows, read_heads
from raytune_llama.data.build.text_corpus import document_ends, keep_store_bos
from raytune_llama.data.config import AnyDataConfig, ChatDataConfig, DataConfig
from raytune_llama.data.filters.cleaning import Cleaner
from raytune_llama.data.readers.rows import BadRow, excerpt
from raytune_llama.storage.place import Place
from raytune_llama.tokenizer.loader import control_token_ids, encode_text

_RESET, _CONTROL, _DIM = "\x1b[0m", "\x1b[1;97;45m", "\x1b[2;4m"
_COLORS = ("\x1b[30;48;5;153m", "\x1b[30;48;5;229m", "\x1b[30;48;5;157m")
_MAX_TOKENS = 400  # shown per document, and per conversation and kind of token
_MAX_SPAN = 120  # tokens of one turn that are shown, half of them at its end
_MAX_CUT = 24
_MAX_GROUP = 8  # tokens that can make up one character
_BROKEN = "\ufffd"  # what a part of a character decodes to
_CONTEXT = 16  # tokens before one that can change its text
_MAX_BAD = 5  # unusable rows shown per source in addition to the chosen ones

_Kind = Literal["learned", "masked", "cut"]
_STYLES: dict[_Kind, tuple[str, str]] = {
    "learned": ("\x1b[30;48;5;157m", "\x1b[30;48;5;114m"),
    "masked": ("\x1b[30;48;5;254m", "\x1b[30;48;5;250m"),
    "cut": ("\x1b[2;9m", "\x1b[2;9m"),
}
_CONTROLS: dict[_Kind, str] = {
    "learned": "\x1b[1;97;48;5;28m",
    "masked": _CONTROL,
    "cut": "\x1b[2;9;35m",
}
_MEANINGS: dict[_Kind, str] = {
    "learned": "tokens that the loss covers",
    "masked": "the rest of the conversation, which is only read",
    "cut": "tokens that data.chat.truncation removes",
}


@dataclass(frozen=True)
class _Shown:
    """Text decoded from one token, or from several that form whole characters only together."""

    text: str
    num_tokens: int
    is_control: bool

    @property
    def escaped(self) -> str:
        """The text in one line, with a dot for each further token."""
        text = self.text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
        return text + "." * (self.num_tokens - 1)


def render_preview(
    config: AnyDataConfig, tokenizer_path: Path, *, num_documents: int, color: bool
) -> str:
    """Return some documents or conversations of each source with their token boundaries.

    Control tokens are shown by name. Text that needs n tokens for whole characters is followed by
    n - 1 dots. Of conversations, it is shown which tokens are learned and which are cut. A row that
    is unusable, dropped or left out is shown with its reason.

    With colors, the first token of a document is underlined: it is never a target, as nothing
    precedes it.

    Args:
        config: Sources, and how their rows become token ids.
        tokenizer_path: Directory of the tokenizer.
        num_documents: Number of documents or conversations per source.
        color: Whether to mark tokens with ANSI colors; otherwise "|" separates them.

    Raises:
        ConfigError: The config has problems; lists all of them.
        SourceError: A file cannot be read as configured.
    """
    inputs = open_data(config, tokenizer_path)
    corpus = inputs.corpus
    show: _TextPreview | _ChatPreview
    if isinstance(config, ChatDataConfig):
        assert isinstance(corpus, ChatCorpus)
        show = _ChatPreview(corpus, color=color)
    else:
        show = _TextPreview(config, inputs.tokenizer, color=color)
    lines = show.legend()
    for number in range(len(config.all_sources)):
        files = [file for file in corpus.files if file.source == number]
        heads = read_heads(files, num_documents)
        rows = choose_rows(heads, num_documents)
        lines += show.header(number, heads, len(files))
        for row in [*rows, *_first_unusable(heads, rows, show)]:
            lines += [*show.render(row), ""]
    return "\n".join(lines)


def _first_unusable(
    heads: Sequence[Sequence[HeadRow]],
    shown: Sequence[HeadRow],
    preview: "_TextPreview | _ChatPreview",
) -> list[HeadRow]:
    """Return the first row for each reason why rows are unusable that is not shown anyway."""
    seen = {preview.find_reason(row) for row in shown}
    found: list[HeadRow] = []
    for head in heads:
        for row in head:
            reason = preview.find_reason(row)
            if reason is not None and reason not in seen and len(found) < _MAX_BAD:
                seen.add(reason)
                found.append(row)
    return found


class _TextPreview:
    """Shows documents of plain text."""

    def __init__(
        self, config: DataConfig, tokenizer: PreTrainedTokenizerFast, *, color: bool
    ) -> None:
        place = Place.parse(config.store_dir, "data.store_dir")
        kept = keep_store_bos(config, tokenizer, place)
        assert isinstance(kept, DataConfig)
        self._ends = document_ends(kept, tokenizer)
        self._cleaner = Cleaner(config.cleaning)
        self._tokenizer = tokenizer
        self._color = color

    def legend(self) -> list[str]:
        """Return the lines before all sources."""
        return []

    def header(self, source: int, heads: Sequence[Sequence[HeadRow]], num_files: int) -> list[str]:
        """Return the lines before the documents of a source."""
        del source, heads, num_files  # each document has its source's number
        return []

    def find_reason(self, row: HeadRow) -> str | None:
        """Return why a row is unusable; None if it is not."""
        return row.value.reason if isinstance(row.value, BadRow) else None

    def render(self, row: HeadRow) -> list[str]:
        """Return a document as lines: a title and its tokens."""
        title = f"source {row.file.source}, {row.place}: "
        if not isinstance(row.value, str):
            assert isinstance(row.value, BadRow)
            return [f"{title}unusable: {row.value.reason}: {row.value.detail}"]
        text, reason = self._cleaner.clean(row.value)
        if reason is not None:
            return [f"{title}dropped by data.cleaning: {reason}", f"  {excerpt(text)}"]
        before, after = ([] if id_ is None else [id_] for id_ in self._ends)
        ids = [*before, *encode_text(self._tokenizer, [text])[0], *after]
        return [
            f"{title}{len(text.encode())} bytes, {len(ids)} tokens",
            _render_document(ids, self._tokenizer, color=self._color),
        ]


def _render_document(ids: list[int], tokenizer: PreTrainedTokenizerFast, *, color: bool) -> str:
    parts: list[str] = []
    for number, shown in enumerate(_grouped(ids, 0, min(len(ids), _MAX_TOKENS), tokenizer)):
        text = shown.escaped
        if not color:
            parts.append(f"[{text}]" if shown.is_control else text)
            continue
        style = _CONTROL if shown.is_control else _COLORS[number % len(_COLORS)]
        parts.append(f"{style}{_DIM if number == 0 else ''}{text}{_RESET}")
    more = f" ... {len(ids) - _MAX_TOKENS} more tokens" if len(ids) > _MAX_TOKENS else ""
    return ("" if color else "|").join(parts) + more


class _ChatPreview:
    """Shows conversations, and which of their tokens are learned or cut."""

    def __init__(self, corpus: ChatCorpus, *, color: bool) -> None:
        chat = corpus.config.chat
        self._corpus = corpus
        self._encoder = build_chat_encoder(corpus.tokenizer, chat)
        # The same rows before they are cut, with the targets that decide what is cut.
        uncut = override(chat, {"max_tokens": None, "train_on_prompt": False})
        self._uncut_encoder = build_chat_encoder(corpus.tokenizer, uncut)
        self._color = color

    def legend(self) -> list[str]:
        """Return the lines before all sources."""
        lines: list[str] = []
        for kind, meaning in _MEANINGS.items():
            name = f"{_STYLES[kind][0]}{kind}{_RESET}" if self._color else kind
            lines.append(f"{name}{' ' * (9 - len(kind))}{meaning}")
        if self._color:
            learned, masked = _CONTROLS["learned"], _CONTROLS["masked"]
            control = f"{learned}name{_RESET} or {masked}name{_RESET} is a learned or masked"
            between = "shades alternate by token"
        else:
            control, between = "[name] is a", "| separates tokens"
        ends = f"{control} control token; {between}; a dot after one is another token of its text"
        return [*lines, ends, ""]

    def header(self, source: int, heads: Sequence[Sequence[HeadRow]], num_files: int) -> list[str]:
        """Return the lines before the conversations of a source."""
        field = source_field(self._corpus.config, source)
        found = [self.find_reason(row) for head in heads for row in head]
        reasons = Counter(reason for reason in found if reason is not None)
        listed = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        return [
            f"{field}, rows in the format {self._corpus.formats[source].name}: "
            f"{sum(map(len, heads)):,} rows read from the beginnings of {len(heads)} of "
            f"{num_files} files, {reasons.total():,} unusable{f': {listed}' if listed else ''}",
            "",
        ]

    def find_reason(self, row: HeadRow) -> str | None:
        """Return why a row is unusable; None if it is not, whatever its length."""
        if isinstance(row.value, BadRow):
            return row.value.reason
        assert isinstance(row.value, dict)
        read = read_row(row.value, self._corpus.formats[row.file.source], KeyCounts())
        return read.reason if isinstance(read, Defect) else None

    def render(self, row: HeadRow) -> list[str]:
        """Return a conversation as lines: a title and its tokens."""
        if isinstance(row.value, BadRow):
            return [f"{row.place}: unusable: {row.value.reason}: {row.value.detail}"]
        assert isinstance(row.value, dict)
        content = f"  {excerpt(json.dumps(row.value, ensure_ascii=False))}"
        counts = KeyCounts()
        read = read_row(row.value, self._corpus.formats[row.file.source], counts)
        if isinstance(read, Defect):
            return [f"{row.place}: unusable: {read.reason}: {read.detail}", content]
        repairs = ", ".join(+counts.repaired)
        repaired = f", repaired: {repairs}" if repairs else ""
        (made,), (uncut,) = self._encoder.encode([read]), self._uncut_encoder.encode([read])
        if isinstance(uncut, Defect):
            return [f"{row.place}: left out: {uncut.reason}: {uncut.detail}{repaired}", content]
        if isinstance(made, Defect):
            kinds: list[_Kind] = ["cut"] * len(uncut.ids)
            title = f"left out: {made.reason}: {made.detail}"
        else:
            kinds = self._kinds(uncut, made)
            title = f"{len(uncut.ids)} tokens, {kinds.count('learned')} learned"
            title += f", {made.num_cut} cut" if made.num_cut else ""
            title += ", an answer lost its question" if made.lost_prompt else ""
        return [f"{row.place}: {title}{repaired}", *self._render(uncut.ids.tolist(), kinds)]

    def _kinds(self, uncut: EncodedConversation, made: EncodedConversation) -> list[_Kind]:
        """Return what becomes of each token of a conversation."""
        kinds = np.full(len(uncut.ids), "cut", dtype="<U7")
        chat, kept = self._corpus.config.chat, np.arange(len(uncut.ids))
        if made.num_cut:
            assert chat.max_tokens is not None, "something was cut"
            begins = bool(uncut.ids[0] == self._corpus.tokenizer.bos_token_id)
            kept = truncate(uncut.targets, chat.max_tokens, chat.truncation, begins_with_bos=begins)
        assert np.array_equal(uncut.ids[kept], made.ids), "truncated in two ways"
        kinds[kept] = np.where(made.targets, "learned", "masked")
        return kinds.tolist()

    def _render(self, ids: list[int], kinds: list[_Kind]) -> list[str]:
        left = Counter(dict.fromkeys(_MEANINGS, _MAX_TOKENS))
        lines: list[str] = []
        start = 0
        for kind, group in groupby(kinds):
            stop = start + len(list(group))
            most = min(_MAX_CUT if kind == "cut" else _MAX_SPAN, left[kind])
            left[kind] -= min(most, stop - start)
            shown = self._render_span(ids, kind, (start, stop), most)
            lines.append(shown if self._color else f"  {kind:<9}{shown}")
            start = stop
        return [f"  {''.join(lines)}"] if self._color else lines

    def _render_span(self, ids: list[int], kind: _Kind, span: tuple[int, int], most: int) -> str:
        """Return tokens of one kind as text, only the first and last of many."""
        start, stop = span
        if stop - start <= most:
            return self._join(_grouped(ids, start, stop, self._corpus.tokenizer), kind)
        num_first = most if kind == "cut" else most - most // 2
        head: list[_Shown] = []
        for shown in _grouped(ids, start, stop, self._corpus.tokenizer):
            if sum(each.num_tokens for each in head) >= num_first:
                break
            head.append(shown)
        tail = list(_grouped(ids, stop - (most - num_first), stop, self._corpus.tokenizer))
        while tail and _BROKEN in tail[0].text:  # it begins within a character
            tail.pop(0)
        left = stop - start - sum(each.num_tokens for each in [*head, *tail])
        return (
            f"{self._join(head, kind)} ... {left} more tokens {kind} ... {self._join(tail, kind)}"
        )

    def _join(self, tokens: Iterable[_Shown], kind: _Kind) -> str:
        parts: list[str] = []
        for number, shown in enumerate(tokens):
            if not self._color:
                parts.append(f"[{shown.escaped}]" if shown.is_control else shown.escaped)
                continue
            style = _CONTROLS[kind] if shown.is_control else _STYLES[kind][number % 2]
            parts.append(f"{style}{shown.escaped}{_RESET}")
        return ("" if self._color else "|").join(parts)


def _grouped(
    ids: list[int], start: int, stop: int, tokenizer: PreTrainedTokenizerFast
) -> Iterator[_Shown]:
    """Group the tokens [start, stop) until they decode to whole characters."""
    controls = control_token_ids(tokenizer)
    while start < stop:
        if ids[start] in controls:
            name = str(tokenizer.convert_ids_to_tokens(ids[start]))
            yield _Shown(name, 1, is_control=True)
            start += 1
            continue
        end = start + 1
        text = _text(ids, start, end, tokenizer)
        most = min(stop, start + _MAX_GROUP)
        while _BROKEN in text and end < most:
            end += 1
            text = _text(ids, start, end, tokenizer)
        yield _Shown(text, end - start, is_control=False)
        start = end


def _text(ids: list[int], start: int, stop: int, tokenizer: PreTrainedTokenizerFast) -> str:
    """Decode tokens [start, stop) in context: decoded alone, the first one can lose a space."""
    first = max(0, start - _CONTEXT)
    before = str(tokenizer.decode(ids[first:start]))
    return str(tokenizer.decode(ids[first:stop]))[len(before) :]
