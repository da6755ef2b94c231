"""Find the answer in a generated text; a doubtful one is none, and no answer is ever guessed.

find_letter("答案是 B。", 4)                   # 1
find_text("I do not know.", ["yes", "no"])    # None
"""

# ruff: noqa: RUF001  # Chinese punctuation

import itertools
import re
import unicodedata
from collections.abc import Sequence

from raytune_llama.evaluate.tasks.prompts import LETTERS

_CUE = r"(?:answer(?:\s+is|\s*[:=])|答案(?:应该|应当)?(?:是|为|选)?|故选|应选|选择?)"
_OPENING = r"[\s:：=是为选\"'“‘「*（(\[【]*"
_CUED = re.compile(rf"(?i:{_CUE}){_OPENING}$")
# Not inside a Latin word or number; Chinese characters have no boundaries between words.
_BEFORE, _AFTER = r"(?<![A-Za-z0-9_])", r"(?![A-Za-z0-9_]|['’][A-Za-z])"
# "A dog" and "I think", but not "A is correct".
_WORD = r"[AI]\s+(?!(?:is|was|because|since|as|and|or|but|not)\b)[a-z]"
_ALTERNATIVE = re.compile(r"\s*(?:或者?|or|and|和|与|[、,/&])\s*", re.IGNORECASE)
_NEGATION = re.compile(
    r"(?:\b(?:not|never)|n['’]t|[不没非未](?:应该?|[是为选])?)\s*(?:an?|the|option)?\s*$",
    re.IGNORECASE,
)

Found = tuple[int, int, int]
"""Begin and end of an option in a text, and its index."""


def find_letter(text: str, num_options: int) -> int | None:
    """Return the index of the option whose letter a text gives as its answer, None if unclear.

    A letter inside a word or after a negation, or an "A" that is an article, is none; else as
    `find_text`.
    """
    text = unicodedata.normalize("NFKC", text)
    letters = LETTERS[:num_options]
    pattern = rf"{_BEFORE}(?!{_WORD})[{letters}]{_AFTER}"
    return _choose(text, [(*m.span(), letters.index(m[0])) for m in re.finditer(pattern, text)])


def find_text(text: str, options: Sequence[str]) -> int | None:
    """Return the index of the option that a text gives as its answer, None if unclear.

    Case is ignored, an option inside a longer word or after a negation is none ("no" in "know",
    "good" in "not good", "是" in "不是"), of overlapping options the longest counts, and options
    in a list ("good or bad") are none. In this order: an option after a cue such as `Answer:` or
    `答案是` (the last one), one at the start, the only option in the text.
    """
    text = unicodedata.normalize("NFKC", text)
    names = [unicodedata.normalize("NFKC", option).strip() for option in options]
    order = [n for n in sorted(range(len(names)), key=lambda n: -len(names[n])) if names[n]]
    if not order:
        return None
    pattern = "|".join(f"({_bounded(names[index])})" for index in order)
    matches = list(re.finditer(pattern, text, re.IGNORECASE))
    found = [(*match.span(), order[(match.lastindex or 1) - 1]) for match in matches]
    return _choose(text, [one for n, one in enumerate(found) if not _is_joined(found, n)])


def _choose(text: str, found: Sequence[Found]) -> int | None:
    """Return the option that a text gives as its answer, of those that it contains."""
    listed = {
        number
        for one, other in itertools.pairwise(range(len(found)))
        if found[one][2] != found[other][2]
        and _ALTERNATIVE.fullmatch(text[found[one][1] : found[other][0]])
        for number in (one, other)
    }
    given = [
        (start, option)
        for number, (start, _, option) in enumerate(found)
        if number not in listed and not _NEGATION.search(text[:start])
    ]
    for start, option in reversed(given):
        cue = _CUED.search(text[:start])
        if cue and not _NEGATION.search(text[: cue.start()]):
            return option
    for start, option in given[:1]:
        if re.fullmatch(_OPENING, text[:start]):
            return option
    return given[0][1] if len({option for _, option in given}) == 1 else None


def _bounded(name: str) -> str:
    before = _BEFORE if re.match(r"[A-Za-z0-9_]", name) else ""
    after = _AFTER if re.search(r"[A-Za-z0-9_]$", name) else ""
    return f"{before}{re.escape(name)}{after}"


def _is_joined(found: Sequence[Found], number: int) -> bool:
    """Whether an option touches another, as in "是否" (whether), which is neither 是 nor 否."""
    start, end, _ = found[number]
    before, after = found[max(number - 1, 0) : number], found[number + 1 : number + 2]
    return any(one[1] == start for one in before) or any(one[0] == end for one in after)
