"""Constrained decoding: which tokens may come next so that an answer keeps its format.

The format is a JSON schema, or text and tool calls (`chat/tools.py`) whose arguments follow their
schemas.

llguidance does the work: a mask over the full vocabulary takes it well under a millisecond.

Shapes: V tokens.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import llguidance
import llguidance.hf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from raytune_llama.chat.tools import (
    CALL_END,
    CALL_MIDDLE,
    CALL_START,
    TOOL_CALL_CLOSE_TAG,
    TOOL_CALL_OPEN_TAG,
)
from raytune_llama.config.errors import UserError
from raytune_llama.tokenizer.loader import control_token_ids

MAX_SCHEMA_CHARACTERS = 100_000
MAX_KEPT_GRAMMARS = 32

_LAYOUT: Any = {
    # As Python writes JSON. Where free whitespace is allowed, a small model writes nothing else.
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}


@dataclass(frozen=True)
class ToolCallFormat:
    """Format of an answer with tools: text, then tool calls; either may be missing."""

    schemas: Sequence[tuple[str, dict[str, Any]]]
    """Names of the callable functions and the JSON schemas of their arguments; at least one."""

    must_call: bool = False
    """Whether the answer has no text and at least one call."""

    is_single: bool = False
    """Whether at most one call is allowed."""

    text_schema: dict[str, Any] | None = None
    """JSON schema of the text, which then has no calls after it; None: any text."""


class Grammar:
    """A grammar, and the position of one sequence in it."""

    def __init__(self, matcher: llguidance.LLMatcher, num_tokens: int, lark: str) -> None:
        self._matcher, self._num_tokens = matcher, num_tokens
        self.lark = lark
        """The grammar in llguidance's Lark syntax, for engines that enforce it themselves: with the
        stop tokens as its endings, as those engines know only the tokenizer's own."""

    def allowed_tokens(self) -> Tensor:
        """Return the mask of tokens allowed next, (V,); stop tokens once the format is complete."""
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        bits = np.unpackbits(packed, bitorder="little")[: self._num_tokens]
        return torch.from_numpy(bits.astype(np.bool_))

    def advance(self, token: int) -> None:
        """Consume a token.

        Raises:
            ValueError: the token is not allowed here.
        """
        if not self._matcher.consume_token(token):
            raise UserError(f"token {token} breaks the grammar: {self._matcher.get_error()}")

    def copy(self) -> "Grammar":
        """Return an independent copy at the same position."""
        return Grammar(self._matcher.deep_copy(), self._num_tokens, self.lark)


