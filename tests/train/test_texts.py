"""Promise: held-out texts are evaluated exactly in every run, and the run says what became of them.

The building of their token store needs Ray and is tested in `tests/pipeline`.
"""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from raytune_llama.config.settings import ConfigError, from_dict, override
from raytune_llama.data.build.preparation import describe_inputs
from raytune_llama.data.store.manifest import StoreError, fingerprint_of
from raytune_llama.data.store.token_store import TokenStore
from raytune_llama.storage.files import read_json, write_json_atomic
from raytune_llama.train.config import PretrainConfig, SftConfig
from raytune_llama.train.estimate.plan import build_plan
from raytune_llama.train.identity import read_identity
from raytune_llama.train.inputs import build_text_sources, open_text_store, text_store_config
from raytune_llama.train.monitoring.metrics import (
    EVAL_BITS_PER_BYTE,
    EVAL_LOSS,
    EVAL_TEXT_BITS_PER_BYTE,
    EVAL_TEXT_LOSS,
    describe_text_change,
    read_change,
    read_metrics,
)
from raytune_llama.train.run_files import EVALUATED_KEY
from raytune_llama.train.texts import check_text_store, open_texts
from raytune_llama.train.trainer import prepare_run
from tests.train.conftest import (
    MakeConfig,
    curve,
    fields_of,
    make_texts,
    problems_of,
    run_here,
    stage_fields,
    write_store,
)
from tests.train.group import Group

FILES = ("news.txt", "wiki.txt")


@pytest.fixture
def text_fields(tmp_path: Path, tokenizer_dir: Path) -> dict[str, Any]:
    """Fields of a config with two texts, whose token store is there."""
    texts = [make_texts(7, seed=5), make_texts(4, seed=6)]
    write_store(tmp_path / "texts", tokenizer_dir, train=texts)
    for name, documents in zip(FILES, texts, strict=True):
        (tmp_path / name).write_text("\n".join(documents))
    return {
        "eval__texts": [{"path": str(tmp_path / name)} for name in FILES],
        "eval__store_dir": str(tmp_path / "texts"),
        "eval__max_sequences": None,
    }


def plain_bits(model_dir: Path, store_dir: Path, sequence_tokens: int) -> list[tuple[float, int]]:
    """Return the bits and the bytes of each source, from the model's own logits."""
    split = TokenStore.open(store_dir).split("train")
    model = AutoModelForCausalLM.from_pretrained(model_dir).double()
    found: list[tuple[float, int]] = []
    for span in split.source_ranges().values():
        nats = 0.0
        for start in range(span.start, span.stop - 1, sequence_tokens):
            stop = min(start + sequence_tokens + 1, span.stop)
            bounds = [start, *split.document_starts(start + 1, stop).tolist(), stop]
            for first, end in itertools.pairwise(bounds):
                ids = torch.tensor(split.tokens(first, end).astype("int64"))
                with torch.no_grad():
                    logits = model(ids[None]).logits[0]
                nats += cross_entropy(logits[:-1], ids[1:], reduction="sum").item()
        found.append((nats / math.log(2), round(split.bytes_between(span.start, span.stop))))
    return found


def test_texts_are_evaluated_as_the_models_own_logits_say(
    make_config: MakeConfig, text_fields: dict[str, Any], model_dir: Path, tmp_path: Path
) -> None:
    config = make_config(**text_fields, max_steps=2)
    run_here(config)
    wanted = plain_bits(model_dir, tmp_path / "texts", config.batch.sequence_tokens)
    first, last = (r for r in read_metrics(config.run_place) if EVAL_TEXT_LOSS in r)
    assert (first["step"], last["step"]) == (0, 2)
    for name, (bits, num_bytes) in zip(("news", "wiki"), wanted, strict=True):
        got = first[f"{EVAL_TEXT_BITS_PER_BYTE}/{name}"]
        assert got == pytest.approx(bits / num_bytes, rel=1e-6)
    total = sum(bits for bits, _ in wanted) / sum(size for _, size in wanted)
    assert first[EVAL_TEXT_BITS_PER_BYTE] == pytest.approx(total, rel=1e-6)
    assert last[EVAL_TEXT_BITS_PER_BYTE] != first[EVAL_TEXT_BITS_PER_BYTE]


