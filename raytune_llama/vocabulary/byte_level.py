"""Learn new merges for a byte-level BPE tokenizer (LLaMA 3, SmolLM2, Qwen) from text.

    grown = grow_byte_level(tokenizer_json, texts, num_tokens=20_000)

The text is first split and merged by the tokenizer. The learned merges combine its tokens and rank
after all of its own: a text to which none of them applies keeps its ids. ASCII-only tokens are not
learned, so all ASCII text keeps its ids.

Training is done by `tokenizers`, on words in which each token is written as one character.
"""

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from raytune_llama.config.errors import UserError
from raytune_llama.tokenizer.compiled.tables import byte_alphabet
from raytune_llama.tokenizer.split_points import find_split_pattern

logger = logging.getLogger(__name__)

_FIRST_CODE = 0x10000  # start of a million code points without surrogates
_OVERSAMPLING = 1.2  # learn more merges than wanted, since some are dropped
_MIN_FREQUENCY = 2


@dataclass(frozen=True, kw_only=True)
class GrownMerges:
    """A grown `tokenizers` engine, and the numbers of merges added and dropped."""

    engine: dict[str, Any]
    """Content of the grown tokenizer.json."""
    num_new: int
    """Number of added tokens, whose ids follow all others."""
    num_merges: int
    """Number of added merges: those of new tokens, and new ways to produce existing tokens."""
    left_out: dict[str, int]
    """Number of dropped merges by reason: `ascii`, `ascii_part` (builds on a dropped merge)."""


def check_byte_level(engine: dict[str, Any], name: str) -> None:
    """Refuse a tokenizer that merges can't be added to.

    Raises:
        ValueError: The tokenizer is not a byte-level BPE tokenizer of a supported kind.
    """
    if engine["model"]["type"] != "BPE" or find_split_pattern(engine) is None:
        raise UserError(
            f"{name}: neither has a SentencePiece tokenizer.model nor is a byte-level BPE "
            "tokenizer of a supported kind (GPT-2, SmolLM2, Qwen, LLaMA 3)"
        )


def grow_byte_level(engine: dict[str, Any], texts: Iterable[str], num_tokens: int) -> GrownMerges:
    """Learn merges from text and append them to an engine.

    Args:
        engine: Content of a tokenizer.json that `check_byte_level` accepts; it is not modified.
        texts: The text to learn from.
        num_tokens: Number of tokens to add; fewer if no more pairs occur twice in the text.
    """
    words = _WordSpeller(Tokenizer.from_str(json.dumps(engine)))
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    spelled = list(words.spell(texts))
    trainer = trainers.BpeTrainer(
        vocab_size=words.num_tokens + int(num_tokens * _OVERSAMPLING),
        min_frequency=_MIN_FREQUENCY,
        show_progress=False,
    )
    trained.train_from_iterator(spelled, trainer)
    model = json.loads(trained.to_str())["model"]
    grown = json.loads(json.dumps(engine))
    return _append(grown, [words.unspell(pair) for pair in model["merges"]], num_tokens)


class _WordSpeller:
    """Writes the words of texts with one character per token of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._cache: dict[str, str] = {}
        self._characters: dict[str, str] = {}
        self._tokens: dict[str, str] = {}

    def spell(self, texts: Iterable[str]) -> Iterator[str]:
        """Yield one line of words per text."""
        normalizer, splitter = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer
        for text in texts:
            plain = text if normalizer is None else normalizer.normalize_str(text)
            words = (self._spell(word) for word, _ in splitter.pre_tokenize_str(plain))
            yield " ".join(word for word in words if word)

    def _spell(self, word: str) -> str:
        spelled = self._cache.get(word)
        if spelled is None:
            # Nothing is learned from ASCII words.
            tokens = [] if is_ascii(word) else self._tokenizer.model.tokenize(word)
            spelled = "".join(self._character(token.value) for token in tokens)
            self._cache[word] = spelled
        return spelled

    def _character(self, token: str) -> str:
        if token not in self._characters:
            character = chr(_FIRST_CODE + len(self._characters))
            self._characters[token] = character
            self._tokens[character] = token
        return self._characters[token]

    @property
    def num_tokens(self) -> int:
        """Number of distinct tokens seen so far."""
        return len(self._characters)

    def unspell(self, pair: list[str]) -> tuple[str, str]:
        """Return the two tokens of a merge, in the tokenizer's own alphabet."""
        left, right = ("".join(self._tokens[character] for character in side) for side in pair)
        return left, right


_ASCII = frozenset(byte_alphabet()[:0x80])


def is_ascii(token: str) -> bool:
    """Whether a token, in the byte-level alphabet, consists only of ASCII characters."""
    return _ASCII.issuperset(token)


def _append(engine: dict[str, Any], pairs: list[tuple[str, str]], num_tokens: int) -> GrownMerges:
    """Append merges until `num_tokens` are new; drop those that ASCII text could trigger."""
    model = engine["model"]
    vocabulary: dict[str, int] = model["vocab"]
    merges: list[Any] = model["merges"]
    as_text = bool(merges) and isinstance(merges[0], str)
    known = {tuple(merge.split(" ")) if as_text else tuple(merge) for merge in merges}
    for token in engine["added_tokens"]:
        # Otherwise the library would move it to the end of the vocabulary on reloading.
        vocabulary.setdefault(token["content"], token["id"])
    next_id = max(vocabulary.values()) + 1
    left_out = {"ascii": 0, "ascii_part": 0}
    num_new, num_merges = 0, 0
    for left, right in pairs:
        if num_new == num_tokens:
            break
        token = left + right
        if is_ascii(token):
            left_out["ascii"] += 1
        elif left not in vocabulary or right not in vocabulary:
            left_out["ascii_part"] += 1
        elif (left, right) not in known:
            if token not in vocabulary:
                vocabulary[token] = next_id + num_new
                num_new += 1
            merges.append(f"{left} {right}" if as_text else [left, right])
            num_merges += 1
    if num_new < num_tokens:
        logger.warning(
            "the text yields only %d of the %d requested tokens: no more pairs occur %d times",
            num_new,
            num_tokens,
            _MIN_FREQUENCY,
        )
    return GrownMerges(engine=engine, num_new=num_new, num_merges=num_merges, left_out=left_out)
