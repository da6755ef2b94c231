"""Promise: training on, merging and serving read an adapter alike: as PEFT does, or not at all.

PEFT is the oracle: the logits of every kind that is accepted are those of PEFT's own model, merged,
served, and trained on; every other kind is refused everywhere with the same reason.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, device

from raytune_llama.merge.config import MergeConfig
from raytune_llama.merge.merger import merge_adapters
from raytune_llama.model.adapter import Adapter
from raytune_llama.model.llama import SummedLoss, build_empty_model
from raytune_llama.model.lora import check_trainable, load_adapter
from raytune_llama.model.loss import IGNORE_INDEX
from raytune_llama.serve.adapters.loading import AdapterLoader
from raytune_llama.serve.config import ServedModelConfig
from raytune_llama.serve.engine.lora import LoraLayerWeights
from raytune_llama.serve.generation.model import load_served_model
from tests.merge.conftest import ALL, IDS, WHOLE, MakeAdapter, MakeBase, load

TOLERANCE = 1e-5
"""Largest difference of a logit from PEFT's, relative to the largest logit."""


def logits(model: Any) -> Tensor:  # noqa: ANN401
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def by_peft(base: Path, adapter: Path) -> Tensor:
    return logits(peft.PeftModel.from_pretrained(load(base), str(adapter)).eval())


def merged(base: Path, adapter: Path) -> Tensor:
    target = base.with_name("merged")
    config = MergeConfig(base=str(base), adapters=(str(adapter),), target=str(target))
    merge_adapters(config)
    return logits(load(target))


def served(base: Path, adapter: Path) -> Tensor:
    config = ServedModelConfig(path=str(base))
    served_base = load_served_model(config, device("cpu"))
    loaded = AdapterLoader(config, served_base).load(adapter, "adapter")
    if loaded.updates is None:
        return logits(loaded.served.model)
    model = load(base)
    for name, update in loaded.updates.items():
        add_update(model.get_submodule(name), update)
    return logits(model)


def add_update(layer: Any, update: LoraLayerWeights) -> None:  # noqa: ANN401
    """Add the low-rank update to what a linear layer returns, as the endpoint's layers do."""
    layer.register_forward_hook(
        lambda _, inputs, output: output + inputs[0] @ update.a_RI.T @ update.b_RO
    )


def trained_on(base: Path, adapter: Path) -> Tensor:
    opened = Adapter.open(adapter, field="adapter")
    problems = check_trainable(build_empty_model(base), opened)
    if problems:
        raise ValueError("\n".join(problems))
    attached = load_adapter(load(base), opened).eval()
    labels = torch.cat([IDS[:, 1:], torch.full((1, 1), IGNORE_INDEX)], dim=1)
    module = SummedLoss(attached)
    with torch.inference_mode():
        loss = module(IDS, torch.arange(IDS.shape[1])[None], labels)
        torch.testing.assert_close(loss, module.loss_from_logits(IDS, labels))
    return logits(attached)


WAYS: dict[str, Callable[[Path, Path], Tensor]] = {
    "merge": merged,
    "serve": served,
    "train": trained_on,
}

