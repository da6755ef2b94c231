"""Rows in the replies of a model, whatever it made of the JSON that it was asked for.

    parsed = parse_items(text)
    for item in parsed.items:
        row = check_item(item, prompt, rules)      # a Row, or why it is none

A reply is read as strict JSON; otherwise its list of objects is looked for, in fenced code or in
prose. Its objects are read one by one, strictly where they are valid, also if the list is cut off.
Others are repaired, but only as long as no letter of their text is lost. An object that is cut off
is never kept: its text would end in the middle.
"""

import contextlib
import itertools
import json
import re
from dataclasses import dataclass, replace
from typing import Any, Literal

import json_repair

from raytune_llama.chat.conversations import Defect
from raytune_llama.chat.formats import RowFormat, read_row
from raytune_llama.chat.row_fields import KeyCounts
from raytune_llama.generate.make_data.config import FilterConfig
from raytune_llama.generate.make_data.prompt import Prompt
from raytune_llama.storage.files import RepeatedKeys, build_object

FIELDS = ("instruction", "input", "output")
"""Fields of a row."""

# Line breaks and tabs in strings are accepted as they are.
_DECODER = json.JSONDecoder(strict=False, object_pairs_hook=build_object)
_REASONING = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)
_LIST_START = re.compile(r"\[\s*[{\]]")
_OBJECT_START = re.compile(r"\{\s*[\"'“]")
_BETWEEN_ITEMS = re.compile(r"[\s,]*")
_FIRST_QUOTE = re.compile(r"\{\s*([\"'])")
_ITEM_START = re.compile(r"\{\s*[\"'“]?instruction\b")
_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{4}|.)", re.DOTALL)
_QUOTE_OR_BRACE = re.compile(r"[\"{}]")
_TYPE_NAMES = {list: "an array", dict: "an object", bool: "a boolean", type(None): "null"}


class InvalidItem(str):
    """Text of an item that is invalid JSON and cannot be repaired without a loss."""

    __slots__ = ()


@dataclass(frozen=True)
class ParsedReply:
    """Items of a reply, of any type."""

    items: list[Any]
    """Complete items, in their order."""

    form: Literal["json", "extracted", "repaired"]
    """`json`: all of the reply was JSON; `extracted`: JSON within other text, or the complete items
    of a list that is cut off; `repaired`: some items were invalid JSON and were repaired."""

    cut_off: str | None = None
    """Text of an item that is cut off; None if there is none."""


@dataclass(frozen=True)
class Row:
    """A row that may be kept."""

    instruction: str
    """What to do; never blank."""

    input: str
    """Material for it; may be empty."""

    output: str
    """The answer; never blank."""

    ignored_fields: tuple[str, ...] = ()
    """Names of other fields that the item had."""

    def to_json(self) -> dict[str, str]:
        """Return the row as an object of the Alpaca format."""
        return {"instruction": self.instruction, "input": self.input, "output": self.output}


@dataclass(frozen=True)
class Rejection:
    """Why an item or a reply is no row."""

    reason: str
    """Reason, by which rejections are counted."""

    detail: str
    """Facts about it."""


def parse_items(text: str) -> ParsedReply | Rejection:
    """Find the items in the text of a reply.

    Returns:
        The items; or a rejection if the text has no JSON, or an empty list.
    """
    text = _REASONING.sub("", text.removeprefix("\ufeff"))
    try:
        items = _listed(json.loads(text, object_pairs_hook=build_object))
        parsed = ParsedReply(items, "json") if items is not None else None
    except (ValueError, RecursionError):
        parsed = _extract(text)
    if parsed is None:
        return Rejection("not_json", "the reply has no JSON object")
    if not parsed.items and parsed.cut_off is None:
        return Rejection("empty_list", "the reply is a list without an item")
    return parsed


