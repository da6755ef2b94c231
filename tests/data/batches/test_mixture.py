"""Promise: what a mixture is asked to be and what it comes to is said, or refused by field."""

import logging
from typing import Any

import pytest

from raytune_llama.config.settings import ConfigError
from raytune_llama.data.batches.config import check_mixture, source_names
from raytune_llama.data.batches.mixture import (
    TrainingSource,
    cut_sources,
    log_mixture,
    mixture_record,
)
from raytune_llama.data.readers.config import SourceConfig
from raytune_llama.data.store.token_store import TokenSplit
from tests.data.conftest import MakeSplit


def source(path: str, **fields: Any) -> SourceConfig:  # noqa: ANN401
    return SourceConfig(path=path, **fields)


def cut(
    split: TokenSplit,
    *configs: SourceConfig,
    packing: Any = "isolated",  # noqa: ANN401
) -> tuple[TrainingSource, ...]:
    return cut_sources(configs, split, packing, 4, fingerprint="f", seed=1)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/corpora/news.txt", "news"),
        ("/corpora/news.v2.jsonl", "news.v2"),
        ("/corpora/news.jsonl.gz", "news"),
        ("/corpora/wiki-zh", "wiki-zh"),
        ("/corpora/wiki-zh/", "wiki-zh"),
        ("/corpora/wiki/*.txt", "wiki"),
        ("/corpora/wiki/**/part-*.jsonl.zst", "part"),
        ("/corpora/人民日报.txt", "人民日报"),
        ("/corpora/my notes (new).txt", "my_notes_new"),
        ("s3://bucket/corpora/news.parquet?endpoint_override=127.0.0.1:9000", "news"),
        ("s3://bucket/*.txt", "bucket"),
        ("/*", "source0"),
        ("ftp://bad", "bad"),
    ],
)
def test_source_names_without_one_come_from_the_path(path: str, name: str) -> None:
    assert source_names([source(path)]) == (name,)
    # What is made of a path is a name that could have been given.
    assert source_names([source(path, name=name)]) == (name,)


def test_check_mixture_equal_names_are_refused_and_both_named() -> None:
    (problem,) = check_mixture([source("/zh/a.txt"), source("/b", name="a")], None)
    assert problem.startswith("data.sources.1.name: 'a'")
    assert "data.sources.0" in problem
    assert check_mixture([source("/zh/a.txt"), source("/en/a.txt", name="en")], None) == []


def test_check_mixture_weights_for_some_are_refused() -> None:
    problems = check_mixture([source("/a"), source("/b", weight=0.5), source("/c")], 1000)
    assert [problem.partition(":")[0] for problem in problems] == [
        "data.sources.0.weight",
        "data.sources.2.weight",
    ]


@pytest.mark.parametrize(("total", "is_refused"), [(100, True), (1000, False), (10**6, False)])
def test_check_mixture_weight_without_a_sequence_is_refused(total: int, is_refused: bool) -> None:  # noqa: FBT001
    problems = check_mixture([source("/a", weight=999), source("/b", weight=1)], total)
    assert [problem.partition(":")[0] for problem in problems] == [
        "data.sources.1.weight"
    ] * is_refused


def test_cut_sources_without_sequences_are_left_out(make_split: MakeSplit) -> None:
    # The second has one token, which is no target; the third is not in this split.
    split = make_split([[[1] * 9]], [[[2]]])
    found = cut(split, source("/a"), source("/b"), source("/c"))
    assert [(one.name, one.weight, one.sequences.num_sequences) for one in found] == [
        ("a", None, 2)
    ]


def test_cut_sources_weighted_without_sequences_are_refused(make_split: MakeSplit) -> None:
    split = make_split([[[1] * 9]], [[[2]]])
    configs = [source("/a", weight=1), source("/b", weight=1), source("/c", weight=1)]
    with pytest.raises(ConfigError) as caught:
        cut(split, *configs)
    fields = [problem.partition(":")[0] for problem in caught.value.problems]
    assert fields == ["data.sources.1.weight", "data.sources.2.weight"]


def test_cut_sources_split_without_a_sequence_is_refused(make_split: MakeSplit) -> None:
    with pytest.raises(ConfigError, match=r"data\.sources: got 1 training tokens"):
        cut(make_split([[[1]]]), source("/a"))
    with pytest.raises(ConfigError, match=r"data\.sources: got 0 training tokens"):
        cut(make_split(), source("/a"))


def warned_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    caplog.clear()
    return found


def test_log_mixture_warns_of_text_that_is_read_too_often(
    make_split: MakeSplit, caplog: pytest.LogCaptureFixture
) -> None:
    split = make_split([[[1] * 41]], [[[2] * 401]])  # 10 and 100 sequences
    sources = cut(split, source("/few", weight=1), source("/many", weight=3))
    log_mixture(sources, (0.25, 0.75), total_positions=160)
    assert warned_of(caplog) == []
    log_mixture(sources, (0.25, 0.75), total_positions=200)
    (warning,) = warned_of(caplog)
    assert "few" in warning
    assert "5.0 times" in warning


def test_log_mixture_windows_of_long_documents_are_no_repetition(
    make_split: MakeSplit, caplog: pytest.LogCaptureFixture
) -> None:
    # An epoch of windows reads 8 of 44 tokens; 30 epochs read each about 5.5 times.
    sources = cut(make_split([[[1] * 22, [2] * 22]]), source("/a"), packing="crops")
    log_mixture(sources, (1.0,), total_positions=40)
    assert warned_of(caplog) == []
    log_mixture(sources, (1.0,), total_positions=60)
    assert len(warned_of(caplog)) == 1


def test_mixture_record_says_what_was_seen(make_split: MakeSplit) -> None:
    split = make_split([[[1] * 41]], [[[2] * 401]])
    sources = cut(split, source("/few", weight=1), source("/many", weight=3))
    assert mixture_record(sources, [25, 75], [100, 300]) == {
        "few": {
            "weight": 1,
            "sequences": 25,
            "sequence_share": 0.25,
            "target_tokens": 100,
            "target_share": 0.25,
            "epochs": 2.5,
        },
        "many": {
            "weight": 3,
            "sequences": 75,
            "sequence_share": 0.75,
            "target_tokens": 300,
            "target_share": 0.75,
            "epochs": 0.75,
        },
    }