class GrammarCompiler:
    """Compiles grammars for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop_ids: frozenset[int]) -> None:
        """Read the tokenizer, which takes about a second for a large vocabulary.

        Args:
            tokenizer: tokenizer of the model.
            stop_ids: tokens that end an answer; at least one.
        """
        self._num_tokens = len(tokenizer)
        # Clients send the same tools again and again. Cached matchers are copied, never advanced.
        self._matcher = lru_cache(MAX_KEPT_GRAMMARS)(self._new_matcher)
        # Added tokens such as <tool_call> have no text in llguidance: rules name them by id.
        self._added = {
            token.content: id_
            for id_, token in tokenizer.added_tokens_decoder.items()
            if token.content in (TOOL_CALL_OPEN_TAG, TOOL_CALL_CLOSE_TAG)
            or id_ not in control_token_ids(tokenizer)
        }
        self._spelled = {
            id_: token.content for id_, token in tokenizer.added_tokens_decoder.items()
        }
        self._endings = sorted(stop_ids)
        self._tokenizer = llguidance.hf.from_tokenizer(
            tokenizer, n_vocab=self._num_tokens, eos_token=sorted(stop_ids)
        )

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that a token stands for; of a control token its spelling."""
        if token in self._spelled:
            return self._spelled[token].encode()
        # llguidance marks control tokens with this byte, and leaves it out.
        return self._tokenizer.decode_bytes([token]) or b"\xff"

    def compile_schema(self, schema: dict[str, Any]) -> Grammar:
        """Return the grammar of a JSON schema.

        Raises:
            ValueError: the schema is invalid, uses an unsupported feature, or is too large.
        """
        text = json.dumps(schema)
        if len(text) > MAX_SCHEMA_CHARACTERS:
            raise UserError(
                f"the schema has {len(text)} characters, wanted at most {MAX_SCHEMA_CHARACTERS}"
            )
        return self._build(f"start: {_json_rule(schema)}", "the schema")

    def compile_tool_calls(self, form: ToolCallFormat) -> Grammar:
        """Return the grammar of answers with tools.

        Raises:
            ValueError: a schema is invalid, uses an unsupported feature, or is too large; the
                message names the function.
        """
        try:
            return self._build(self._lark(form), "the tool call format")
        except ValueError:
            # Compile each schema alone to find the one at fault.
            for name, schema in form.schemas:
                try:
                    self.compile_schema(schema)
                except ValueError as error:
                    raise UserError(f"{name}: {error}") from error
            raise

    def _build(self, lark: str, name: str) -> Grammar:
        try:
            matcher = self._matcher(llguidance.LLMatcher.grammar_from_lark(lark))
            return Grammar(matcher.deep_copy(), self._num_tokens, self._with_endings(lark))
        except ValueError as error:
            raise UserError(f"{name} can't be used: {error}") from error

    def _with_endings(self, lark: str) -> str:
        """Return a grammar whose answers may end with any of the stop tokens."""
        answer = re.sub(r"^start:", "answer:", lark, flags=re.MULTILINE)
        listed = ",".join(map(str, self._endings))
        return f"{answer}\nending: <[{listed}]>\nstart: answer ending?"

    def _new_matcher(self, grammar: str) -> llguidance.LLMatcher:
        matcher = llguidance.LLMatcher(self._tokenizer, grammar)
        if matcher.is_error():
            raise UserError(matcher.get_error())
        return matcher

    def _lark(self, form: ToolCallFormat) -> str:
        """Return the Lark grammar of answers with tools; see llguidance's docs/syntax.md."""
        opening, closing = self._marker(TOOL_CALL_OPEN_TAG), self._marker(TOOL_CALL_CLOSE_TAG)
        rules = [f"opening: {opening}", f"closing: {closing}"]
        calls = [f"call_{number}" for number in range(len(form.schemas))]
        for call, (name, schema) in zip(calls, form.schemas, strict=True):
            start = json.dumps(CALL_START + name + CALL_MIDDLE)
            rules.append(f"{call}: {start} {_json_rule(schema)} {json.dumps(CALL_END)}")
        more = "" if form.is_single else ' ("\\n" opening call closing)*'
        rules += [f"call: {' | '.join(calls)}", f"tail: call closing{more}"]
        if form.must_call:
            rules.append("start: opening tail")
        elif form.text_schema is not None:
            rules.append(f"start: {_json_rule(form.text_schema)} | opening tail")
        else:
            rules += self._prose_rules()
        return "\n".join(["%llguidance {}", *rules])

    def _prose_rules(self) -> list[str]:
        """Return the rules for free text, alone or before calls."""
        rules = [
            "start: prose | head tail",
            # Lazy: ends at the first marker, and TEXT with it, as lazy lexemes win over greedy.
            f"text_head[lazy]: /(.|\\n)*{TOOL_CALL_OPEN_TAG}/",
            r"TEXT: /(.|\n)+/",
        ]
        token = self._added.get(TOOL_CALL_OPEN_TAG)
        head = "text_head" if token is None else f"text_head | TEXT? <[{token}]>"
        others = [
            id_
            for text, id_ in self._added.items()
            if text not in (TOOL_CALL_OPEN_TAG, TOOL_CALL_CLOSE_TAG)
        ]
        if not others:
            return [*rules, "prose: TEXT?", f"head: {head}"]
        listed = ",".join(map(str, sorted(others)))
        rules += [f"marked: TEXT? <[{listed}]>", "prose: marked* TEXT?", f"head: marked* ({head})"]
        return rules

    def _marker(self, text: str) -> str:
        """Return the pattern that matches a marker, as a single token or spelled out."""
        token = self._added.get(text)
        return json.dumps(text) if token is None else f"<[{token}]> | {json.dumps(text)}"


def _json_rule(schema: dict[str, Any]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': _LAYOUT})}"
