import json
from typing import Any

import pytest
import torch

from raytune_llama.model.tokenizer import encode_text
from raytune_llama.serve.engine.grammar import ANY_OBJECT, Grammars
from raytune_llama.serve.models import ServedModel

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def grammars(served: ServedModel) -> Grammars:
    return Grammars(served.tokenizer, served.stop_ids)


def test_grammar_lets_a_text_of_the_form_through_and_then_only_the_end(
    grammars: Grammars, served: ServedModel
) -> None:
    grammar = grammars.of_schema(PERSON)
    for token in encode_text(served.tokenizer, ['{"name": "é人", "age": 7}'])[0]:
        assert grammar.allowed()[token]
        grammar.take(token)
    ends = grammar.allowed().nonzero().squeeze(1).tolist()
    assert set(ends) & served.stop_ids


@pytest.mark.parametrize("text", ["[", '{"n": 1', '{"name": 3', '{"name": "abcdef'])
def test_grammar_stops_a_text_that_breaks_the_form(
    grammars: Grammars, served: ServedModel, text: str
) -> None:
    grammar = grammars.of_schema(PERSON)
    tokens = encode_text(served.tokenizer, [text])[0]
    for token in tokens:
        if not grammar.allowed()[token]:
            with pytest.raises(ValueError, match="breaks the grammar"):
                grammar.take(token)
            return
        grammar.take(token)
    pytest.fail("nothing was stopped")


def test_copy_of_a_grammar_goes_its_own_way(grammars: Grammars, served: ServedModel) -> None:
    first = grammars.of_schema(PERSON)
    (brace,) = encode_text(served.tokenizer, ["{"])[0]
    first.take(brace)
    other = first.copy()
    before = other.allowed()
    for token in encode_text(served.tokenizer, ['"name"'])[0]:
        first.take(token)
    assert torch.equal(other.allowed(), before)
    assert not torch.equal(first.allowed(), before)


@pytest.mark.parametrize(
    "schema",
    [{"type": "nothing"}, {"type": "string", "pattern": "("}, {"x": "y" * 200_000}],
)
def test_schema_that_cannot_be_used_is_refused(grammars: Grammars, schema: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="schema"):
        grammars.of_schema(schema)


def test_random_tokens_that_are_allowed_make_json(grammars: Grammars, served: ServedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = 0
    for _ in range(20):
        grammar, tokens = grammars.of_schema(PERSON), []
        for _ in range(200):
            places = grammar.allowed().nonzero().squeeze(1)
            token = int(places[torch.randint(len(places), (1,), generator=generator)])
            if token in served.stop_ids:
                break
            grammar.take(token)
            tokens.append(token)
        else:
            continue  # it went on with digits or blanks
        found = json.loads(str(served.tokenizer.decode(tokens)))
        assert set(found) == {"name", "age"}
        assert isinstance(found["age"], int)
        whole += 1
    assert whole > 5
    assert grammars.of_schema(ANY_OBJECT).allowed().any()
