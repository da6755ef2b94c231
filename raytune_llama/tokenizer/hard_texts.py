"""Edge-case texts on which tokenizers have disagreed, to compare a fast engine with the reference.

They are rare in a corpus, so a sample of it may contain none.
"""

# ruff: noqa: RUF001  # look-alikes are the point

import random
from collections.abc import Iterable, Sequence

_CHINESE = "人民日报讯，记者从会议上获悉：今年的粮食产量创历史新高。"
_MIXED = "Ray 2.60 于2026年发布，支持 GPU（A100/H100）；см. документацию, ελληνικά, हिन्दी, ภาษาไทย."

_SPACES = (
    *(character * count for character in " \n\t\r" for count in (1, 2, 3, 7, 16, 17, 100, 1000)),
    *(" " * count + "word" for count in (1, 2, 3, 8)),
    *("word" + " " * count for count in (1, 2, 3, 8)),
    "  a  b   c    d\t\te \t f\n\n\ng\r\nh\r\n\r\ni \n j\n  \n  k",
    "def f(x):\n    return {\n        'a': x ** 2,\n\t\t\"b\": [1, 2, 3],\n    }\n",
    "\u00a0no\u00a0break\u2003em\u3000wide\u200bzero\u2028line\u2029paragraph\x85next\x0b\x0c\x1c\x1f",
)

_CHARACTERS = (
    # Characters with a special meaning inside a tokenizer.
    *("\u2581", "\u2581\u2581a \u2581b\u2581 ", "a\u2581b", "Ġword Ċ Ġ", "<0x0A><0xE4>", "\\n \\u"),
    *("\x00", "a\x00b", "\x00\x00", "\x01\x02\x03\x04\x05\x06\x07\x08\x0e\x1f\x7f"),
    *("\ufeff", "\ufeffbegin", "mid\ufeffdle", "\ufffe\uffff\ufffd", "\U0010ffff"),
    *("\ue000\uf8ff\U000f0000", "\u200d\ufe0f", "\u0378\U0001fbff"),
    # Rare ideographs: extensions A to H, compatibility forms, radicals.
    *("㐀㒨䶵", "\U00020000\U00020bb7野家\U0002a6d6", "\U0002a700\U0002b740\U0002b820\U0002ceb0"),
    *("\U00030000\U0003134a\U00031350", "\uf900\ufa0e\ufa70\U0002f800", "⺀⼀𠮷吉", "龘龘龘靐齉"),
    *("한국어 텍스트 ㄱㄴㄷ", "ひらがな カタカナ ﾊﾝｶｸ", "〇〡〢〣一二三①②③ⅠⅡⅢ㊀㋿"),
    # Emoji: joined, with skin tones, flags, keycaps, selectors.
    *("👨‍👩‍👧‍👦 👩🏽‍💻 🏴‍☠️ 🇨🇳🇺🇸 1️⃣ ❤️ 🦊🫠🪿", "a👍🏿b"),
    # Combining marks, several normal forms of one text, right-to-left, letters of unusual case.
    *("e\u0301 é n\u0303o \u0301alone", "Ṩ S\u0323\u0307 S\u0307\u0323", "\u1100\u1161\u11a8 각"),
    *("ﬁ ﬀ ① ½", "Z͑͗a͑l͗g͑o͗", "עברית مرحبا ١٢٣", "ÅÅÅ Ω", "İıſẞ 'ſ 'S 'LL"),
    # Digits, signs, contractions.
    *("0 1 12 123 1234 12345 1234567890", "3.14159 1,000,000 1e-4 0x1F 2^10 50% $9.99 №5"),
    *("１２３４ ²³ ٣", "it's we're I'VE don't he'll she'd 'm 's 't 're ' '' 'sx", "a'b'c"),
    *("!!!???...,,,;;;", "----====____****####~~~~", "(a)[b]{c}<d>/e\\f|g"),
    "https://example.com/a?b=c&d=%E4%BD%A0#e user@example.com C:\\dir",
)

_REPETITIONS = (
    # Pieces that overlap themselves: the tie-breaking rule decides.
    *(
        unit * count
        for unit in ("a", "ab", "aba", "哈", "哈哈嘿", "的", "0", ".", "=", "-_")
        for count in (2, 3, 5, 8, 33, 64)
    ),
    *("a" * 3000, "ab" * 700, "哈" * 1500, "x" * 2049 + " " + "y" * 2044, "ACGT" * 300),
    *("supercalifragilisticexpialidocious" * 20, "QmFzZTY0IGlzIG5vdCBwcm9zZSE" * 40),
    *(_CHINESE, _CHINESE * 40, _MIXED, _MIXED * 30, _CHINESE + "\n\n" + _MIXED),
)


def hard_texts(controls: Iterable[str], vocabulary: Sequence[str]) -> list[str]:
    """Return edge-case texts for one tokenizer.

    Args:
        controls: Spellings of its control tokens.
        vocabulary: Text of each of its tokens; each is used alone and in random combinations.
    """
    written = [
        form.format(control)
        for control in sorted(controls)
        for form in ("{}", "a{}b", " {} ", "{0}{0}", "\n{}\n", "人民{}日报", "{0}x{0}")
    ]
    shuffled = random.Random(0)
    together = [
        "".join(shuffled.choices(vocabulary, k=shuffled.randrange(2, 12)))
        for _ in range(4096 if vocabulary else 0)
    ]
    return ["", *_SPACES, *_CHARACTERS, *_REPETITIONS, *written, *vocabulary, *together]
