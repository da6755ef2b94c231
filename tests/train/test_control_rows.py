"""Promise: a token that the model does not know and will not learn is named before the run."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from raytune_llama.config.settings import from_dict, override
from raytune_llama.data.store.token_store import TokenStore
from raytune_llama.model.table_rows import TableSample, find_untrained_rows
from raytune_llama.model.vocab import VocabularyFit
from raytune_llama.tokenizer.loader import load_tokenizer
from raytune_llama.train.config import PretrainConfig, SftConfig
from raytune_llama.train.control_rows import find_unseen_tokens
from raytune_llama.train.estimate.plan import build_plan, render_plan
from raytune_llama.train.preflight import open_inputs
from tests.train.conftest import MakeConfig, problems_of, write_store

TABLES = ("model.embed_tokens.weight", "lm_head.weight")
TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
BEGIN, END = 0, 2
"""Ids of the template's control tokens."""

Change = Callable[[Tensor], None]


def write_changed(base: Path, path: Path, tables: tuple[str, ...], change: Change) -> Path:
    """Copy a model with the template beside it, and change rows of its tables."""
    shutil.copytree(base, path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    weights = load_file(path / "model.safetensors")
    for name in tables:
        change(weights[name])
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def zero_end(table: Tensor) -> None:
    table[END] = 0


@pytest.fixture
def make_sft(make: MakeConfig, tmp_path: Path) -> Callable[..., SftConfig]:
    """Build the config of a run whose conversations are written by the tokenizer's template."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n')

    def made(model: Path, **fields: Any) -> SftConfig:  # noqa: ANN401
        values = {
            "run_dir": str(tmp_path / "run"),
            "model": {"path": str(model)},
            "data": {
                "sources": [{"path": str(rows)}],
                "store_dir": str(tmp_path / "chats"),
                "chat": {"template": "tokenizer"},
            },
            "lora": {"rank": 4},
            "batch": {"sequence_tokens": 64},
            "max_steps": 100,
        }
        return override(from_dict(SftConfig, values), fields)

    return made


def warnings_of(config: SftConfig | PretrainConfig) -> list[str]:
    return list(open_inputs(config).warnings)


@pytest.mark.parametrize("tables", [TABLES, TABLES[1:]])
def test_zero_row_of_the_templates_control_token_is_named_with_table_and_remedy(
    make_sft: Callable[..., SftConfig],
    untied_model_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    tables: tuple[str, ...],
) -> None:
    model = write_changed(untied_model_dir, tmp_path / "model", tables, zero_end)
    config = make_sft(model)
    (warning,) = warnings_of(config)
    names = [name.split(".")[-2] for name in tables]
    assert warning.startswith("model.path: ")
    assert "<|im_end|> (id 2): zero" in warning
    assert "<s>" not in warning
    assert f"lora.modules_to_save=[{','.join(names)}]" in warning
    assert ("embed_tokens" in warning) == (len(tables) > 1)
    assert warning in caplog.messages
    # The remedy is one.
    assert warnings_of(override(config, {"lora.modules_to_save": names})) == []
    assert warnings_of(override(config, {"lora": None, "train": "full"})) == []
    # Another template has no such token, but its own.
    belle = override(config, {"data.chat.template": "belle"})
    assert warnings_of(belle) == []


@pytest.mark.parametrize("base", ["model_dir", "untied_model_dir"])
def test_rows_of_a_model_that_knows_its_tokens_are_told_nothing(
    make_sft: Callable[..., SftConfig],
    make: MakeConfig,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    base: str,
) -> None:
    whole = request.getfixturevalue(base)
    model = write_changed(whole, tmp_path / "model", (), zero_end)
    assert warnings_of(make_sft(model)) == []
    assert warnings_of(make(model__path=str(model), lora__modules_to_save=[])) == []


def test_rows_of_a_tied_table_are_named_once(
    make_sft: Callable[..., SftConfig], model_dir: Path, tmp_path: Path
) -> None:
    model = write_changed(model_dir, tmp_path / "model", TABLES[:1], zero_end)
    config = make_sft(model)
    (warning,) = warnings_of(config)
    assert warning.count("<|im_end|>") == 1
    assert "lora.modules_to_save=[embed_tokens]" in warning
    assert warnings_of(override(config, {"lora.modules_to_save": ["embed_tokens"]})) == []


def test_end_of_documents_that_the_model_does_not_know_is_named(
    make: MakeConfig, untied_model_dir: Path, tmp_path: Path
) -> None:
    def zero_eos(table: Tensor) -> None:
        table[1] = 0

    model = str(write_changed(untied_model_dir, tmp_path / "model", TABLES, zero_eos))
    config = make(model__path=model, lora__modules_to_save=["embed_tokens"])
    (warning,) = warnings_of(config)
    assert "lm_head: </s> (id 1): zero" in warning
    assert "lora.modules_to_save=[embed_tokens,lm_head]" in warning
    assert warnings_of(override(config, {"data.eos": False})) == []
    new_rows = {"train": "embeddings", "lora": None}
    (warning,) = warnings_of(override(config, new_rows))
    assert "embeddings.lm_head=true" in warning


def test_plan_shows_the_rows_and_needs_no_weights_for_the_rest(
    make_sft: Callable[..., SftConfig], untied_model_dir: Path, tmp_path: Path
) -> None:
    model = write_changed(untied_model_dir, tmp_path / "model", TABLES, zero_end)
    config = make_sft(model, plan=True)
    plan = build_plan(config)
    assert [w for w in plan.warnings if "<|im_end|> (id 2): zero" in w]
    assert "warning      model.path: rows of control tokens" in render_plan(plan)
    (model / "model.safetensors").unlink()
    assert build_plan(config).warnings == ()


NUM_ROWS, WIDTH = 1024, 64


def make_sample(*, num_unused: int, unused_std: float) -> TableSample:
    generator = torch.Generator().manual_seed(0)
    trained = torch.randn(NUM_ROWS, WIDTH, generator=generator) + 0.3
    unused = torch.randn(num_unused, WIDTH, generator=generator) * unused_std
    return TableSample(trained, unused)


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("zero", lambda _: torch.full((WIDTH,), 1e-6)),
        ("the mean of the table", lambda sample: sample.rows_SD.mean(dim=0)),
        # As transformers draws it, from a distribution around the mean.
        (
            "the mean of the table",
            lambda sample: sample.rows_SD.mean(dim=0) + 1e-4 * torch.randn(WIDTH),
        ),
        ("a copy of another row", lambda sample: sample.unused_UD[3]),
        ("like the rows of unused ids", lambda _: 0.1 * torch.randn(WIDTH)),
    ],
)
def test_row_that_was_never_trained_is_recognized_by_what_initialized_it(
    kind: str, row: Callable[[TableSample], Tensor]
) -> None:
    torch.manual_seed(1)
    sample = make_sample(num_unused=64, unused_std=0.1)
    rows = torch.stack([sample.rows_SD[5] * 1.01, row(sample)])
    assert find_untrained_rows(sample, rows) == {1: kind}


def test_row_that_equals_those_of_control_tokens_which_no_text_has_is_named(
    make_sft: Callable[..., SftConfig], untied_model_dir: Path, tmp_path: Path
) -> None:
    def copy_eos(table: Tensor) -> None:
        # The template does not write </s>, and rows that nothing reads drift apart a little.
        table[END] = table[1] * 1.001

    model = write_changed(untied_model_dir, tmp_path / "model", TABLES[1:], copy_eos)
    (warning,) = warnings_of(make_sft(model))
    assert "lm_head: <|im_end|> (id 2): a copy of another row)" in warning


def test_reserved_token_that_the_template_uses_is_no_copy_of_itself(
    make_sft: Callable[..., SftConfig], untied_model_dir: Path, tmp_path: Path
) -> None:
    model = write_changed(untied_model_dir, tmp_path / "model", (), zero_end)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        text = (model / file).read_text()
        (model / file).write_text(text.replace("<|im_end|>", "<|reserved_0|>"))
    assert warnings_of(make_sft(model)) == []


def test_rows_copied_from_one_another_are_both_named() -> None:
    sample = make_sample(num_unused=0, unused_std=0.0)
    row = torch.randn(WIDTH)
    assert set(find_untrained_rows(sample, torch.stack([row, row]))) == {0, 1}


def test_rows_as_trained_ones_are_never_named_whatever_the_unused_rows_are() -> None:
    torch.manual_seed(2)
    rows = torch.randn(100, WIDTH) + 0.3
    for std in (0.1, 1.0):
        sample = make_sample(num_unused=64, unused_std=std)
        assert find_untrained_rows(sample, rows) == {}


@pytest.fixture
def grown_by(tmp_path: Path, tokenizer_dir: Path) -> Callable[..., Path]:
    """Write the tokenizer with more tokens."""

    def grow(special: list[str], plain: list[str]) -> Path:
        path = tmp_path / "grown_by"
        tokenizer = copy.deepcopy(load_tokenizer(tokenizer_dir))
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", *special]})
        tokenizer.add_tokens(plain)
        tokenizer.save_pretrained(path)
        return path

    return grow


def test_new_tokens_that_the_training_text_never_gives_are_named(
    make: MakeConfig, grown_by: Callable[..., Path], tmp_path: Path, untied_model_dir: Path
) -> None:
    path = grown_by(["<|call|>", "<|result|>"], ["reasoning", "unheard"])
    # A control token's spelling in a text is text.
    texts = ["a word of reasoning and <|call|>"] * 20
    write_store(tmp_path / "store", path, train=[texts], validation=[texts[:2]])
    config = make(
        model__path=str(untied_model_dir),
        model__tokenizer=str(path),
        lora__modules_to_save=["embed_tokens", "lm_head"],
        data__store_dir=str(tmp_path / "store"),
        plan=True,
    )
    assert problems_of(config) == []
    (warning,) = [w for w in build_plan(config).warnings if w.startswith("model.tokenizer: ")]
    assert "3 of 4 added tokens" in warning
    assert "<|call|>, <|result|>, unheard" in warning


def test_new_token_that_ends_the_documents_is_seen(
    make: MakeConfig, grown_by: Callable[..., Path], tmp_path: Path
) -> None:
    path = grown_by(["<|call|>"], [])
    tokenizer = load_tokenizer(path)
    texts = ["a word"] * 20
    write_store(tmp_path / "store", path, train=[texts], validation=[])
    store = TokenStore.open(tmp_path / "store")
    # The store puts id 1 at the end of its documents: as if it were the only new one.
    fit = VocabularyFit(num_rows=410, num_base_ids=1, num_ids=2)
    assert find_unseen_tokens(make(), tokenizer, fit, store) == []
    fit = VocabularyFit(num_rows=410, num_base_ids=400, num_ids=401)
    assert len(find_unseen_tokens(make(), tokenizer, fit, store)) == 1
