"""The fields of a row's objects: their names, and a reader that accounts for each of them.

A field is used, known to be metadata, a repetition of what is used, ignored by the config, or the
row is refused: a dropped field can carry meaning, such as a loss weight or a tool call.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from raytune_llama.chat.config import FieldName
from raytune_llama.chat.conversations import Defect, DefectReason, describe_type, find_text_defect
from raytune_llama.storage.files import RepeatedKeys

COLUMNS: dict[FieldName, tuple[str, ...]] = {
    "id": ("id",),
    "system": (
        *("system", "system_prompt", "system_message"),
        *("系统", "系统提示", "系统提示词"),
    ),
    "history": ("history", "历史", "历史对话"),
    "tools": ("tools", "functions"),
    # In the Chinese Alpaca file of 51,000 rows some field names are Chinese, and one row has its
    # input under "news article". Its "note" is a remark about the row, not an input.
    "instruction": ("instruction", "指令", "指示"),
    "input": ("input", "输入", "context", "news article", "背景", "上下文"),
    "output": ("output", "输出", "response", "answer", "回答", "答案", "回复"),
    "prompt": (*("prompt", "question", "query", "问题", "提问", "题目", "用户问题", "用户", "问"),),
    "completion": (
        *("completion", "response", "answer", "output", "输出", "回答", "答案", "回复", "答复"),
        *("参考答案", "标准答案", "助手", "答"),
    ),
    "conversations": ("conversations", "conversation", "对话"),
    "messages": ("messages", "消息"),
}
"""Known column names by what they hold, compared as `plain_name` returns them."""

_METADATA = re.compile(
    r"(.*[_\- ])?(id|ids|idx|index|uuid|guid|no|number|url|uri|link|hash|md5|sha1|sha256|"
    r"source|src|dataset|origin|date|datetime|time|timestamp|created|created_at|"
    r"updated|updated_at|create_time|update_time|lang|language|languages|locale|licen[cs]e|author|annotator|username|model|"
    r"generator|version|split|category|categories|subcategory|topic|topics|subject|domain|field|"
    r"task|task_type|type|kind|tag|tags|keywords|title|difficulty|level|length|count|tokens|"
    r"num_[a-z_]+|[a-z_]+_count|note|notes|comment|comments|remark|remarks|meta|metadata|extra|"
    r"extra_info|file|filename|path|page|line|__index_level_\d+__|unnamed: ?\d+|"
    r"序号|编号|来源|出处|类别|分类|类型|标签|备注|时间|日期|语言|作者|标题|难度)"
)
"""Names of fields that say where a row is from or what it is about."""


@dataclass(slots=True)
class KeyCounts:
    """Counts of the field names in rows that are not the format's own."""

    aliased: Counter[str] = field(default_factory=Counter)
    """Number of fields read, per alias."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Number of fields ignored, per name."""
    repeated: Counter[str] = field(default_factory=Counter)
    """Number of objects with a duplicate ignored field, per name."""
    unknown: Counter[str] = field(default_factory=Counter)
    """Number of fields for which a row was refused, per name."""
    repaired: Counter[str] = field(default_factory=Counter)
    """Number of conversations repaired, per repair."""


class DefectError(Exception):
    """A row cannot be used; internal to the readers of rows."""

    def __init__(self, reason: DefectReason, detail: str) -> None:
        super().__init__(detail)
        self.defect = Defect(reason, detail)


def plain_name(name: str) -> str:
    """Return a field name without case, and without spaces and colons around it."""
    return name.strip(" \t\r\n:：").casefold()  # noqa: RUF001  # full-width colon is intended


@lru_cache(maxsize=4096)
def is_metadata(name: str) -> bool:
    """Whether a field's name says that it is about the row, not of it."""
    return bool(_METADATA.fullmatch(plain_name(name)))


