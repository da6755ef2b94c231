"""Answers of a given form: which tokens may come next so that a JSON schema is kept.

The work is llguidance's. A mask of all tokens takes it well under a millisecond.

Shapes: V tokens.
"""

import json
from typing import Any

import llguidance
import llguidance.hf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

MAX_SCHEMA_CHARACTERS = 100_000

_LAYOUT: Any = {
    # As Python writes JSON. Where any white space may come, a small model writes nothing else.
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}

ANY_OBJECT = {"type": "object"}
"""Schema of `response_format: {"type": "json_object"}`."""


class Grammar:
    """A schema, and how far a sequence has come in it."""

    def __init__(self, matcher: llguidance.LLMatcher, num_tokens: int, lark: str) -> None:
        self._matcher, self._num_tokens = matcher, num_tokens
        self.lark = lark
        """The grammar as llguidance reads it, for engines that keep it themselves."""

    def allowed(self) -> Tensor:
        """Return which tokens may come next; an end of the text where the form is whole."""
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        bits = np.unpackbits(packed, bitorder="little")[: self._num_tokens]
        return torch.from_numpy(bits.astype(np.bool_))

    def take(self, token: int) -> None:
        """Go on by a token.

        Raises:
            ValueError: it may not come there.
        """
        if not self._matcher.consume_token(token):
            raise ValueError(f"token {token} breaks the grammar: {self._matcher.get_error()}")

    def copy(self) -> "Grammar":
        """Return another that stands where this one does."""
        return Grammar(self._matcher.deep_copy(), self._num_tokens, self.lark)


class Grammars:
    """Makes grammars for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop_ids: frozenset[int]) -> None:
        """Read the tokenizer, which takes a second for a large one.

        Args:
            tokenizer: of the model.
            stop_ids: tokens that end an answer; at least one.
        """
        self._num_tokens = len(tokenizer)
        self._tokenizer = llguidance.hf.from_tokenizer(
            tokenizer, n_vocab=self._num_tokens, eos_token=sorted(stop_ids)
        )

    def of_schema(self, schema: dict[str, Any]) -> Grammar:
        """Return the grammar of a JSON schema.

        Raises:
            ValueError: it is no schema, uses what is not supported, or is too large.
        """
        text = json.dumps(schema)
        if len(text) > MAX_SCHEMA_CHARACTERS:
            raise ValueError(
                f"the schema has {len(text)} characters, more than {MAX_SCHEMA_CHARACTERS}"
            )
        lark = f"start: %json {json.dumps({**schema, 'x-guidance': _LAYOUT})}"
        matcher = llguidance.LLMatcher(
            self._tokenizer, llguidance.LLMatcher.grammar_from_lark(lark)
        )
        if matcher.is_error():
            raise ValueError(f"the schema can't be used: {matcher.get_error()}")
        return Grammar(matcher, self._num_tokens, lark)