HEAD_ONLY = "the loss reads"
NOT_TRAINED = "would not save"
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "plain": ({}, {}, ""),
    "one layer": ({}, {"layers_to_transform": [1]}, ""),
    "regex": ({}, {"target_modules": r".*\.(q|v)_proj"}, ""),
    "excluded": ({}, {"exclude_modules": ["v_proj"]}, ""),
    "rslora": ({}, {"use_rslora": True}, ""),
    "ranks": ({}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}, ""),
    "dora": ({}, {"use_dora": True}, ""),
    "fan in": ({}, {"fan_in_fan_out": True}, ""),
    "gaussian": ({}, {"init_lora_weights": "gaussian"}, ""),
    "biases": ({"attention_bias": True}, {"bias": "all"}, ""),
    "lora biases": ({"attention_bias": True}, {"bias": "lora_only"}, ""),
    "tables": ({}, {"modules_to_save": WHOLE}, ""),
    "norms": ({}, {"modules_to_save": ["norm"]}, ""),
    "tied table": (
        {"tie_word_embeddings": True},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        "",
    ),
    "embedding": ({}, {"target_modules": [*ALL, "embed_tokens"]}, NOT_TRAINED),
    "head": ({}, {"target_modules": [*ALL, "lm_head"]}, HEAD_ONLY),
    "token rows": ({}, {"trainable_token_indices": [7, 3, 12]}, ""),
    "token rows of both": (
        {},
        {"trainable_token_indices": {"embed_tokens": [3, 9], "lm_head": [5]}},
        HEAD_ONLY,
    ),
    "token rows of a tied base": (
        {"tie_word_embeddings": True},
        {"trainable_token_indices": [3, 9]},
        HEAD_ONLY,
    ),
}
"""Fields of the base, fields of the adapter, and why a run cannot continue from it, if so."""


@pytest.fixture
def spoken_base(make_base: MakeBase, tokenizer_dir: Path) -> MakeBase:
    """Make a base that can be served: with a tokenizer."""

    def make(**fields: Any) -> Path:  # noqa: ANN401
        from raytune_llama.tokenizer.loader import load_tokenizer

        base = make_base(max_position_embeddings=64, **fields)
        load_tokenizer(tokenizer_dir).save_pretrained(base)
        return base

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_has_the_logits_of_peft_merged_served_and_trained_on(
    spoken_base: MakeBase, make_adapter: MakeAdapter, kind: str
) -> None:
    base_fields, fields, refusal = KINDS[kind]
    base = spoken_base(**base_fields)
    adapter = make_adapter(base, **fields)
    wanted = by_peft(base, adapter)
    assert (wanted - logits(load(base))).abs().max() > 0.1
    for way, read in WAYS.items():
        if way == "train" and refusal:
            with pytest.raises(ValueError, match=refusal):
                read(base, adapter)
            continue
        error = (read(base, adapter) - wanted).abs().max() / wanted.abs().max()
        assert float(error) < TOLERANCE, way


Spoil = Callable[[Path], None]


def set_field(**values: Any) -> Spoil:  # noqa: ANN401
    """Change fields of an adapter_config.json."""

    def spoil(adapter: Path) -> None:
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return spoil


def change(edit: Callable[[dict[str, Tensor]], object]) -> Spoil:
    """Change the tensors of an adapter."""

    def spoil(adapter: Path) -> None:
        file = adapter / "adapter_model.safetensors"
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file)

    return spoil


def remove_layer(tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if ".layers.1." in key]:
        del tensors[key]


def empty_one(tensors: dict[str, Tensor]) -> None:
    key = next(key for key in tensors if "lora_A" in key)
    tensors[key] = tensors[key][:0]


def spoil_number(tensors: dict[str, Tensor]) -> None:
    next(iter(tensors.values())).view(-1)[0] = torch.inf