def test_texts_of_one_source_have_no_value_of_their_own_name(
    make_config: MakeConfig, tokenizer_dir: Path, tmp_path: Path
) -> None:
    write_store(tmp_path / "one", tokenizer_dir, train=[make_texts(5, seed=3)])
    fields = {"eval__texts": [{"path": "/a.txt"}], "eval__store_dir": str(tmp_path / "one")}
    config = make_config(**fields, max_steps=1)
    run_here(config)
    names = {name for record in read_metrics(config.run_place) for name in record}
    found = {name for name in names if name.startswith(EVAL_TEXT_BITS_PER_BYTE)}
    assert found == {EVAL_TEXT_BITS_PER_BYTE}


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_texts_on_two_workers_have_the_values_of_one(
    make_config: MakeConfig, text_fields: dict[str, Any], two: Group, stage: int
) -> None:
    fields = {**text_fields, "lora__dropout": 0.0, "eval__max_sequences": 5}
    one, config = make_config("one", **fields), make_config("two", **fields, **stage_fields(stage))
    run_here(one)
    two.run(config)
    for name in (EVAL_TEXT_BITS_PER_BYTE, f"{EVAL_TEXT_BITS_PER_BYTE}/wiki"):
        assert len(curve(one, name)) == 3
        assert curve(config, name) == pytest.approx(curve(one, name), rel=1e-5)


def test_texts_change_neither_the_training_nor_the_best_step(
    make_config: MakeConfig, text_fields: dict[str, Any]
) -> None:
    plain, config = make_config("plain"), make_config(**{**text_fields, "eval__max_sequences": 8})
    run_here(plain)
    run_here(config)
    for name in ("train/loss", EVAL_LOSS, EVAL_BITS_PER_BYTE):
        assert curve(config, name) == curve(plain, name)


def test_texts_of_a_stopped_run_are_compared_with_those_before_its_first_step(
    make_config: MakeConfig, text_fields: dict[str, Any]
) -> None:
    whole, parts = make_config("whole", **text_fields), make_config("parts", **text_fields)
    run_here(whole)
    run_here(parts, stop_after=4)
    run_here(parts)
    changes = [
        read_change(read_metrics(config.run_place), EVAL_TEXT_BITS_PER_BYTE, 6)
        for config in (whole, parts)
    ]
    assert changes[0] == changes[1]
    values = curve(whole, EVAL_TEXT_BITS_PER_BYTE)
    assert tuple(changes[0]) == (values[0], values[-1])


def test_texts_that_are_added_to_a_run_have_no_value_before_its_first_step(
    make_config: MakeConfig, text_fields: dict[str, Any]
) -> None:
    run_here(make_config(), stop_after=4)
    config = make_config(**text_fields)
    run_here(config)
    change = read_change(read_metrics(config.run_place), EVAL_TEXT_BITS_PER_BYTE, 6)
    assert change.before is None
    assert change.after == curve(config, EVAL_TEXT_BITS_PER_BYTE)[-1]


def test_texts_are_evaluated_without_validation_text(
    make_config: MakeConfig, text_fields: dict[str, Any], tokenizer_dir: Path, tmp_path: Path
) -> None:
    write_store(tmp_path / "bare", tokenizer_dir, train=[make_texts(40, seed=1)], validation=[])
    fields = {**text_fields, "data__store_dir": str(tmp_path / "bare")}
    for max_steps, count in ((0, 1), (3, 2)):
        config = make_config(f"run-{max_steps}", **fields, max_steps=max_steps)
        run_here(config)
        assert len(curve(config, EVAL_TEXT_BITS_PER_BYTE)) == count
        assert curve(config, EVAL_LOSS) == []


def test_text_store_has_the_document_ends_of_the_run(make_config: MakeConfig) -> None:
    texts = [{"path": "/a.txt"}]
    config = make_config(
        eval__texts=texts,
        data__bos=True,
        data__eos=False,
        data__cache_dir="/cache",
        data__validation_fraction=0.5,
        data__cleaning={"normalization": "NFKC"},
    )
    made = text_store_config(config)
    assert made is not None
    assert (made.bos, made.eos, made.cache_dir, made.validation_fraction) == (
        True,
        False,
        "/cache",
        0.0,
    )
    assert made.cleaning == type(made.cleaning)()
    assert made.store_dir == f"{config.data.store_dir}-texts"
    assert [source.path for source in made.sources] == ["/a.txt"]


def test_text_store_of_conversations_has_the_default_document_ends(model_dir: Path) -> None:
    config = from_dict(
        SftConfig,
        {
            "run_dir": "/run",
            "model": {"path": str(model_dir)},
            "data": {"sources": [{"path": "/chat.jsonl"}], "store_dir": "/store"},
            "lora": {},
            "max_steps": 1,
            "eval": {"texts": [{"path": "/a.txt"}], "store_dir": "/elsewhere"},
        },
    )
    made = text_store_config(config)
    assert made is not None
    assert (made.bos, made.eos, made.store_dir) == ("auto", True, "/elsewhere")


