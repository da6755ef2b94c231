"""Promise: a merged model is base and adapter, tensor by tensor; what does not fit is refused."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from raytune_llama.merge.plan import MergePlan
from raytune_llama.model.tensors import open_weights
from tests.merge.conftest import ALL, IDS, WHOLE, MakeAdapter, MakeBase, load, merge

ROOT = Path(__file__).parents[2]


def attached(base: Path, *adapters: Path) -> Any:  # noqa: ANN401
    """Return what PEFT makes of base and adapters, with float32 weights."""
    model: Any = load(base)
    for adapter in adapters:
        weights = load_file(adapter / "adapter_model.safetensors")
        table = weights.get("base_model.model.model.embed_tokens.weight")
        if table is not None and len(table) > model.config.vocab_size:
            model.resize_token_embeddings(len(table), mean_resizing=False)
        model = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return model.eval()


def assert_same(target: Path, wanted: Any) -> None:  # noqa: ANN401
    got = load(target)
    with torch.no_grad():
        torch.testing.assert_close(got(IDS).logits, wanted(IDS).logits, rtol=1e-4, atol=1e-4)
    state, other = got.state_dict(), wanted.state_dict()
    assert set(state) == set(other)
    for name, tensor in other.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 5}},
        {"modules_to_save": WHOLE},
        {"target_modules": [*ALL, "embed_tokens"]},
        {"target_modules": [*ALL, "lm_head"]},
    ],
    ids=str,
)
def test_merge_equals_peft_s_own(
    make_base: MakeBase, make_adapter: MakeAdapter, fields: dict[str, Any]
) -> None:
    base = make_base(shard_size="20KB")
    adapter = make_adapter(base, **fields)
    assert_same(merge(base, adapter), attached(base, adapter))


def test_merge_in_float32_has_every_bit_of_w_plus_s_b_a(
    make_base: MakeBase, make_adapter: MakeAdapter
) -> None:
    base = make_base()
    adapter = make_adapter(base)
    merged, before = open_weights(merge(base, adapter)), open_weights(base)
    factors = load_file(adapter / "adapter_model.safetensors")
    for name in before.specs:
        key = f"base_model.model.{name.removesuffix('weight')}lora_"
        wanted = before.read(name)
        if f"{key}A.weight" in factors:
            wanted += factors[f"{key}B.weight"] @ factors[f"{key}A.weight"] * 4.0
        assert torch.equal(merged.read(name), wanted), name


@pytest.mark.parametrize("rows", [0, 423])
def test_merge_two_adapters_in_order_takes_the_tables_of_the_last(
    make_base: MakeBase, make_adapter: MakeAdapter, rows: int
) -> None:
    base = make_base()
    first = make_adapter(base, "first", modules_to_save=WHOLE)
    middle = merge(base, first).rename(base.with_name("middle"))
    second = make_adapter(middle, "second", rows=rows, modules_to_save=WHOLE, r=2)
    target = merge(base, first, second)
    assert_same(target, attached(base, first, second))
    assert json.loads((target / "config.json").read_text())["vocab_size"] == rows or 410


def test_merge_reads_what_old_peft_wrote(make_base: MakeBase, make_adapter: MakeAdapter) -> None:
    base = make_base()
    adapter = make_adapter(base, modules_to_save=WHOLE)
    wanted = attached(base, adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(weights, adapter / "adapter_model.bin")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    old = ("peft_type", "r", "lora_alpha", "fan_in_fan_out", "target_modules", "modules_to_save")
    settings = {name: settings[name] for name in old}
    settings |= {"merge_weights": False, "enable_lora": None}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    assert_same(merge(base, adapter), wanted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_merge_casts_once(make_base: MakeBase, make_adapter: MakeAdapter, dtype: str) -> None:
    base = make_base()
    adapter = make_adapter(base)
    precise = open_weights(merge(base, adapter).rename(base.with_name("precise")))
    target = merge(base, adapter, dtype=dtype)
    for name in precise.specs:
        wanted = precise.read(name).to(getattr(torch, dtype))
        assert torch.equal(open_weights(target).read(name), wanted), name
    assert json.loads((target / "config.json").read_text())["dtype"] == dtype
    assert AutoModelForCausalLM.from_pretrained(target).dtype == getattr(torch, dtype)


@pytest.mark.parametrize("tying", [True, False])
@pytest.mark.parametrize("saved", [["embed_tokens"], WHOLE])
def test_merge_of_a_tied_base_keeps_what_was_trained(
    make_base: MakeBase, make_adapter: MakeAdapter, saved: list[str], *, tying: bool
) -> None:
    base = make_base(tie_word_embeddings=True)
    adapter = make_adapter(base, modules_to_save=saved, ensure_weight_tying=tying)
    target = merge(base, adapter)
    wanted = peft.PeftModel.from_pretrained(load(base), str(adapter)).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            load(target)(IDS).logits, wanted(IDS).logits, rtol=1e-4, atol=1e-4
        )
    is_tied = json.loads((target / "config.json").read_text())["tie_word_embeddings"]
    assert is_tied == ("lm_head.weight" not in open_weights(target).specs)
    assert is_tied or not tying


def rewrite(adapter: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    change(weights)
    save_file(weights, adapter / "adapter_model.safetensors")


def spoil_empty(_: Path, adapter: Path) -> None:
    rewrite(adapter, lambda weights: weights.clear())


def spoil_zero(_: Path, adapter: Path) -> None:
    rewrite(adapter, lambda weights: [weights[key].zero_() for key in weights if "lora_B" in key])


def spoil_half(_: Path, adapter: Path) -> None:
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    rewrite(adapter, lambda weights: weights.pop(key))


def spoil_config(_: Path, adapter: Path) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"r": 8}))


def spoil_pointer(base: Path, _: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (base / "model.safetensors").write_text(pointer)


def spoil_cut(_: Path, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def spoil_manifest(base: Path, adapter: Path) -> None:
    (adapter / "manifest.json").write_text(json.dumps({"base": {"model.safetensors": "0" * 64}}))


def spoil_kind(_: Path, adapter: Path) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"peft_type": "IA3"}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_empty, "contains no tensors, so that it would change nothing"),
        (spoil_zero, "they change no weight"),
        (spoil_half, r"layers\.0\.self_attn\.q_proj: A or B is missing"),
        (spoil_config, r"A is \[4, \d+\], B is \[.*\], and adapter_config.json says rank 8"),
        (spoil_pointer, "is a Git LFS pointer"),
        (spoil_cut, r"adapter_model\.safetensors: has \d+ bytes, but its header requires"),
        (spoil_manifest, r"is not the base that .*: it has another model\.safetensors \(SHA-256"),
        (spoil_kind, "peft_type is IA3, but only LORA is supported"),
    ],
)
def test_merge_bad_input_is_named_and_leaves_nothing(
    make_base: MakeBase,
    make_adapter: MakeAdapter,
    spoil: Callable[[Path, Path], None],
    message: str,
) -> None:
    base = make_base()
    adapter = make_adapter(base)
    spoil(base, adapter)
    with pytest.raises(ValueError, match=message):
        merge(base, adapter)
    assert sorted(path.name for path in base.parent.iterdir()) == ["adapter", "base"]


def test_merge_adapter_of_another_base_is_refused(
    make_base: MakeBase, make_adapter: MakeAdapter
) -> None:
    wide = make_base("wide", hidden_size=64)
    deep = make_base("deep", num_hidden_layers=3)
    base = make_base()
    with pytest.raises(
        ValueError, match=r"updates model\.layers\.0.* of another shape than the base's \[32"
    ):
        merge(base, make_adapter(wide, "of-wide"))
    with pytest.raises(ValueError, match=r"that the base does not have, first model\.layers\.2"):
        merge(base, make_adapter(deep, "of-deep"))


def test_merge_adapters_in_reversed_order_are_refused(
    make_base: MakeBase, make_adapter: MakeAdapter
) -> None:
    base = make_base()
    first = make_adapter(base, "first", modules_to_save=WHOLE)
    second = make_adapter(base, "second", rows=423, modules_to_save=WHOLE)
    with pytest.raises(ValueError, match="in the order of their training"):
        merge(base, second, first)


def test_merge_with_a_tokenizer_that_lacks_the_adapter_s_tokens_is_refused(
    make_base: MakeBase, make_adapter: MakeAdapter, tokenizer_dir: Path
) -> None:
    """As a LLaMA tokenizer beside the weights of an Alpaca adapter."""
    base = make_base()
    adapter = make_adapter(base, rows=423, modules_to_save=WHOLE)
    shutil.copytree(tokenizer_dir, adapter, dirs_exist_ok=True)
    with pytest.raises(ValueError, match="has 400 ids, none of them new"):
        merge(base, adapter)


@pytest.mark.parametrize(("is_updated", "said"), [(True, "is off by"), (False, "was not written")])
def test_merge_that_is_interrupted_or_wrong_leaves_nothing(
    make_base: MakeBase,
    make_adapter: MakeAdapter,
    monkeypatch: pytest.MonkeyPatch,
    said: str,
    *,
    is_updated: bool,
) -> None:
    base = make_base()
    adapter = make_adapter(base)
    merge_rows = MergePlan.merge_rows

    def wrong(plan: MergePlan, name: str, rows: slice, source: torch.Tensor) -> torch.Tensor:
        is_wrong = bool(plan.recipes[name].updates) == is_updated
        return merge_rows(plan, name, rows, source) + (1e-3 if is_wrong else 0)

    monkeypatch.setattr(MergePlan, "merge_rows", wrong)
    with pytest.raises(AssertionError, match=said):
        merge(base, adapter)
    assert not base.with_name("merged").exists()
    base.with_name("merged").mkdir()
    (base.with_name("merged") / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="exists and is not empty"):
        merge(base, adapter)
    shutil.rmtree(base.with_name("merged"))


def test_merge_job_prints_where_the_result_is_and_refuses_a_second_run(
    make_base: MakeBase, make_adapter: MakeAdapter
) -> None:
    base = make_base()
    adapter = make_adapter(base)
    arguments = [f"base={base}", f"adapters=[{adapter}]", f"target={base.with_name('merged')}"]
    command = [sys.executable, "jobs/merge.py", *arguments]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (first.returncode, first.stdout) == (0, f"merged model: {base.with_name('merged')}\n")
    # Every verb exits so after such an error: tests/test_run_job.py.
    with pytest.raises(ValueError, match="exists and is not empty"):
        merge(base, adapter)
