"""Conversations in files become a token store with a mask, and every row is accounted for."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from raytune_llama.chat.conversations import Conversation, Turn
from raytune_llama.chat.encoding import build_chat_encoder
from raytune_llama.config.settings import ConfigError, from_dict
from raytune_llama.data.build.preparation import open_data
from raytune_llama.data.config import ChatDataConfig
from raytune_llama.data.readers.rows import SourceError
from raytune_llama.data.store.manifest import StoreError
from raytune_llama.data.store.token_store import TokenSplit, TokenStore
from raytune_llama.tokenizer.loader import load_tokenizer
from tests.data.stores import build_store

pytestmark = pytest.mark.ray

ROWS = [
    {"instruction": "Name a fox.", "input": "", "output": "The quick brown fox."},
    {"instruction": "Say it.", "input": "人民日报", "output": "新年的钟声敲响了。"},
    {"instruction": "1 + 1?", "input": "", "output": "2"},
    {"instruction": "Count </s> to ten", "input": "", "output": "for index in range(10)"},
]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def config_of(tmp_path: Path, path: Path, **fields: Any) -> ChatDataConfig:  # noqa: ANN401
    values = {
        "store_dir": str(tmp_path / "store"),
        "sources": [{"path": str(path)}],
        "chat": {"template": "alpaca"},
    }
    return from_dict(ChatDataConfig, values | fields)


def documents_of(split: TokenSplit) -> list[tuple[list[int], list[bool]]]:
    starts = [*split.document_starts(0, split.num_tokens).tolist(), split.num_tokens]
    return [
        (split.tokens(start, stop).tolist(), split.targets(start, stop).tolist())
        for start, stop in pairwise(starts)
    ]


def talks() -> list[Conversation]:
    """The conversations of `ROWS`."""
    prompts = ["Name a fox.", "Say it.\n人民日报", "1 + 1?", "Count </s> to ten"]
    return [
        Conversation((Turn("user", prompt), Turn("assistant", row["output"])))
        for prompt, row in zip(prompts, ROWS, strict=True)
    ]


@pytest.fixture
def prepare(tokenizer_dir: Path, ray_cluster: str) -> Any:  # noqa: ANN401
    def run(config: ChatDataConfig) -> TokenStore:
        return build_store(config, tokenizer_dir)

    return run


def test_store_has_the_ids_and_masks_of_the_template(
    tmp_path: Path,
    tokenizer_dir: Path,
    prepare: Any,  # noqa: ANN401
) -> None:
    config = config_of(tmp_path, write_rows(tmp_path / "rows.jsonl", ROWS))
    store = prepare(config)
    encoder = build_chat_encoder(load_tokenizer(tokenizer_dir), config.chat)
    made: Any = encoder.encode(talks())
    assert documents_of(store.split("train")) == [
        (one.ids.tolist(), one.targets.tolist()) for one in made
    ]
    assert store.manifest.splits["train"].shards[0].targets == sum(
        one.targets.sum() for one in made
    )
    assert store.manifest.inputs["chat"]["template_hash"] == encoder.template.hash()


def test_store_bad_rows_are_counted_and_written_down(
    tmp_path: Path,
    prepare: Any,  # noqa: ANN401
) -> None:
    bad = [
        {"instruction": "no answer"},
        {"instruction": "blank", "output": " "},
        {"instruction": 7, "output": "x"},
    ]
    path = write_rows(tmp_path / "rows.jsonl", [ROWS[0], *bad, ROWS[1]])
    path.write_text(path.read_text() + "\n{broken\n")
    store = prepare(config_of(tmp_path, path, max_bad_fraction=1.0))
    rows = store.manifest.rows
    assert rows.documents == 2
    assert rows.quarantined == {
        "empty_target": 1,
        "invalid_json": 1,
        "missing_field": 1,
        "wrong_type": 1,
    }
    assert rows.is_balanced
    listed = [
        json.loads(line)
        for line in (store.place.path / "quarantine.jsonl").read_text().splitlines()
    ]
    assert sorted((row["line"], row["reason"]) for row in listed) == [
        (2, "missing_field"),
        (3, "empty_target"),
        (4, "wrong_type"),
        (7, "invalid_json"),
    ]


def test_store_too_many_bad_rows_is_refused_by_line(
    tmp_path: Path,
    prepare: Any,  # noqa: ANN401
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [*ROWS, {"instruction": "no answer"}])
    with pytest.raises(SourceError, match=r"rows\.jsonl: line 5, byte \d+: missing_field"):
        prepare(config_of(tmp_path, path))


def test_store_long_conversations_are_cut_or_dropped_with_counts(
    tmp_path: Path,
    prepare: Any,  # noqa: ANN401
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    whole = prepare(config_of(tmp_path, path))
    lengths = [len(ids) for ids, _ in documents_of(whole.split("train"))]
    limit = sorted(lengths)[2]
    chat = {"template": "alpaca", "max_tokens": limit}
    cut = prepare(config_of(tmp_path, path, store_dir=str(tmp_path / "cut"), chat=chat))
    longer = sum(length > limit for length in lengths)
    assert longer
    events = cut.manifest.rows.events
    assert events["truncated"] == longer
    assert events["cut_tokens"] == sum(max(0, length - limit) for length in lengths)
    dropped = prepare(
        config_of(
            tmp_path,
            path,
            store_dir=str(tmp_path / "dropped"),
            chat=chat | {"truncation": "drop"},
            max_left_out_fraction=0.5,
        )
    )
    assert dropped.manifest.rows.skipped == {"too_long": longer}
    assert dropped.split("train").num_documents == len(ROWS) - longer


def test_store_validation_file_in_the_folder_is_never_trained_on(
    tmp_path: Path,
    prepare: Any,  # noqa: ANN401
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder / "a.jsonl", ROWS[:3])
    held_out = write_rows(folder / "b.jsonl", ROWS[3:])
    store = prepare(config_of(tmp_path, folder, validation=[{"path": str(held_out)}]))
    train, validation = (
        {tuple(ids) for ids, _ in documents_of(store.split(name))}
        for name in ("train", "validation")
    )
    assert (len(train), len(validation)) == (3, 1)
    assert not train & validation
    assert [shard.source for shard in store.manifest.splits["validation"].shards] == [1]


def test_store_another_template_is_another_store(
    tmp_path: Path,
    prepare: Any,  # noqa: ANN401
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    prepare(config_of(tmp_path, path))
    with pytest.raises(StoreError, match=r"chat\.template"):
        prepare(config_of(tmp_path, path, chat={"template": "belle"}))


def test_store_is_the_same_for_any_number_of_workers_and_ranges(
    tmp_path: Path,
    prepare: Any,  # noqa: ANN401
) -> None:
    rows = [
        {"instruction": f"{number}?", "output": "word " * (number % 7 + 1) * 20}
        for number in range(9000)
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert path.stat().st_size > 1 << 20
    made = [
        prepare(
            config_of(
                tmp_path,
                path,
                store_dir=str(tmp_path / f"store{number}"),
                validation_fraction=0.1,
                num_workers=number,
                range_mib=1,
            )
        )
        for number in (1, 2)
    ]
    one, two = made
    assert one.manifest == two.manifest
    assert len(one.manifest.splits["train"].shards) > 1
    assert one.manifest.rows.documents == 9000


def test_check_names_a_file_of_another_format(tmp_path: Path, tokenizer_dir: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder / "a.jsonl", ROWS)
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    write_rows(folder / "b.jsonl", [{"conversations": talk}])
    with pytest.raises(ConfigError) as caught:
        open_data(config_of(tmp_path, folder), tokenizer_dir)
    (problem,) = caught.value.problems
    assert problem.startswith("data.sources.0.path: ")
    assert "b.jsonl has the format conversations, but its source has alpaca" in problem


def test_row_of_another_format_ends_the_job_with_its_place(
    tmp_path: Path,
    prepare: Any,  # noqa: ANN401
) -> None:
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    path = write_rows(tmp_path / "rows.jsonl", [*ROWS, {"conversations": talk}])
    with pytest.raises(SourceError, match=r"rows\.jsonl: byte \d+: .* format conversations"):
        prepare(config_of(tmp_path, path))


def test_check_lists_all_problems_with_their_fields(tmp_path: Path, tokenizer_dir: Path) -> None:
    unknown = write_rows(tmp_path / "rows.jsonl", [{"text": "no conversation"}])
    config = config_of(
        tmp_path,
        unknown,
        validation=[{"path": str(tmp_path / "missing.json")}],
        chat={"template": "tokenizer"},
    )
    with pytest.raises(ConfigError) as caught:
        open_data(config, tokenizer_dir)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "data.chat.template",
        "data.validation.0.path",
        "data.sources.0.fields",
        "data.validation.0.path",
    ][: len(caught.value.problems)]
    assert len(caught.value.problems) >= 3


def test_validation_by_file_and_by_fraction_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"validation_fraction: got 0\.1"):
        config_of(tmp_path, tmp_path, validation=[{"path": "b.jsonl"}], validation_fraction=0.1)


def test_check_names_fields_of_the_heads_that_are_not_used(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    rows = [ROWS[0], ROWS[1] | {"hint": "x", "source": "web"}, ROWS[2] | {"hint": "y", "id": 3}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ConfigError) as caught:
        open_data(config_of(tmp_path, path), tokenizer_dir)
    (problem,) = caught.value.problems
    assert problem.startswith("data.sources.0: column 'hint' may carry meaning")
    assert 'data.chat.ignore_fields=["hint"]' in problem
    assert "2 of the first 3" in problem
    assert "rows.jsonl, row at line 2" in problem
    ignored = {"template": "alpaca", "ignore_fields": ["Hint"]}
    open_data(config_of(tmp_path, path, chat=ignored), tokenizer_dir)


def test_check_prints_the_columns_that_nothing_fits(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"no": 1, "Frage": "q", "Antwort": "a"}])
    with pytest.raises(ConfigError) as caught:
        open_data(config_of(tmp_path, path), tokenizer_dir)
    (problem,) = caught.value.problems
    assert problem.startswith("data.sources.0.fields: ")
    assert '{"prompt": "Frage", "completion": "Antwort"}' in problem
    sources = [{"path": str(path), "fields": {"prompt": "Frage", "completion": "Antwort"}}]
    open_data(config_of(tmp_path, path, sources=sources), tokenizer_dir)


def test_check_wrong_path_is_one_problem(tmp_path: Path, tokenizer_dir: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        open_data(config_of(tmp_path, tmp_path / "missing.jsonl"), tokenizer_dir)
    (problem,) = caught.value.problems
    assert "missing.jsonl" in problem


def test_store_field_that_is_not_used_stops_the_build_behind_the_heads(
    tmp_path: Path,
    prepare: Any,  # noqa: ANN401
) -> None:
    plain = [{"instruction": f"{number}?", "output": "a fox"} for number in range(300)]
    for number in (250, 270, 290):
        plain[number]["weight"] = "0.5"
    path = write_rows(tmp_path / "rows.jsonl", plain)
    with pytest.raises(SourceError) as caught:
        prepare(config_of(tmp_path, path, max_bad_fraction=1.0))
    assert "column 'weight' may carry meaning" in str(caught.value)
    assert "it is in 3 rows" in str(caught.value)
    assert "rows.jsonl: line 251" in str(caught.value)


def test_store_too_much_left_out_suspicious_and_no_validation_are_told_together(
    tmp_path: Path,
    prepare: Any,  # noqa: ANN401
) -> None:
    rows = [
        *({"instruction": f"{number}?", "output": "word " * 400} for number in range(3)),
        *({"instruction": f"{number}?", "output": "#REF!"} for number in range(2)),
        *({"instruction": f"{number}?", "output": "a fox"} for number in range(5)),
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    held_out = write_rows(tmp_path / "dev.jsonl", rows[:1])
    chat = {"template": "alpaca", "max_tokens": 200, "truncation": "drop"}
    config = config_of(tmp_path, path, chat=chat, validation=[{"path": str(held_out)}])
    with pytest.raises(SourceError) as caught:
        prepare(config)
    left_out, suspicious, validation = str(caught.value).splitlines()
    assert left_out.startswith("data.max_left_out_fraction: 4 of 11 rows")
    assert "4 2048 to 4095 tokens" in left_out
    assert suspicious.startswith("data.max_suspicious_fraction: 2 of 11 rows")
    assert "2 #REF!" in suspicious
    assert validation.startswith("data.validation: ")


def test_store_marks_repairs_duplicates_and_shared_answers_are_counted(
    tmp_path: Path,
    prepare: Any,  # noqa: ANN401
) -> None:
    ask, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a fox"}
    rows: list[dict[str, Any]] = [
        {"messages": [ask, answer | {"weight": 0}, ask, answer]},
        {"messages": [ask, answer]},
        {"messages": [ask, answer]},
        {"messages": [ask | {"content": "r"}, answer, ask]},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    held_out = write_rows(
        tmp_path / "dev.jsonl", [{"messages": [ask | {"content": "new"}, answer]}]
    )
    store = prepare(
        config_of(
            tmp_path,
            path,
            validation=[{"path": str(held_out)}],
            chat={"template": "belle", "drop_trailing_question": True},
            duplicates={"exact": True},
        )
    )
    found = store.manifest.rows
    assert found.skipped == {"exact_duplicate": 1}
    assert found.events["masked_turns"] == 1
    assert found.events["repaired: trailing question dropped"] == 1
    assert found.events["held_out_answers_in_training"] == 1
    documents = documents_of(store.split("train"))
    assert len(documents) == 3
    assert sum(documents[0][1]) == sum(documents[1][1])
