"""Promise: an encoding is declared, marked or plainly recognised; nothing is guessed in silence."""

import pytest

from raytune_llama.data.readers.encodings import TextEncoding, detect_encoding

CHINESE = "人民日报说，新年的钟声已经敲响。\n" * 40  # noqa: RUF001 - Chinese punctuation
ENGLISH = "the bell of the new year\n" * 40


@pytest.mark.parametrize(
    ("mark", "codec"),
    [
        (b"\xef\xbb\xbf", "utf-8"),
        (b"\xff\xfe", "utf-16-le"),
        (b"\xfe\xff", "utf-16-be"),
    ],
)
def test_detect_mark_decides(mark: bytes, codec: str) -> None:
    head = mark + CHINESE.encode(codec)
    assert detect_encoding(head, "auto") == TextEncoding(codec, len(mark), is_guessed=False)
    with pytest.raises(ValueError, match=f"byte order mark of {codec}, but encoding is gb18030"):
        detect_encoding(head, "gb18030")


@pytest.mark.parametrize("text", [CHINESE, ENGLISH, ""])
def test_detect_utf_8_also_cut_within_a_character(text: str) -> None:
    for cut in range(4):
        head = text.encode()[: len(text.encode()) - cut]
        assert detect_encoding(head, "auto") == TextEncoding("utf-8", 0, is_guessed=False)


@pytest.mark.parametrize("codec", ["gbk", "gb18030"])
def test_detect_chinese_in_gbk_is_recognised_and_said(codec: str) -> None:
    head = (ENGLISH + CHINESE).encode(codec)[:-1]
    assert detect_encoding(head, "auto") == TextEncoding("gb18030", 0, is_guessed=True)


def test_detect_utf_8_with_some_broken_lines_stays_utf_8() -> None:
    lines = CHINESE.encode().split(b"\n")
    for number in range(0, len(lines), 3):
        lines[number] = lines[number][:-1]
    assert detect_encoding(b"\n".join(lines), "auto").codec == "utf-8"


def test_detect_latin_text_is_not_taken_for_chinese() -> None:
    head = ("Größe, Façade, déjà vu, año\n" * 40).encode("latin-1")
    assert detect_encoding(head, "auto").codec == "utf-8"


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
def test_detect_utf_16_without_mark_asks_for_it(codec: str) -> None:
    with pytest.raises(ValueError, match=f"set encoding to {codec}"):
        detect_encoding(ENGLISH.encode(codec), "auto")
    assert detect_encoding(ENGLISH.encode(codec), codec).codec == codec  # pyright: ignore[reportArgumentType]  # a parameter
    with pytest.raises(ValueError, match="no UTF-16 byte order mark"):
        detect_encoding(ENGLISH.encode(codec), "utf-16")