class RowFields:
    """Reads the fields of a JSON object and accounts for those that were not read."""

    def __init__(
        self,
        row: Mapping[str, Any],
        counts: KeyCounts,
        *,
        ignored: frozenset[str] = frozenset(),
        columns: Mapping[FieldName, str] | None = None,
        where: str = "",
    ) -> None:
        """Start to read an object.

        Args:
            row: The object.
            counts: Counts of field names, updated in place.
            ignored: Names that the config ignores, as `plain_name` returns them.
            columns: Column names that the config gives; they come before the known ones.
            where: Beginning of error messages.
        """
        self._row = row
        self._counts = counts
        self._ignored = ignored
        self._columns = columns or {}
        self._where = where
        self._names: dict[str, list[str]] = {}
        for name in row:
            self._names.setdefault(plain_name(name), []).append(name)
        self._repeated = row.repeated if isinstance(row, RepeatedKeys) else frozenset()
        self._read: set[str] = set()

    def aliases(self, name: FieldName) -> tuple[str, ...]:
        """Return the names that a column can have; only the config's if it gives one."""
        if not self._columns:
            return COLUMNS[name]
        given = self._columns.get(name)
        if given is not None:
            return (plain_name(given),)
        # A column that the config gives another meaning keeps only that one.
        taken = {plain_name(column) for column in self._columns.values()}
        return tuple(alias for alias in COLUMNS[name] if alias not in taken)

    def has(self, name: FieldName) -> bool:
        """Whether the object has a column, under any of its names."""
        return self.has_any(self.aliases(name))

    def has_any(self, aliases: Iterable[str]) -> bool:
        """Whether the object has a field under one of the names."""
        return any(alias in self._names for alias in aliases)

    def column(self, name: FieldName) -> Any:  # noqa: ANN401  # any JSON value
        """Return the value of a column; see `value`."""
        return self.value(self.aliases(name))

    def value(self, aliases: tuple[str, ...]) -> Any:  # noqa: ANN401  # any JSON value
        """Return a field's value: that of the first alias that is not empty.

        Raises:
            DefectError: The field is missing, duplicated, or has aliases with different values.
        """
        present = self._present(aliases)
        if not present:
            found = ", ".join(map(repr, self._row)) or "none"
            detail = f"{self._where}no column {' or '.join(map(repr, aliases))}; found: {found}"
            raise DefectError("missing_field", detail[:400])
        self._read.update(present)
        twice = sorted(self._repeated.intersection(present))
        if twice:
            raise DefectError("duplicate_key", f"{self._where}duplicate field {twice[0]!r}")
        filled = [name for name in present if not is_empty(self._row[name])]
        if any(self._row[name] != self._row[filled[0]] for name in filled[1:]):
            detail = f"{self._where}{' and '.join(map(repr, filled))} hold different values"
            raise DefectError("ambiguous_field", detail)
        chosen = (filled or present)[0]
        if chosen != aliases[0]:
            self._counts.aliased[chosen] += 1
        return self._row[chosen]

    def optional(self, aliases: tuple[str, ...]) -> Any:  # noqa: ANN401  # any JSON value
        """Return a field's value as `value` does; None if it is missing or empty."""
        value = self.value(aliases) if self.has_any(aliases) else None
        return None if is_empty(value) else value

    def text(self, aliases: tuple[str, ...]) -> str:
        """Return a string, or the text of a list of text parts."""
        return self.text_of(self.value(aliases), self.label(aliases))

    def optional_text(self, aliases: tuple[str, ...]) -> str | None:
        """Return a string field; None if it is missing, null or empty."""
        value = self.optional(aliases)
        return None if value is None else self.text_of(value, self.label(aliases))

    def label(self, aliases: tuple[str, ...]) -> str:
        """Return how error messages name a field: as the object does."""
        return f"{self._where}column {(self._present(aliases) or [*aliases])[0]!r}"

    def text_of(self, value: object, label: str) -> str:
        """Return a value as text, joining text parts as OpenAI's API has them.

        Raises:
            DefectError: The value is neither a text that can be encoded nor a list of text parts.
        """
        if isinstance(value, list) and value:
            value = "".join(_text_of_part(part, label) for part in value)
        defect = find_text_defect(value, label)
        if defect is not None:
            raise DefectError(defect.reason, defect.detail)
        assert isinstance(value, str)
        return value

    def id(self) -> str | None:
        """Return the id of the row as a string; in JSON it may be an integer."""
        aliases = self.aliases("id")
        value = self.value(aliases) if self.has("id") else None
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return None if value is None else self.optional_text(aliases)

    def read_texts(self) -> list[str]:
        """Return the strings that were read, without those that are metadata."""
        return [
            self._row[name]
            for name in self._read
            if isinstance(self._row[name], str) and not is_metadata(name)
        ]

    def finish(self, used: Iterable[str] = ()) -> None:
        """Account for the fields that were not read.

        Args:
            used: Texts that were read; a field that only repeats them is ignored.

        Raises:
            DefectError: Some may carry meaning.
        """
        texts = [text for text in used if text.strip()]
        rest = [name for name in self._row if name not in self._read]
        unknown = [name for name in rest if not self._is_harmless(name, texts)]
        self._counts.ignored.update(name for name in rest if name not in unknown)
        self._counts.repeated.update(self._repeated.intersection(rest))
        if unknown:
            self._counts.unknown.update(unknown)
            listed = ", ".join(map(repr, unknown))
            raise DefectError("unknown_field", f"{self._where}unknown column {listed}"[:400])

    def _present(self, aliases: tuple[str, ...]) -> list[str]:
        return [name for alias in aliases for name in self._names.get(alias, ())]

    def _is_harmless(self, name: str, texts: list[str]) -> bool:
        value, plain = self._row[name], plain_name(name)
        if is_empty(value) or plain in self._ignored or is_metadata(name):
            return True
        # Such as the first question beside its conversation, or the whole row as one text.
        return isinstance(value, str) and bool(texts) and _repeats(value, texts)


def is_empty(value: object) -> bool:
    """Whether a JSON value says nothing: null, or an empty string, array or object."""
    return value is None or value in ("", [], {})


def _repeats(value: str, texts: list[str]) -> bool:
    return value in texts or all(text in value for text in texts)


def _text_of_part(part: object, label: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else describe_type(part)
    if isinstance(part, dict) and kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise DefectError("wrong_type", f"{label}: a part is {kind}, only text can be trained on")
