"""A LLaMA and an adapter of random weights for the merge's benchmark, written without a model."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from raytune_llama.model.tensors import TensorSpec, WeightsWriter

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 8
SEED = 3


@dataclass(frozen=True, kw_only=True)
class MergeModelSize:
    """Sizes of the model; as they are, those of a LLaMA of 1.1 billion parameters."""

    vocabulary: int = 32_000
    hidden: int = 2048
    intermediate: int = 5632
    layers: int = 22
    heads: int = 32
    kv_heads: int = 4
    shard_mib: int = 1024

    def config(self) -> LlamaConfig:
        """Return transformers' settings."""
        return LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            dtype="bfloat16",
        )


TINY = MergeModelSize(vocabulary=500, hidden=64, intermediate=160, layers=2, heads=4, shard_mib=1)


def write_base(folder: Path, shape: MergeModelSize) -> int:
    """Write a model directory of random bfloat16 weights; return its number of parameters."""
    config = shape.config()
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(config)
    specs = {
        name: TensorSpec(torch.bfloat16, tuple(tensor.shape))
        for name, tensor in skeleton.state_dict().items()
    }
    generator = torch.Generator().manual_seed(SEED)
    folder.mkdir()
    with WeightsWriter(folder, specs, max_shard_bytes=shape.shard_mib << 20) as writer:
        for name, spec in specs.items():
            values = torch.randn(spec.shape, generator=generator) * 0.02
            writer.write(name, (values + (len(spec.shape) == 1)).bfloat16())
    config.save_pretrained(folder)
    return sum(tensor.numel() for tensor in skeleton.state_dict().values())


def write_adapter(folder: Path, shape: MergeModelSize) -> None:
    """Write an adapter of random float32 factors for the seven projections of each layer."""
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(shape.config())
    generator = torch.Generator().manual_seed(SEED + 1)

    def factors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, module in skeleton.named_modules():
            if isinstance(module, torch.nn.Linear) and name.endswith(TARGETS):
                for part, size in (
                    ("A", (RANK, module.in_features)),
                    ("B", (module.out_features, RANK)),
                ):
                    values = torch.randn(size, generator=generator) * 0.02
                    yield f"base_model.model.{name}.lora_{part}.weight", values

    folder.mkdir()
    save_file(dict(factors()), folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(TARGETS),
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
