"""Which encoding a text file has: declared, marked, UTF-8, or recognised and said aloud."""

import codecs
import re
from dataclasses import dataclass
from typing import Literal

from raytune_llama.config.errors import UserError
from raytune_llama.data.readers.ranges import READ_BYTES, ByteReader

Encoding = Literal["auto", "utf-8", "utf-16", "utf-16-le", "utf-16-be", "gb18030", "big5"]
"""What can be declared. `gb18030` reads GBK and GB2312 too."""

HEAD_BYTES = 1 << 18
"""What is looked at to recognise an encoding."""

_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_CHINESE = re.compile("[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]")
_MIN_CHINESE_SHARE = 0.9  # of the characters that are not ASCII, in text that is to be GB18030
_MIN_FOREIGN_SHARE = 0.5  # of the lines with bytes beyond ASCII, in text that is not UTF-8
_MIN_NUL_SHARE = 0.2  # of the bytes, in UTF-16 without a mark: Latin letters have one each


@dataclass(frozen=True)
class TextEncoding:
    """The encoding of one file."""

    codec: str
    """Python's name for it."""
    bom_bytes: int
    """Length of the mark at the start of the file."""
    is_guessed: bool
    """Whether nothing but the look of the bytes speaks for it."""


def detect_encoding(head: bytes, declared: Encoding) -> TextEncoding:
    """Decide the encoding of a file by its first bytes.

    A mark decides; then what is declared; then UTF-8, unless most lines with bytes beyond ASCII
    are not UTF-8 and the text is Chinese in GB18030.

    Args:
        head: The first `HEAD_BYTES` of the file, or all of it.
        declared: What the config says.

    Raises:
        ValueError: The mark contradicts what is declared, or the bytes look like UTF-16 without
            a mark.
    """
    for mark, codec in _MARKS.items():
        if head.startswith(mark):
            if declared not in ("auto", "utf-16" if codec.startswith("utf-16") else codec, codec):
                raise UserError(f"it begins with the mark of {codec}, but encoding is {declared}")
            return TextEncoding(codec, len(mark), is_guessed=False)
    if declared == "utf-16" and not head:
        return TextEncoding("utf-16-le", 0, is_guessed=False)
    if declared == "utf-16":
        raise UserError("it has no UTF-16 mark at its start; set utf-16-le or utf-16-be")
    if declared != "auto":
        return TextEncoding(declared, 0, is_guessed=False)
    if head and head.count(0) / len(head) > _MIN_NUL_SHARE:
        side = "be" if head[::2].count(0) > head[1::2].count(0) else "le"
        raise UserError(
            f"{head.count(0) / len(head):.0%} of its first bytes are NUL, as in UTF-16 without a "
            f"mark; set encoding to utf-16-{side} if that is what it is"
        )
    if _is_foreign(head) and _is_chinese(head):
        return TextEncoding("gb18030", 0, is_guessed=True)
    return TextEncoding("utf-8", 0, is_guessed=False)


def _is_foreign(head: bytes) -> bool:
    """Whether most lines that have bytes beyond ASCII are not UTF-8."""
    lines = head.split(b"\n")
    if len(lines) > 1:
        lines.pop()  # it may be cut
    beyond = [line for line in lines if not line.isascii()]
    foreign = sum(not _decodes(line, "utf-8") for line in beyond)
    return bool(beyond) and foreign / len(beyond) > _MIN_FOREIGN_SHARE


def _is_chinese(head: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("gb18030")().decode(head)
    except UnicodeDecodeError:
        return False
    beyond = [character for character in text if not character.isascii()]
    chinese = sum(1 for character in beyond if _CHINESE.match(character))
    return bool(beyond) and chinese / len(beyond) >= _MIN_CHINESE_SHARE


def _decodes(data: bytes, codec: str) -> bool:
    try:
        data.decode(codec)
    except UnicodeDecodeError:
        return False
    return True


class TranscodingReader:
    """Reads text of another encoding as UTF-8; what is no text comes as bytes that are no UTF-8."""

    def __init__(self, reader: ByteReader, codec: str) -> None:
        is_utf_16 = codec.startswith("utf-16")
        self._errors = "surrogatepass" if is_utf_16 else "surrogateescape"
        self._decoder = codecs.getincrementaldecoder(codec)(errors=self._errors)
        self._reader = reader
        self._held = b""
        self._at_end = False

    def read(self, num_bytes: int, /) -> bytes:
        """Return the next bytes, fewer at the end, none behind it."""
        while len(self._held) < num_bytes and not self._at_end:
            data = self._reader.read(READ_BYTES)
            self._at_end = not data
            self._held += self._decode(data)
        result, self._held = self._held[:num_bytes], self._held[num_bytes:]
        return result

    def _decode(self, data: bytes) -> bytes:
        try:
            text = self._decoder.decode(data, final=self._at_end)
        except UnicodeDecodeError:  # UTF-16 that ends within a character
            self._decoder.reset()
            return b"\xff"
        return text.encode(errors=self._errors)
