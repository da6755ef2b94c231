"""Promises: an adapter is PEFT's own, never incomplete, and a tied table stays one."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from raytune_llama.config.settings import ConfigError, from_dict
from raytune_llama.model.adapter import Adapter
from raytune_llama.model.config import LoraConfig
from raytune_llama.model.llama import SummedLoss, causal_lm
from raytune_llama.model.lora import (
    attach_adapter,
    check_adapter_targets,
    check_trainable,
    load_adapter,
    write_adapter,
)
from raytune_llama.model.vocab import is_tied
from tests.model.conftest import MakeModel, llama_config

IDS = torch.arange(5, 25)[None]
BOTH = ("embed_tokens", "lm_head")


def trained_of(model: PeftModel) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def disturb(model: PeftModel) -> None:
    """Move every trained weight, so that each of them shows in the logits."""
    generator = torch.Generator().manual_seed(1)
    for tensor in trained_of(model).values():
        tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.2)


@pytest.fixture
def write(make_llama: MakeModel, tmp_path: Path) -> Callable[..., tuple[PeftModel, Path]]:
    """Attach an adapter to a fresh model, disturb it and write it."""

    def build(*, tied: bool = False, **fields: Any) -> tuple[PeftModel, Path]:  # noqa: ANN401
        base = make_llama(tie_word_embeddings=tied)
        attached = attach_adapter(base, LoraConfig(**{"rank": 4, **fields}), seed=0)
        disturb(attached)
        attached.eval()
        path = tmp_path / "adapter"
        path.mkdir()
        write_adapter(attached, trained_of(attached), path)
        return attached, path

    return build


def test_check_adapter_targets_that_fit_finds_nothing(make_llama: MakeModel) -> None:
    for config in (
        LoraConfig(),
        LoraConfig(targets=("self_attn.q_proj",), modules_to_save=(*BOTH, "model.norm")),
    ):
        assert check_adapter_targets(make_llama(), config) == []


@pytest.mark.parametrize(
    ("fields", "field", "parts"),
    [
        ({"targets": ("q_proj", "qproj")}, "lora.targets", ["'qproj'", "down_proj, gate_proj"]),
        ({"targets": ("proj",)}, "lora.targets", ["'proj'"]),
        ({"targets": ("embed_tokens",)}, "lora.targets", ["'embed_tokens'"]),
        ({"targets": ("lm_head",)}, "lora.targets", ["lm_head", "lora.modules_to_save"]),
        ({"modules_to_save": ("head",)}, "lora.modules_to_save", ["'head'", "lm_head"]),
        ({"modules_to_save": ("",)}, "lora.modules_to_save", ["''"]),
        ({"modules_to_save": ("q_proj",)}, "lora.modules_to_save", ["q_proj"]),
        (
            {"modules_to_save": ("norm",)},
            "lora.modules_to_save",
            ["input_layernorm, post_attention_layernorm", "model.norm"],
        ),
    ],
)
def test_check_adapter_targets_that_do_not_fit_names_field_and_choices(
    make_llama: MakeModel, fields: dict[str, Any], field: str, parts: list[str]
) -> None:
    [problem] = check_adapter_targets(make_llama(), LoraConfig(**fields))
    assert problem.startswith(f"{field}: ")
    assert [part for part in parts if part not in problem] == []


def test_lora_config_without_targets_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(LoraConfig, {"targets": []})
    [problem] = caught.value.problems
    assert problem.startswith("targets: ")


def test_attach_adapter_depends_on_its_seed_alone(make_llama: MakeModel) -> None:
    found: list[dict[str, Tensor]] = []
    config = LoraConfig(modules_to_save=BOTH)
    for global_seed, seed in ((0, 7), (1, 7), (0, 8)):
        model = make_llama()
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        found.append(trained_of(attach_adapter(model, config, seed=seed)))
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    differing = {name for name in found[0] if not torch.equal(found[0][name], found[2][name])}
    assert differing == {name for name in found[0] if "lora_A" in name}
    assert config == LoraConfig(modules_to_save=BOTH)


def test_attach_adapter_leaves_the_logits_as_they_were(make_llama: MakeModel) -> None:
    model = make_llama()
    with torch.no_grad():
        before = model(IDS).logits
        after = attach_adapter(model, LoraConfig(modules_to_save=BOTH), seed=0).eval()(IDS).logits
    assert torch.equal(before, after)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6 / 4), (True, 6 / 2)])
def test_attach_adapter_adds_the_scaled_product_to_the_weight(
    make_llama: MakeModel, *, rslora: bool, scale: float
) -> None:
    config = LoraConfig(rank=4, alpha=6.0, rslora=rslora, targets=("q_proj",))
    attached = attach_adapter(make_llama(), config, seed=0).eval()
    disturb(attached)
    layer = "base_model.model.model.layers.1.self_attn.q_proj"
    weights = dict(attached.named_parameters())
    a, b = (weights[f"{layer}.lora_{name}.default.weight"] for name in "AB")
    whole = weights[f"{layer}.base_layer.weight"] + scale * b @ a
    x_BD = torch.randn(3, 16)
    torch.testing.assert_close(attached.get_submodule(layer)(x_BD), x_BD @ whole.T)


def test_attach_adapter_with_dora_trains_a_magnitude_for_each_layer(make_llama: MakeModel) -> None:
    attached = attach_adapter(make_llama(), LoraConfig(dora=True), seed=0)
    magnitudes = [name for name in trained_of(attached) if "magnitude" in name]
    assert len(magnitudes) == 14


def test_attach_adapter_drops_inputs_in_training_only(make_llama: MakeModel) -> None:
    attached = attach_adapter(make_llama(), LoraConfig(dropout=0.5), seed=0)
    disturb(attached)
    for training in (True, False):
        attached.train(training)
        assert torch.equal(attached(IDS).logits, attached(IDS).logits) != training


@pytest.mark.parametrize("saved", [("embed_tokens",), ("lm_head",), BOTH])
def test_attach_adapter_to_a_tied_base_trains_one_table(
    make_llama: MakeModel, saved: tuple[str, ...]
) -> None:
    model = make_llama(tie_word_embeddings=True)
    attached = attach_adapter(model, LoraConfig(modules_to_save=saved), seed=0)
    tables = [p for p in attached.parameters() if p.requires_grad and p.shape == (410, 16)]
    assert len(tables) == 1
    assert is_tied(model)
    SummedLoss(attached)(IDS, IDS - 5, IDS).backward()
    gradient = tables[0].grad
    assert gradient is not None
    # The output projection gives every row a gradient, the input embedding alone 20 of them.
    assert gradient.any(dim=1).all()
    with torch.no_grad():
        tables[0].zero_()
    assert not attached(IDS).logits.any()


@pytest.mark.parametrize(
    ("saved", "rows", "shape", "num_trained"),
    [
        # Counted by hand for SmolLM2-135M; published for Chinese-LLaMA-7B.
        (("embed_tokens",), 49152, (576, 1536, 30, 9, 3), 30_753_792),
        (BOTH, 49953, (4096, 11008, 32, 32, 32), 429_203_456),
    ],
)
def test_attach_adapter_to_a_known_model_trains_the_known_number_of_weights(
    saved: tuple[str, ...], rows: int, shape: tuple[int, ...], num_trained: int
) -> None:
    hidden, inner, layers, heads, kv_heads = shape
    config = llama_config(
        vocab_size=rows,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=len(saved) == 1,
    )
    with torch.device("meta"):
        attached = attach_adapter(
            LlamaForCausalLM(config), LoraConfig(modules_to_save=saved), seed=0
        )
    assert sum(tensor.numel() for tensor in trained_of(attached).values()) == num_trained


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attach_adapter_to_a_half_precision_base_can_be_trained(
    make_llama: MakeModel, dtype: torch.dtype
) -> None:
    model = make_llama()
    nn.Module.to(model, dtype)
    attached = attach_adapter(model, LoraConfig(modules_to_save=BOTH), seed=0)
    SummedLoss(attached)(IDS, IDS - 5, IDS).backward()
    missing = [n for n, p in attached.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rslora": True},
        {"dora": True},
        {"modules_to_save": ("embed_tokens",)},
        {"modules_to_save": ("lm_head",)},
        {"modules_to_save": BOTH},
    ],
)
def test_write_adapter_of_any_kind_is_loaded_by_peft_with_equal_logits(
    make_llama: MakeModel,
    write: Callable[..., tuple[PeftModel, Path]],
    *,
    tied: bool,
    fields: dict[str, Any],
) -> None:
    attached, path = write(tied=tied, **fields)
    base = make_llama(tie_word_embeddings=tied)
    with torch.no_grad():
        plain, wanted = base(IDS).logits, attached(IDS).logits
        loaded = PeftModel.from_pretrained(base, str(path)).eval()
        assert torch.equal(loaded(IDS).logits, wanted)
    assert not torch.allclose(plain, wanted, atol=0.1)
    assert is_tied(base) == tied
    # And it goes on where it was: the same trained weights by the same names.
    again = load_adapter(make_llama(tie_word_embeddings=tied), opened(path))
    mine, theirs = trained_of(attached), trained_of(again)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert is_tied(causal_lm(again)) == tied


def test_write_adapter_returns_the_norm_of_each_tensor_written(
    write: Callable[..., tuple[PeftModel, Path]], tmp_path: Path
) -> None:
    attached, path = write(tied=True, modules_to_save=BOTH)
    (tmp_path / "again").mkdir()
    norms = write_adapter(attached, trained_of(attached), tmp_path / "again")
    stored = load_file(path / "adapter_model.safetensors")
    assert norms == {key: float(tensor.norm()) for key, tensor in stored.items()}
    # Two for each of 7 x 2 adapted layers, and the table under both of its names.
    assert len(norms) == 30


def opened(path: Path) -> Adapter:
    return Adapter.open(path, field="adapter")


def nan(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, torch.nan)


def empty(tensor: Tensor) -> Tensor:
    return tensor[:0]


@pytest.mark.parametrize("spoil", [nan, empty, None])
def test_write_adapter_with_a_spoilt_or_missing_tensor_is_refused(
    make_llama: MakeModel, tmp_path: Path, spoil: Callable[[Tensor], Tensor] | None
) -> None:
    attached = attach_adapter(make_llama(), LoraConfig(), seed=0)
    trained = trained_of(attached)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight"
    spoilt = {name: spoil(trained[name])} if spoil else {}
    rest = {key: tensor for key, tensor in trained.items() if key != name}
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj\.lora_A"):
        write_adapter(attached, rest | spoilt, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_write_adapter_with_a_tensor_that_is_no_part_of_it_is_refused(
    make_llama: MakeModel, tmp_path: Path
) -> None:
    attached = attach_adapter(make_llama(), LoraConfig(), seed=0)
    foreign = {"base_model.model.model.norm.weight": torch.ones(16)}
    with pytest.raises(ValueError, match="incomplete"):
        write_adapter(attached, trained_of(attached) | foreign, tmp_path)


def test_load_adapter_trains_with_the_adapters_own_settings(
    make_llama: MakeModel, write: Callable[..., tuple[PeftModel, Path]]
) -> None:
    _, path = write(rank=3, alpha=7.5, targets=("q_proj",), rslora=True)
    settings: Any = load_adapter(make_llama(), opened(path)).peft_config["default"]
    assert (settings.r, settings.lora_alpha, settings.use_rslora) == (3, 7.5, True)
    assert settings.target_modules == {"q_proj"}


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_load_adapter_of_an_incomplete_directory_names_the_file(
    make_llama: MakeModel, write: Callable[..., tuple[PeftModel, Path]], missing: str
) -> None:
    _, path = write()
    assert check_trainable(make_llama(), opened(path)) == []
    (path / missing).unlink()
    with pytest.raises(ValueError, match=missing):
        opened(path)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"hidden_size": 32}, ["down_proj.lora_B", "(16, 4)", "(32, 4)", "name the base"]),
        ({"vocab_size": 400}, ["lm_head.weight", "(410, 16)", "(400, 16)", "name the base"]),
        ({"num_hidden_layers": 3}, ["layers.2.", "lacks 14 of the 42 tensors", "more layers"]),
    ],
)
def test_adapter_of_another_base_is_refused_with_both_shapes(
    make_llama: MakeModel,
    write: Callable[..., tuple[PeftModel, Path]],
    fields: dict[str, Any],
    parts: list[str],
) -> None:
    _, path = write(modules_to_save=("lm_head",) if "vocab_size" in fields else ())
    model = make_llama(**fields)
    modules = [name for name, _ in model.named_modules()]
    [problem] = check_trainable(model, opened(path))
    assert [part for part in [str(path), *parts] if part not in problem] == []
    assert [name for name, _ in model.named_modules()] == modules


def test_check_trainable_of_its_own_base_finds_nothing(
    make_llama: MakeModel, write: Callable[..., tuple[PeftModel, Path]]
) -> None:
    _, path = write(modules_to_save=BOTH, dora=True)
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(llama_config())
        smaller = LlamaForCausalLM(llama_config(vocab_size=390))
    assert check_trainable(skeleton, opened(path)) == []
    assert check_trainable(skeleton, opened(path), num_rows=400) == []
    # A base that the run will grow to the tokenizer.
    assert check_trainable(smaller, opened(path), num_rows=410) == []
    assert len(check_trainable(smaller, opened(path))) == 1


def test_check_trainable_of_an_adapter_that_unties_the_base_is_refused(
    make_llama: MakeModel, write: Callable[..., tuple[PeftModel, Path]]
) -> None:
    _, path = write(modules_to_save=BOTH)
    [problem] = check_trainable(make_llama(tie_word_embeddings=True), opened(path))
    assert "unties" in problem


def test_check_trainable_of_settings_that_cannot_be_attached_is_refused(
    make_llama: MakeModel,
    write: Callable[..., tuple[PeftModel, Path]],
) -> None:
    _, path = write(targets=("q_proj",))
    file = path / "adapter_config.json"
    change = {"target_modules": ["nothing"], "modules_to_save": None}
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    [problem] = check_trainable(make_llama(), opened(path))
    assert problem.startswith(f"adapter: {path} ")


def test_check_trainable_of_an_adapted_output_projection_is_refused(
    make_llama: MakeModel, write: Callable[..., tuple[PeftModel, Path]]
) -> None:
    _, path = write(targets=("q_proj", "lm_head"))
    assert len(check_trainable(make_llama(), opened(path))) == 1


def test_check_trainable_of_a_file_that_lacks_a_tensor_names_it(
    make_llama: MakeModel, write: Callable[..., tuple[PeftModel, Path]]
) -> None:
    _, path = write()
    file = path / "adapter_model.safetensors"
    stored = load_file(file)
    whole = copy.copy(stored)
    layer = "base_model.model.model.layers.1.mlp.up_proj"
    for factor in ("lora_A", "lora_B"):
        del stored[f"{layer}.{factor}.weight"]
    save_file(stored, file)
    [problem] = check_trainable(make_llama(), opened(path))
    assert "lacks 2 of the 28 tensors that its config promises" in problem
    assert layer in problem
    del stored["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"]
    save_file(stored, file)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj: A or B is missing"):
        opened(path)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
        opened(path)
    save_file(whole, file)
    assert check_trainable(make_llama(), opened(path)) == []
