import copy
import json
from pathlib import Path
from typing import Any

import llguidance
import llguidance.hf
import pytest
import torch
from transformers import AddedToken, PreTrainedTokenizerFast

from raytune_llama.serve.engine.grammar import GrammarCompiler, ToolCallFormat
from raytune_llama.serve.generation.model import ServedModel
from raytune_llama.serve.protocol.chat import ANY_OBJECT
from raytune_llama.tokenizer.loader import encode_text, load_tokenizer

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def grammars(served: ServedModel) -> GrammarCompiler:
    return GrammarCompiler(served.tokenizer, served.stop_ids)


def test_grammar_lets_a_text_of_the_form_through_and_then_only_the_end(
    grammars: GrammarCompiler, served: ServedModel
) -> None:
    grammar = grammars.compile_schema(PERSON)
    for token in encode_text(served.tokenizer, ['{"name": "é人", "age": 7}'])[0]:
        assert grammar.allowed_tokens()[token]
        grammar.advance(token)
    ends = grammar.allowed_tokens().nonzero().squeeze(1).tolist()
    assert set(ends) & served.stop_ids


def test_form_for_another_engine_ends_with_any_stop_token(served: ServedModel) -> None:
    # That engine knows only the tokenizer's own end.
    other_end = 7
    stop_ids = frozenset({other_end})
    assert served.tokenizer.eos_token_id not in stop_ids
    grammar = GrammarCompiler(served.tokenizer, stop_ids).compile_schema(PERSON)
    theirs = llguidance.hf.from_tokenizer(served.tokenizer, eos_token=[1])
    text, *_ = encode_text(served.tokenizer, ['{"name": "ab", "age": 7}'])
    for ending, is_kept in ((other_end, True), (1, True), (8, False)):
        read = llguidance.grammar_from("grammar", grammar.lark)
        matcher = llguidance.LLMatcher(theirs, read)
        assert matcher.consume_tokens(list(text))
        assert matcher.consume_token(ending) == is_kept


@pytest.mark.parametrize("text", ["[", '{"n": 1', '{"name": 3', '{"name": "abcdef'])
def test_grammar_stops_a_text_that_breaks_the_form(
    grammars: GrammarCompiler, served: ServedModel, text: str
) -> None:
    grammar = grammars.compile_schema(PERSON)
    tokens = encode_text(served.tokenizer, [text])[0]
    for token in tokens:
        if not grammar.allowed_tokens()[token]:
            with pytest.raises(ValueError, match="breaks the grammar"):
                grammar.advance(token)
            return
        grammar.advance(token)
    pytest.fail("nothing was stopped")


def test_copy_of_a_grammar_goes_its_own_way(grammars: GrammarCompiler, served: ServedModel) -> None:
    first = grammars.compile_schema(PERSON)
    (brace,) = encode_text(served.tokenizer, ["{"])[0]
    first.advance(brace)
    other = first.copy()
    before = other.allowed_tokens()
    for token in encode_text(served.tokenizer, ['"name"'])[0]:
        first.advance(token)
    assert torch.equal(other.allowed_tokens(), before)
    assert not torch.equal(first.allowed_tokens(), before)


@pytest.mark.parametrize(
    "schema",
    [{"type": "nothing"}, {"type": "string", "pattern": "("}, {"x": "y" * 200_000}],
)
def test_schema_that_cannot_be_used_is_refused(
    grammars: GrammarCompiler, schema: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="schema"):
        grammars.compile_schema(schema)


def test_random_tokens_that_are_allowed_make_json(
    grammars: GrammarCompiler, served: ServedModel
) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = 0
    for _ in range(20):
        grammar, tokens = grammars.compile_schema(PERSON), []
        for _ in range(200):
            places = grammar.allowed_tokens().nonzero().squeeze(1)
            token = int(places[torch.randint(len(places), (1,), generator=generator)])
            if token in served.stop_ids:
                break
            grammar.advance(token)
            tokens.append(token)
        else:
            continue  # it went on with digits or blanks
        found = json.loads(str(served.tokenizer.decode(tokens)))
        assert set(found) == {"name", "age"}
        assert isinstance(found["age"], int)
        whole += 1
    assert whole > 5
    assert grammars.compile_schema(ANY_OBJECT).allowed_tokens().any()


WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rom"}}\n</tool_call>'
OTHER = CALL.replace("weather", "now").replace('{"city": "Rom"}', "{}")
SCHEMAS = [("weather", WEATHER), ("now", {"type": "object", "additionalProperties": False})]
MARKERS = ("<tool_call>", "</tool_call>", "<think>")