def _listed(value: object) -> list[Any] | None:
    """Return the items of a JSON value: its own, or those of the only list in an object."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        return None
    lists = [inner for inner in value.values() if isinstance(inner, list)]
    return lists[0] if len(lists) == 1 and "instruction" not in value else [value]


def _extract(text: str) -> ParsedReply | None:
    """Find the items in text that is not JSON as a whole; None if it has none."""
    lists, objects = _LIST_START.search(text), _OBJECT_START.search(text)
    # Objects one after the other, or one around the list; the latter is invalid if it is cut off.
    if objects and not (lists and lists.start() < objects.start()):
        items, rest, is_closed = _read_complete(text[objects.start() :])
        if items:
            return _parse_rest((_listed(items[0]) or []) + items[1:], rest, is_closed=is_closed)
    start = lists or objects
    if start is None:
        return None
    items, rest, is_closed = _read_complete(text[start.start() :])
    return _parse_rest(items, rest, is_closed=is_closed)


def _parse_rest(items: list[Any], rest: str, *, is_closed: bool) -> ParsedReply:
    """Return the items that were read strictly, and what can be read of the rest."""
    if is_closed and _ITEM_START.search(rest):
        # Such as a numbered list of objects, or a block of code for each.
        more = _extract(rest)
        if more is None:
            return ParsedReply(items, "extracted", cut_off=rest)
        return replace(more, items=items + more.items)
    if is_closed or not rest.strip(" \t\r\n`"):
        return ParsedReply(items, "extracted")
    body, _, after = rest.rpartition("]")
    quote = match[1] if (match := _FIRST_QUOTE.match(rest)) else '"'
    # A bracket may also be the last character before a reply is cut off within a text.
    end = re.search(rf"(?<!\\){quote}\s*,?\s*\}}\s*,?\s*$", body)
    is_whole = end is not None and not _QUOTE_OR_BRACE.search(after)
    body = body if is_whole else rest
    starts = [0, *(found.start() for found in _ITEM_START.finditer(body, 1)), len(body)]
    chunks = [body[start:stop] for start, stop in itertools.pairwise(starts)]
    read = [_read_chunk(chunk) for chunk in chunks]
    cut_off = chunks[-1] if read[-1][1] and not is_whole else None
    complete = read if cut_off is None else read[:-1]
    is_repaired = any(is_invalid for _, is_invalid in complete)
    items = items + [item for item, _ in complete]
    return ParsedReply(items, "repaired" if is_repaired else "extracted", cut_off)


def _read_chunk(chunk: str) -> tuple[Any, bool]:
    """Return the item in a part of a list that has one, and whether it is invalid JSON."""
    with contextlib.suppress(ValueError, RecursionError):
        item, end = _DECODER.raw_decode(chunk)
        if not _QUOTE_OR_BRACE.search(chunk, end):
            return item, False
    try:
        item = json_repair.loads(chunk)
    except (ValueError, RecursionError):
        return InvalidItem(chunk), True
    if not isinstance(item, dict) or not set(item) <= set(FIELDS):
        return InvalidItem(chunk), True
    # The repair may leave text out, such as after a quotation mark.
    said = "".join(f"{name}{value}" for name, value in item.items())
    if _letters(said) != _letters(_ESCAPE.sub("", chunk)):
        return InvalidItem(chunk), True
    return item, True


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text))


def _read_complete(body: str) -> tuple[list[Any], str, bool]:
    """Read objects strictly, up to the end of the list or the first that is invalid.

    Returns:
        The objects; the text after them; and whether they end there.
    """
    is_list = body.startswith("[")
    items: list[Any] = []
    position = 1 if is_list else 0
    while True:
        start = _BETWEEN_ITEMS.match(body, position)
        position = start.end() if start else position
        if body.startswith("]", position):
            return items, body[position + 1 :], True
        if not body.startswith("{", position):
            # Objects without brackets, such as one per line, end at the text that follows.
            is_closed = not is_list and bool(items)
            return items, body[position:], is_closed
        try:
            item, position = _DECODER.raw_decode(body, position)
        except (ValueError, RecursionError):
            return items, body[position:], False
        items.append(item)


def check_item(item: object, prompt: Prompt, rules: FilterConfig) -> Row | Rejection:
    """Return the row in an item, or why it cannot be kept.

    Args:
        item: JSON value from a reply to `prompt`.
        prompt: Prompt of the request, with the limits that it asked for.
        rules: Rules for rows.
    """
    if isinstance(item, InvalidItem):
        return Rejection("invalid_json", "it cannot be repaired without a loss")
    if not isinstance(item, dict):
        return Rejection("not_an_object", f"the item is {_name_type(item)}")
    if isinstance(item, RepeatedKeys):
        return Rejection("repeated_field", f"twice: {', '.join(sorted(item.repeated))}")
    missing = [name for name in ("instruction", "output") if name not in item]
    if missing:
        return Rejection("missing_field", f"no {' and no '.join(missing)}")
    texts: dict[str, str] = {}
    for name in FIELDS:
        value = item.get(name)
        if value is None and name == "input":
            value = ""
        if not isinstance(value, str):
            return Rejection("wrong_type", f"{name} is {_name_type(value)}")
        texts[name] = value.strip()
    ignored = tuple(str(name) for name in item if name not in FIELDS)
    row = Row(**texts, ignored_fields=ignored)
    return _check_texts(row, prompt, rules) or row


def _check_texts(row: Row, prompt: Prompt, rules: FilterConfig) -> Rejection | None:
    if not any(character.isalnum() for character in row.instruction):
        return Rejection("empty_instruction", f"the instruction is {row.instruction[:20]!r}")
    if not row.output:
        return Rejection("empty_output", "the output is blank")
    tolerance = rules.length_tolerance
    for name, limit in (
        ("instruction", rules.max_instruction_chars),
        ("input", int(prompt.max_input_chars * tolerance)),
        ("output", int(prompt.max_output_chars * tolerance)),
    ):
        num_chars = len(getattr(row, name))
        if num_chars > limit:
            return Rejection(f"{name}_too_long", f"{num_chars} characters, the limit is {limit}")
    for sentence in prompt.sentences:
        for name in FIELDS:
            if sentence in getattr(row, name):
                return Rejection("copied_prompt", f"{name} contains: {sentence}")
    # What training reads; it refuses characters that are no valid Unicode, for example.
    read = read_row(row.to_json(), RowFormat("alpaca"), KeyCounts())
    return Rejection(read.reason, read.detail) if isinstance(read, Defect) else None


def _name_type(value: object) -> str:
    return _TYPE_NAMES.get(type(value), "a text" if isinstance(value, str) else "a number")
