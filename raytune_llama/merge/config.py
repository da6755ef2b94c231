"""Settings of a merge: base, adapters and output."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from raytune_llama.config.settings import ConfigError, settings

GgufType = Literal["f16", "q8_0", "f32"]


_SHARD_MIB = 5120


@settings
class MergeConfig:
    """A base, the adapters to merge into it, and the output."""

    base: str
    """Hugging Face model directory that the first adapter was trained on: local, `s3://...` or
    `gs://...`, or a model on the hub, `hf://org/name[@revision]`."""
    adapters: Annotated[tuple[str, ...], Field(min_length=1)]
    """Adapter directories, in the order in which they were trained; where `base` may be."""
    target: str
    """Directory to create, local or `s3://...` or `gs://...`; it must not exist, or must be
    empty. In a bucket it is complete once it has a `manifest.json`, which is uploaded last."""
    output_format: Literal["huggingface", "pth", "gguf"] = "huggingface"
    """Output: a Hugging Face model directory, Meta's .pth shards, or a GGUF file for llama.cpp."""
    dtype: Literal["base", "float32", "bfloat16", "float16"] = "base"
    """Type of the weights of huggingface and pth; `base`: that of each weight in the base."""
    gguf_type: GgufType | None = None
    """Type of the matrices of gguf: f16, q8_0 (8 bits, one scale per 32 values) or f32; null: f16.
    Norms are always float32."""
    max_shard_mib: Annotated[int, Field(ge=1)] = _SHARD_MIB
    """Maximum size of a safetensors file of huggingface, unless one tensor is larger."""
    num_shards: Annotated[int, Field(ge=1, le=64)] | None = None
    """Number of pth files; null: as Meta published for models of this width, 1 for others."""
    num_workers: Annotated[int, Field(ge=1)] = 1
    """Safetensors files of huggingface that are written concurrently, each by a Ray task with one
    CPU, on nodes that all see base, adapters and target; 1: in this process, without Ray."""
    verify: Literal["tensors", "logits"] = "tensors"
    """Checks before the result appears: each weight against an independent computation, and with
    `logits` also the logits of huggingface against those of base and adapters under PEFT."""
    verify_text: str | None = None
    """Text file whose beginning is used for `verify: logits`; null: built-in sentences."""

    @model_validator(mode="after")
    def _check(self) -> "MergeConfig":
        wanted = {
            "gguf_type": ("gguf", self.gguf_type is not None),
            "max_shard_mib": ("huggingface", self.max_shard_mib != _SHARD_MIB),
            "num_shards": ("pth", self.num_shards is not None),
            "num_workers": ("huggingface", self.num_workers > 1),
        }
        problems = [
            f"{name}: is only for output_format {form}, got {self.output_format}; remove it"
            for name, (form, is_set) in wanted.items()
            if is_set and self.output_format != form
        ]
        if self.output_format == "gguf" and self.dtype != "base":
            problems.append(f"dtype: got {self.dtype}, but gguf uses gguf_type; remove dtype")
        if self.verify == "logits" and self.output_format != "huggingface":
            problems.append(
                f"verify: logits are computed by transformers, which cannot read "
                f"{self.output_format}; verify a merge to huggingface: the weights are the same"
            )
        if self.num_workers > 1 and "://" in self.target:
            problems.append(
                f"num_workers: got {self.num_workers}, but a result for a bucket is written on "
                "this machine's disk first, which other nodes do not see; set it to 1, or merge to "
                "a folder that all nodes mount"
            )
        if self.verify_text is not None and self.verify != "logits":
            problems.append("verify_text: is only for verify=logits; set that, or remove it")
        if problems:
            raise ConfigError(problems)
        return self