def add_stranger(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight"] = torch.ones(4)


def add_unpromised(tensors: dict[str, Tensor]) -> None:
    for part, shape in (("A", (4, 32)), ("B", (410, 4))):
        tensors[f"base_model.model.lm_head.lora_{part}.weight"] = torch.ones(shape)


REFUSED: dict[str, tuple[dict[str, Any], Spoil, str]] = {
    "half of the layers": ({}, change(remove_layer), "lacks 14 of the 28 tensors"),
    "zero-sized": ({}, change(empty_one), "tensors are empty, such as .*ZeRO 3"),
    "not finite": ({}, change(spoil_number), "not finite"),
    "unknown tensor": ({}, change(add_stranger), "lora_C.weight is of no kind"),
    "unpromised tensor": ({}, change(add_unpromised), "does not promise, such as .*lm_head"),
    "pissa": ({}, set_field(init_lora_weights="pissa_niter_4"), "init_lora_weights is 'pissa_ni"),
    "lora_ga": ({}, set_field(init_lora_weights="lora_ga"), "init_lora_weights is 'lora_ga'"),
    "unknown field": ({}, set_field(hyper_rank=3), "hyper_rank is 3, a field that this release"),
    "lora_bias": ({}, set_field(lora_bias=True), "lora_bias is not supported"),
    "replicated": ({}, set_field(layer_replication=[[0, 1]]), "layer_replication is not supp"),
    "activated": ({}, set_field(alora_invocation_tokens=[1]), "alora_invocation_tokens is not"),
    "classifier": ({}, set_field(task_type="SEQ_CLS"), "task_type is SEQ_CLS"),
    "another method": ({}, set_field(peft_type="IA3"), "peft_type is IA3"),
    "no rank": ({}, set_field(r=0), "r is 0, wanted a rank"),
    "rank as text": ({}, set_field(rank_pattern={"q_proj": "2"}), "rank_pattern is"),
    "dora on the embedding": (
        {"target_modules": [*ALL, "embed_tokens"], "use_dora": True},
        lambda _: None,
        "use_dora of an embedding is not supported",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_adapter_that_cannot_be_used_is_refused_everywhere_with_the_same_reason(
    spoken_base: MakeBase, make_adapter: MakeAdapter, kind: str
) -> None:
    fields, spoil, reason = REFUSED[kind]
    base = spoken_base()
    adapter = make_adapter(base, **fields)
    spoil(adapter)
    for read in WAYS.values():
        with pytest.raises(ValueError, match=reason) as caught:
            read(base, adapter)
        is_base_the_cause = "half of the layers" in kind
        assert is_base_the_cause or "name the base" not in str(caught.value)
    assert not base.with_name("merged").exists()


@pytest.mark.parametrize("form", ["bin", "default keys", "both"])
def test_adapter_of_an_older_peft_is_read_alike(
    spoken_base: MakeBase, make_adapter: MakeAdapter, form: str
) -> None:
    base = spoken_base()
    adapter = make_adapter(base, modules_to_save=["lm_head"])
    wanted = by_peft(base, adapter)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    if form != "bin":
        tensors = {
            key.replace(".weight", ".default.weight") if ".lora_" in key else key: tensor
            for key, tensor in tensors.items()
        }
        save_file(tensors, file)
    if form != "default keys":
        torch.save(tensors, adapter / "adapter_model.bin")
        file.unlink()
    for way, read in WAYS.items():
        error = (read(base, adapter) - wanted).abs().max() / wanted.abs().max()
        assert float(error) < TOLERANCE, way


def test_adapter_on_a_base_with_quantized_weights_is_refused_by_that_name(
    spoken_base: MakeBase, make_adapter: MakeAdapter
) -> None:
    base = spoken_base()
    adapter = make_adapter(base)
    config = ServedModelConfig(path=str(base))
    loader = AdapterLoader(config, load_served_model(config, device("cpu")))
    file = base / "config.json"
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"quantization_config": quantization})
    )
    for use in (lambda: merged(base, adapter), lambda: loader.load(adapter, "adapter")):
        with pytest.raises(ValueError, match=r"are quantized \(bitsandbytes\); use the model"):
            use()


def test_adapter_that_is_given_as_a_base_is_named_an_adapter(
    spoken_base: MakeBase, make_adapter: MakeAdapter
) -> None:
    base = spoken_base()
    adapter = make_adapter(base)
    with pytest.raises(ValueError, match=r"base: .* is an adapter, not a model; name the base"):
        merged(adapter, adapter)
    with pytest.raises(ValueError, match=r"path: .* is an adapter, not a model; name the base"):
        load_served_model(ServedModelConfig(path=str(adapter)), device("cpu"))
