"""Every row of the input has its place, whatever its format, and whether it can be used."""

import json
from typing import Any

import pytest

from raytune_llama.config.settings import ConfigError
from raytune_llama.data.readers.rows import SourceError
from raytune_llama.generate.config import InputConfig
from raytune_llama.generate.prompts import Prompts, read_prompts
from raytune_llama.storage.directories import pin_source
from raytune_llama.storage.place import Place
from tests.faulty_s3 import FaultyServer
from tests.generate.conftest import MakeConfig, read_rows
from tests.hub_server import HubServer


def lines(*rows: object) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def asked(record: dict[str, Any]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in record["messages"]]


def prompts_of(make_config: MakeConfig, text: str, **fields: Any) -> Prompts:  # noqa: ANN401
    config = make_config(text, **fields)
    assert config.input is not None
    return read_prompts(config.input, with_prompt=config.with_prompt, system=config.system)


def test_text_file_has_an_instruction_per_line_and_names_blank_ones(
    make_config: MakeConfig,
) -> None:
    prompts = prompts_of(make_config, "first\n\n  \nsecond \n人民\n", system="Be brief.")
    described = [row.describe() for row in prompts.rows]
    assert [record["index"] for record in described] == [0, 1, 2]
    assert [asked(record)[1] for record in described] == [
        ("user", "first"),
        ("user", "second "),
        ("user", "人民"),
    ]
    assert asked(described[0])[0] == ("system", "Be brief.")
    assert prompts.num_blank_lines == 2
    assert prompts.blank_lines == ["input.txt: line 2", "input.txt: line 3"]


def test_text_file_on_the_hub_and_in_a_bucket_with_options_is_one_of_instructions(
    make_config: MakeConfig, hub: HubServer, s3_path: Place, faulty_s3: FaultyServer
) -> None:
    hub.publish("org/corpus", {"prompts.txt": b"first\nsecond\n"}, kind="datasets")
    bucket = faulty_s3.front_of(s3_path / "prompts.txt")
    bucket.write_bytes(b"first\nsecond\n")
    pinned = pin_source("hf://datasets/org/corpus/prompts.txt", "input.path")
    for path in (pinned, str(bucket)):
        prompts = read_prompts(InputConfig(path=path), with_prompt=True, system=None)
        assert [asked(row.describe()) for row in prompts.rows] == [
            [("user", "first")],
            [("user", "second")],
        ]


@pytest.mark.parametrize(
    ("row", "wanted", "reference"),
    [
        ({"instruction": "a", "input": "b", "output": "c"}, [("user", "a\nb")], "c"),
        ({"instruction": "a", "input": "", "output": ""}, [("user", "a")], None),
        ({"instruction": "a"}, [("user", "a")], None),
        ({"prompt": "a"}, [("user", "a")], None),
        ({"question": "a", "answer": "b"}, [("user", "a")], "b"),
        ({"text": "a"}, [("user", "a")], None),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            [("user", "a")],
            "b",
        ),
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                    {"role": "user", "content": "c"},
                ]
            },
            [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")],
            None,
        ),
    ],
)
def test_row_of_each_format_is_a_prompt_without_its_last_answer(
    make_config: MakeConfig,
    row: dict[str, Any],
    wanted: list[tuple[str, str]],
    reference: str | None,
) -> None:
    (read,) = read_rows(make_config(lines(row | {"id": 7}), suffix="jsonl"))
    record = read.describe()
    assert asked(record) == wanted
    assert record.get("reference") == reference
    assert record["id"] == "7"


def test_tools_of_a_row_are_in_its_output(make_config: MakeConfig) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    row = {"messages": [{"role": "user", "content": "Rome?"}], "tools": [tool]}
    (read,) = read_rows(make_config(lines(row), suffix="jsonl"))
    assert read.describe()["tools"] == [tool]


def test_columns_are_named_by_the_config(make_config: MakeConfig) -> None:
    row = {"Aufgabe": "a", "Antwort": "b", "weight": 2}
    fields = {"prompt": "Aufgabe", "completion": "Antwort"}
    given = {"fields": fields, "ignore_fields": ["weight"]}
    (read,) = read_rows(make_config(lines(row), suffix="jsonl", input=given))
    assert (asked(read.describe()), read.reference) == ([("user", "a")], "b")


def test_row_that_cannot_be_used_keeps_its_place_and_says_why(make_config: MakeConfig) -> None:
    text = lines({"prompt": "a"}) + '{"prompt": \n\n' + lines({"what": "b"}, {"prompt": "c"})
    text += lines({"prompt": "d", "loss_weights": [1]}, {"messages": [{"role": "user"}]})
    prompts = prompts_of(make_config, text, suffix="jsonl")
    problems = [row.problem for row in prompts.rows]
    assert [row.index for row in prompts.rows] == list(range(6))
    assert [problem is None for problem in problems] == [True, False, False, True, False, False]
    assert "input.jsonl: line 2: invalid_json" in str(problems[1])
    assert "the columns are 'what'" in str(problems[2])
    assert "unknown column 'loss_weights'" in str(problems[4])
    assert prompts.num_blank_lines == 1


def test_raw_text_is_taken_from_lines_and_rows_of_one_text(make_config: MakeConfig) -> None:
    rows = read_rows(make_config(" the fox\n", with_prompt=False))
    assert rows[0].describe() == {"index": 0, "prompt": " the fox"}
    two = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    long = {"messages": [*two["messages"], {"role": "user", "content": "c"}]}
    config = make_config(lines({"text": "x"}, two, long), suffix="jsonl", with_prompt=False)
    first, second, third = read_rows(config)
    assert (first.text, second.text, second.reference) == ("x", "a", "b")
    assert third.text is None
    assert "the row has 3" in str(third.problem)


def test_number_of_rows_can_be_limited(make_config: MakeConfig) -> None:
    assert len(read_rows(make_config("a\n\nb\nc\n", input={"max_rows": 2}))) == 2


def test_input_without_a_usable_row_is_refused(make_config: MakeConfig) -> None:
    with pytest.raises(SourceError, match=r"none of 1 rows can be used.*unknown_format"):
        read_rows(make_config(lines({"what": 1}), suffix="jsonl"))
    with pytest.raises(SourceError, match="none of 0 rows"):
        read_rows(make_config("\n \n"))


def test_missing_file_names_the_field(make_config: MakeConfig) -> None:
    config = make_config("a\n", input={"path": "/no/such/file.jsonl"})
    with pytest.raises(ConfigError, match=r"^input\.path: "):
        read_rows(config)


def test_columns_of_a_text_file_are_refused(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"input\.fields: set, but .* is plain text"):
        read_rows(make_config("a\n", input={"fields": {"prompt": "a"}}))


def test_system_message_is_for_rows_that_have_none(make_config: MakeConfig) -> None:
    own = {"messages": [{"role": "system", "content": "own"}, {"role": "user", "content": "a"}]}
    config = make_config(lines({"prompt": "a"}, own), suffix="jsonl", system="given")
    first, second = (asked(row.describe()) for row in read_rows(config))
    assert first == [("system", "given"), ("user", "a")]
    assert second == [("system", "own"), ("user", "a")]