@pytest.fixture(scope="module", params=["text", "added", "control"])
def with_markers(
    request: pytest.FixtureRequest, tokenizer_dir: Path
) -> tuple[PreTrainedTokenizerFast, GrammarCompiler]:
    """A tokenizer to which the markers are text, tokens of their own, or control tokens."""
    tokenizer = copy.deepcopy(load_tokenizer(tokenizer_dir))
    if request.param != "text":
        is_control = request.param == "control"
        for text in MARKERS:
            tokenizer.add_tokens(AddedToken(text, special=is_control, normalized=False))
    return tokenizer, GrammarCompiler(tokenizer, frozenset({1}))


def reads(
    with_markers: tuple[PreTrainedTokenizerFast, GrammarCompiler], form: ToolCallFormat, text: str
) -> tuple[bool, bool]:
    """Whether the form lets a text through, and whether it may end there."""
    tokenizer, grammars = with_markers
    grammar = grammars.compile_tool_calls(form)
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        if not grammar.allowed_tokens()[token]:
            return False, False
        grammar.advance(token)
    return True, bool(grammar.allowed_tokens()[1])


@pytest.mark.parametrize(
    ("fields", "text", "wanted"),
    [
        ({}, "the fox < 3", (True, True)),
        ({}, "a <tool_calls", (True, True)),
        ({}, CALL, (True, True)),
        ({}, f"{CALL}\n{OTHER}\n{CALL}", (True, True)),
        ({}, f"Sure.\n\n{CALL}", (True, True)),
        ({}, f"{CALL}\nfox", (False, False)),
        ({}, "say <tool_call> fox", (False, False)),
        ({}, CALL.replace("weather", "fox"), (False, False)),
        ({}, CALL.replace("city", "town"), (False, False)),
        ({}, CALL.replace('"Rom"', "3"), (False, False)),
        ({}, CALL[:-5], (True, False)),
        ({"is_single": True}, CALL, (True, True)),
        ({"is_single": True}, f"{CALL}\n", (False, False)),
        ({"must_call": True}, f"{OTHER}\n{CALL}", (True, True)),
        ({"must_call": True}, "the fox", (False, False)),
        ({"must_call": True}, f"fox {CALL}", (False, False)),
        ({"text_schema": WEATHER}, CALL, (True, True)),
        ({"text_schema": WEATHER}, '{"city": "Rom"}', (True, True)),
        ({"text_schema": WEATHER}, "the fox", (False, False)),
    ],
)
def test_form_of_calls_lets_them_through_and_nothing_else(
    with_markers: tuple[PreTrainedTokenizerFast, GrammarCompiler],
    fields: dict[str, Any],
    text: str,
    wanted: tuple[bool, bool],
) -> None:
    found = reads(with_markers, ToolCallFormat(SCHEMAS, **fields), text)
    # What ends within a marker that is one token can't be written with it.
    assert found == wanted or (text == CALL[:-5] and found == (False, False))


def test_text_before_calls_may_have_tokens_of_its_own(tokenizer_dir: Path) -> None:
    tokenizer = copy.deepcopy(load_tokenizer(tokenizer_dir))
    for text in MARKERS:
        tokenizer.add_tokens(AddedToken(text, special=False))
    both = (tokenizer, GrammarCompiler(tokenizer, frozenset({1})))
    form = ToolCallFormat(SCHEMAS)
    assert reads(both, form, "<think>the fox<think>") == (True, True)
    assert reads(both, form, f"<think>the fox<think>dog\n{CALL}\n{CALL}") == (True, True)
    assert reads(both, form, f"<think>the fox{CALL}dog") == (False, False)
    # Control tokens are no text.
    assert reads(both, form, "the <|im_end|>") == (False, False)


def test_schema_that_cannot_be_used_names_its_function(grammars: GrammarCompiler) -> None:
    form = ToolCallFormat(
        [*SCHEMAS, ("bad", {"type": "object", "properties": {"a": {"type": "no"}}})]
    )
    with pytest.raises(ValueError, match=r"^bad: the schema can't be used"):
        grammars.compile_tool_calls(form)


def test_grammar_asked_for_again_begins_anew(
    grammars: GrammarCompiler, served: ServedModel
) -> None:
    first = grammars.compile_schema(PERSON)
    first.advance(encode_text(served.tokenizer, ["{"])[0][0])
    again = grammars.compile_schema(PERSON)
    assert not torch.equal(first.allowed_tokens(), again.allowed_tokens())
    again.advance(encode_text(served.tokenizer, ["{"])[0][0])
    assert torch.equal(first.allowed_tokens(), again.allowed_tokens())
