"""Settings of the model: its weights, positions, adapter and embedding tables."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from raytune_llama.config.settings import PLACEMENT, ConfigError, settings

Precision = Literal["fp32", "bf16", "fp16"]


Quantization = Literal["int8", "nf4"]


InitialRows = Literal["mean_subtokens", "mean", "normal"]
"""Initialization of new tokens' rows: the mean of the old tokens that their text splits into, the
mean of all old tokens, or draws from a normal distribution around 0, as in older transformers."""


_OWN_FIELDS = {
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_fast", "beta_slow"),
}


@settings
class RopeScaling:
    """RoPE scaling for a longer context than the model was trained with."""

    type: Literal["linear", "dynamic", "yarn", "llama3"]
    """`linear`: positions are divided by the factor (arXiv:2306.15595). `yarn`: arXiv:2309.00071.
    `llama3`: as in LLaMA 3.1. `dynamic`: NTK scaling only beyond the model's own context, by how
    far a text exceeds it; training, whose sequences must fit that context, does not change."""

    factor: Annotated[float, Field(gt=1)]
    """Scaled context as a multiple of the model's own, its `max_position_embeddings`."""

    low_freq_factor: Annotated[float, Field(gt=0)] | None = None
    """llama3 only: wavelengths above own context / this value are fully scaled; null: 1."""

    high_freq_factor: Annotated[float, Field(gt=0)] | None = None
    """llama3 only: wavelengths below own context / this value are not scaled; null: 4."""

    beta_fast: Annotated[float, Field(gt=0)] | None = None
    """yarn only: dimensions with more rotations per own context are not scaled; null: 32."""

    beta_slow: Annotated[float, Field(gt=0)] | None = None
    """yarn only: dimensions with fewer rotations per own context are fully scaled; null: 1."""

    @model_validator(mode="after")
    def _check(self) -> "RopeScaling":
        problems = [
            f"{field}: applies only to type {kind}, got {self.type}; set it to null"
            for kind, fields in _OWN_FIELDS.items()
            for field in fields
            if kind != self.type and getattr(self, field) is not None
        ]
        if problems:
            raise ConfigError(problems)
        return self


@settings
class ModelConfig:
    """The base model and its tokenizer.

    The paths may change when a run is resumed: their contents are compared by hash.
    """

    path: Annotated[str, Field(min_length=1), PLACEMENT]
    """Directory of a Hugging Face causal LM with safetensors weights: local, `s3://...` or
    `gs://...`, or a model on the hub, `hf://org/name[@revision]`. The latter are fetched once to
    each node; a resumed run keeps the commit that its revision was at its start."""

    tokenizer: Annotated[str | None, PLACEMENT] = None
    """Directory of the tokenizer, where `path` may be; null: the one in `path`. It may have more
    tokens than that one if the old ones keep their ids: the embeddings then grow."""

    attention: Annotated[Literal["auto", "sdpa", "flash_attention_2"], PLACEMENT] = "auto"
    """Attention kernel. auto: FlashAttention 2 if installed, on CUDA in half precision; otherwise
    PyTorch's SDPA, or the model's own code if it does not support SDPA."""

    quantization: Quantization | None = None
    """Storage of the base's frozen linear layers under an adapter. `int8`: 1 byte per weight, one
    scale per row; `nf4`: half a byte, double quantization (arXiv:2305.14314); null: in
    `engine.precision`, which is the compute precision in any case. Requires the extra
    `quantized`, `train: lora` and `engine.strategy: ddp`; the adapter fits the unquantized base."""

    allow_untrained_rows: bool = False
    """Continue even if new embedding rows would keep their initial values."""

    rope_scaling: RopeScaling | None = None
    """RoPE scaling for a longer context than the model's own; null: the model's own settings."""

    @property
    def tokenizer_path(self) -> str:
        """Directory of the tokenizer in use."""
        return self.tokenizer or self.path


@settings
class EmbeddingsConfig:
    """The embedding tables that `train: embeddings` trains; everything else is frozen."""

    lm_head: bool = False
    """Also train the output projection. A tied model has one table for both, which is always
    trained."""

    new_rows_only: bool = False
    """Train only the rows of ids that the model's own tokenizer lacks; the others stay
    bit-identical. False: train the full tables, as in Chinese-LLaMA's stage 1."""


LLAMA_PROJECTIONS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)


@settings
class LoraConfig:
    """A new low-rank adapter (arXiv:2106.09685)."""

    rank: Annotated[int, Field(ge=1)] = 8
    """Rank r of the update B A of each adapted weight."""

    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Numerator of the update's scale, alpha / r (alpha / sqrt(r) with `rslora`)."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Dropout probability on the input of A while training."""

    targets: Annotated[tuple[str, ...], Field(min_length=1)] = LLAMA_PROJECTIONS
    """Name suffixes of the linear layers to adapt; each must match at least one layer."""

    modules_to_save: tuple[str, ...] = ()
    """Name suffixes of modules to train fully and save with the adapter, such as embed_tokens and
    lm_head. For a tied pair one name is enough, and the table stays tied."""

    rslora: bool = False
    """Scale by alpha / sqrt(r) (arXiv:2312.03732)."""

    dora: bool = False
    """Train each adapted column's magnitude separately from its direction (arXiv:2402.09353)."""

    init: Literal["default", "pissa"] = "default"
    """Initialization of A and B. `default`: A random, B zero. `pissa`: the principal singular
    triplets of the weight, whose residual is frozen (arXiv:2404.02948); the result is a plain LoRA
    adapter of twice the rank on the original base."""

    @model_validator(mode="after")
    def _check(self) -> "LoraConfig":
        if self.init == "default":
            return self
        problems: list[str] = []
        if self.dropout:
            problems.append(
                f"dropout: got {self.dropout}, but with init=pissa it would drop the principal "
                "part of the weights; set it to 0"
            )
        if self.dora:
            problems.append(
                "dora: got true, but init=pissa trains on a residual, whose magnitudes are not "
                "those of the base's weights; set it to false, or use init=default"
            )
        if problems:
            raise ConfigError(problems)
        return self
