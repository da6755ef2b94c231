"""Detect a text file's encoding: from a BOM, declared, UTF-8, or guessed and then logged."""

import codecs
import re
from dataclasses import dataclass

from raytune_llama.config.errors import UserError
from raytune_llama.data.readers.config import Encoding
from raytune_llama.data.readers.ranges import READ_BYTES, ByteReader

HEAD_BYTES = 1 << 18
"""Bytes at the start of a file that encoding detection looks at."""

_BOMS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_CHINESE = re.compile("[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]")
_MIN_CHINESE_SHARE = 0.9  # of the non-ASCII characters, for text to be GB18030
_MIN_FOREIGN_SHARE = 0.5  # of the lines with non-ASCII bytes, for text not to be UTF-8
_MIN_NUL_SHARE = 0.2  # of the bytes, in UTF-16 without a BOM: one per Latin letter


@dataclass(frozen=True)
class TextEncoding:
    """The encoding of one file."""

    codec: str
    """Python codec name."""
    bom_bytes: int
    """Length of the byte order mark at the start of the file, in bytes."""
    is_guessed: bool
    """Whether the encoding was guessed from the bytes alone."""


def detect_encoding(head: bytes, declared: Encoding) -> TextEncoding:
    """Detect the encoding of a file from its first bytes.

    A byte order mark (BOM) takes precedence; then the declared encoding; then UTF-8, unless most
    lines with non-ASCII bytes are not UTF-8 and the text is Chinese in GB18030.

    Args:
        head: The first `HEAD_BYTES` of the file, or all of it.
        declared: Encoding in the config.

    Raises:
        ValueError: The BOM contradicts the declared encoding, or the bytes look like UTF-16
            without a BOM.
    """
    for bom, codec in _BOMS.items():
        if head.startswith(bom):
            if declared not in ("auto", "utf-16" if codec.startswith("utf-16") else codec, codec):
                raise UserError(
                    f"it begins with the byte order mark of {codec}, but encoding is {declared}"
                )
            return TextEncoding(codec, len(bom), is_guessed=False)
    if declared == "utf-16" and not head:
        return TextEncoding("utf-16-le", 0, is_guessed=False)
    if declared == "utf-16":
        raise UserError("it has no UTF-16 byte order mark; set utf-16-le or utf-16-be")
    if declared != "auto":
        return TextEncoding(declared, 0, is_guessed=False)
    if head and head.count(0) / len(head) > _MIN_NUL_SHARE:
        side = "be" if head[::2].count(0) > head[1::2].count(0) else "le"
        raise UserError(
            f"{head.count(0) / len(head):.0%} of its first bytes are NUL, as in UTF-16 without a "
            f"byte order mark; set encoding to utf-16-{side} if that is correct"
        )
    if _is_foreign(head) and _is_chinese(head):
        return TextEncoding("gb18030", 0, is_guessed=True)
    return TextEncoding("utf-8", 0, is_guessed=False)


def _is_foreign(head: bytes) -> bool:
    """Whether most lines with non-ASCII bytes are not UTF-8."""
    lines = head.split(b"\n")
    if len(lines) > 1:
        lines.pop()  # may be truncated
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
    """Reader that transcodes text to UTF-8; undecodable input yields invalid UTF-8."""

    def __init__(self, reader: ByteReader, codec: str) -> None:
        is_utf_16 = codec.startswith("utf-16")
        self._errors = "surrogatepass" if is_utf_16 else "surrogateescape"
        self._decoder = codecs.getincrementaldecoder(codec)(errors=self._errors)
        self._reader = reader
        self._held = b""
        self._at_end = False

    def read(self, num_bytes: int, /) -> bytes:
        """Return the next `num_bytes` bytes, fewer only at the end of the file."""
        while len(self._held) < num_bytes and not self._at_end:
            data = self._reader.read(READ_BYTES)
            self._at_end = not data
            self._held += self._decode(data)
        result, self._held = self._held[:num_bytes], self._held[num_bytes:]
        return result

    def _decode(self, data: bytes) -> bytes:
        try:
            text = self._decoder.decode(data, final=self._at_end)
        except UnicodeDecodeError:  # UTF-16 truncated within a character
            self._decoder.reset()
            return b"\xff"
        return text.encode(errors=self._errors)
