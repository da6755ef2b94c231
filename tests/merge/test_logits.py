"""Promise: with verify=logits a model that is not base and adapters never appears."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_llama.merge.logits import compare_logits, load_comparison_ids
from raytune_llama.merge.plan import MergePlan, plan_merge
from raytune_llama.model.adapter import Adapter
from tests.conftest import train_tokenizer
from tests.merge.conftest import WHOLE, MakeAdapter, MakeBase, left_over, merge


@pytest.fixture
def make_spoken(make_base: MakeBase, tokenizer_dir: Path) -> MakeBase:
    """Make a base with a tokenizer."""

    def make(**fields: Any) -> Path:  # noqa: ANN401
        base = make_base(**fields)
        train_tokenizer(base)
        return base

    return make


def plan_as(base: Path, adapters: list[Path], dtype: torch.dtype) -> MergePlan:
    return plan_merge(base, adapters, lambda _: dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("base_fields", "adapter_fields"),
    [
        ({}, {}),
        ({}, {"use_dora": True, "use_rslora": True}),
        ({}, {"modules_to_save": WHOLE, "rows": 423}),
        ({"tie_word_embeddings": True}, {"modules_to_save": WHOLE, "ensure_weight_tying": True}),
        ({"tie_word_embeddings": True}, {"modules_to_save": ["embed_tokens"]}),
    ],
    ids=str,
)
def test_right_merge_passes(
    make_spoken: MakeBase,
    make_adapter: MakeAdapter,
    base_fields: dict[str, Any],
    adapter_fields: dict[str, Any],
    dtype: str,
) -> None:
    base = make_spoken(**base_fields)
    adapter = make_adapter(base, **adapter_fields)
    target = merge(base, adapter, verify="logits", dtype=dtype)
    plan = plan_as(base, [adapter], getattr(torch, dtype))
    found = compare_logits(target, plan, load_comparison_ids(base, None))
    assert found.largest <= found.allowed
    # Random models of 410 rows: nearly all rows are as likely.
    assert found.perplexities[0] == pytest.approx(found.perplexities[1], rel=1e-3)
    assert found.perplexities[0] > 300


def test_two_adapters_in_order_pass(make_spoken: MakeBase, make_adapter: MakeAdapter) -> None:
    base = make_spoken()
    first = make_adapter(base, "first", modules_to_save=WHOLE)
    middle = merge(base, first).rename(base.with_name("middle"))
    second = make_adapter(middle, "second", rows=423, modules_to_save=WHOLE, r=2)
    assert merge(base, first, second, verify="logits").is_dir()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapter_that_was_read_wrong_fails_though_each_tensor_is_proven(
    make_spoken: MakeBase, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    base = make_spoken()
    adapter = make_adapter(base)
    opened = Adapter.open

    def wrong(path: Path, prefix: str = "") -> Adapter:
        read = opened(path, prefix)
        for update in read.low_rank.values():
            update.scale *= 1.05
        return read

    monkeypatch.setattr(Adapter, "open", wrong)
    with pytest.raises(AssertionError, match="largest difference of a logit from PEFT's is"):
        merge(base, adapter, verify="logits", dtype=dtype)
    assert left_over(base) == []
    assert merge(base, adapter, verify="tensors", dtype=dtype).is_dir()


def test_text_is_read_from_its_beginning(
    make_spoken: MakeBase, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    base = make_spoken()
    text = tmp_path / "long.txt"
    text.write_text("The quick brown fox. 新年的钟声敲响了。\n" * 5000)
    samples = load_comparison_ids(base, str(text))
    assert sum(ids_BT.shape[1] for ids_BT in samples) == 1024
    assert merge(base, make_adapter(base), verify="logits", verify_text=str(text)).is_dir()


def spoil_missing(text: Path) -> None:
    text.unlink()


def spoil_short(text: Path) -> None:
    text.write_text("")


def spoil_bytes(text: Path) -> None:
    text.write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_missing, "is not a file"),
        (spoil_short, "has fewer than two tokens"),
        (spoil_bytes, "is not UTF-8"),
    ],
)
def test_text_that_cannot_be_used_is_named(
    make_spoken: MakeBase,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    spoil: Callable[[Path], None],
    message: str,
) -> None:
    base = make_spoken()
    text = tmp_path / "text.txt"
    text.write_text("a text")
    spoil(text)
    with pytest.raises(ValueError, match=f"verify_text: .* {message}"):
        merge(base, make_adapter(base), verify="logits", verify_text=str(text))
    assert left_over(base) == []


def test_model_without_a_tokenizer_is_refused(
    make_base: MakeBase, make_adapter: MakeAdapter
) -> None:
    base = make_base()
    with pytest.raises(ValueError, match="verify: logits need a tokenizer"):
        merge(base, make_adapter(base), verify="logits")