def test_text_that_is_too_short_to_be_evaluated_is_refused(
    make_config: MakeConfig, text_fields: dict[str, Any], tokenizer_dir: Path, tmp_path: Path
) -> None:
    write_store(tmp_path / "short", tokenizer_dir, train=[make_texts(5, seed=3)])
    config = make_config(**{**text_fields, "eval__store_dir": str(tmp_path / "short")})
    with pytest.raises(ConfigError, match=r"^eval\.texts\.1: .*wiki\.txt has less than two tokens"):
        build_text_sources(config, open_text_store(config))


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"texts": [{"path": "a.txt", "weight": 1.0}]}, ["eval.texts.0.weight"]),
        ({"texts": [{"path": "x/a.txt"}, {"path": "y/a.txt"}]}, ["eval.texts.1.name"]),
        ({"store_dir": "/store"}, ["eval.store_dir"]),
        (
            {"texts": [{"path": "a.txt", "weight": 1.0}], "every_steps": None, "patience": 2},
            ["eval.patience", "eval.texts.0.weight"],
        ),
    ],
)
def test_texts_that_cannot_be_are_refused_by_their_fields(
    make_config: MakeConfig, fields: dict[str, Any], wanted: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(**{f"eval__{name}": value for name, value in fields.items()})
    assert fields_of(caught.value.problems) == wanted


def test_texts_that_are_missing_are_reported_with_all_other_problems(
    make: MakeConfig, tmp_path: Path
) -> None:
    config = make(
        eval__texts=[{"path": str(tmp_path / "none.txt")}],
        data__sources=[{"path": str(tmp_path / "nothing.txt")}],
        lora__targets=["qproj"],
    )
    assert set(fields_of(problems_of(config))) == {
        "data.sources.0.path",
        "eval.texts.0.path",
        "lora.targets",
    }


def test_text_store_of_other_texts_is_never_used(
    make: MakeConfig, text_fields: dict[str, Any], tmp_path: Path
) -> None:
    config = make(**text_fields)
    made, inputs = text_store_config(config), open_texts(config)
    assert made is not None
    assert inputs is not None
    described = describe_inputs(made, inputs)
    manifest = read_json(tmp_path / "texts" / "manifest.json")
    manifest |= {"inputs": described, "fingerprint": fingerprint_of(described)}
    write_json_atomic(tmp_path / "texts" / "manifest.json", manifest)
    check_text_store(config, inputs)
    (tmp_path / "wiki.txt").write_text("another text\n")
    wanted = r"(?s)^eval\.store_dir: .*eval\.texts\.1.*wiki\.txt"
    with pytest.raises(StoreError, match=wanted):
        check_text_store(config, open_texts(config))
    plan = build_plan(override(config, {"plan": True}))
    assert any("would be refused: eval.store_dir: " in warning for warning in plan.warnings)


def test_texts_may_be_added_or_left_out_but_not_changed(
    make: MakeConfig, text_fields: dict[str, Any], tokenizer_dir: Path, tmp_path: Path
) -> None:
    def start(config: PretrainConfig) -> None:
        store = TokenStore.open(Path(config.data.store_dir))
        texts = open_text_store(config)
        prepare_run(config, store, None, texts=texts)  # pyright: ignore[reportArgumentType]

    bare, config = make(), make(**text_fields)
    start(bare)
    assert read_identity(bare.run_place)[EVALUATED_KEY] == {}
    start(config)
    start(bare)
    write_store(tmp_path / "other", tokenizer_dir, train=[make_texts(9, seed=8)] * 2)
    other = override(config, {"eval.store_dir": str(tmp_path / "other")})
    with pytest.raises(ConfigError, match=r"\.eval\.texts: "):
        start(other)
    start(config)


@pytest.mark.parametrize(
    ("before", "after", "wanted"),
    [
        (0.872, 1.543, "text 0.8720 -> 1.5430 bits per byte: worse than before tuning"),
        (0.872, 0.8, "text 0.8720 -> 0.8000 bits per byte: better than before tuning"),
        (0.87201, 0.87202, "text 0.8720 -> 0.8720 bits per byte: the same as before tuning"),
        (0.872, math.nan, "text 0.8720 -> nan bits per byte: worse than before tuning"),
        (None, 0.8, "text 0.8000 bits per byte"),
    ],
)
def test_text_change_is_told_in_words(before: float | None, after: float, wanted: str) -> None:
    assert describe_text_change(before, after) == wanted
