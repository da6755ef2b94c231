"""A LLaMA-family causal language model: settings, loading, and the module that is trained."""

import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from peft import PeftModel
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, BloomModel, PreTrainedModel

from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import PLACEMENT, settings
from raytune_llama.model.bloom import run_bloom
from raytune_llama.model.embeddings import projection_weight
from raytune_llama.model.loss import IGNORE_INDEX, summed_cross_entropy
from raytune_llama.model.neftune import add_noise
from raytune_llama.model.quantization import Quantization
from raytune_llama.model.rope import RopeScaling, apply_rope_settings, build_rope_settings
from raytune_llama.model.tensors import SAFETENSORS, SAFETENSORS_INDEX, SafetensorsFile
from raytune_llama.model.vocab import grow_embeddings, has_tokenizer
from raytune_llama.tokenizer.loader import load_tokenizer

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

MODEL_WEIGHT_FILES = (SAFETENSORS, SAFETENSORS_INDEX)
"""A model directory has one of them; formats that need unpickling are not read."""


@settings
class ModelConfig:
    """The base model and the tokenizer that feeds it.

    The paths may change when a run is resumed: their content is compared, by hash.
    """

    path: Annotated[str, Field(min_length=1), PLACEMENT]
    """Directory of a Hugging Face causal LM with safetensors weights."""

    tokenizer: Annotated[str | None, PLACEMENT] = None
    """Directory of the tokenizer; null: the one in `path`. It may have more tokens than `path`
    was trained with if the old ones keep their ids: the embeddings then grow."""

    attention: Annotated[Literal["auto", "sdpa", "flash_attention_2"], PLACEMENT] = "auto"
    """Attention kernel; auto: FlashAttention 2 where it is installed, on CUDA in half precision,
    and PyTorch's SDPA elsewhere, or a model's own code where it has no other."""

    quantization: Quantization | None = None
    """How the base's linear layers are held, frozen, below an adapter: `int8`, a byte a weight with
    a scale a row; `nf4`, half a byte, the scales quantised too (arXiv:2305.14314); null: in
    `protocol.precision`. Computing is in `protocol.precision` in any case. Needs the extra
    `quantized`, `train: lora` and `engine.strategy: ddp`; the result fits the base as it is."""

    allow_untrained_rows: bool = False
    """Go on although new rows of the embeddings would stay as they were initialised."""

    rope_scaling: RopeScaling | None = None
    """Rotary positions for a longer context than the model's own; null: as the model has them."""

    @property
    def tokenizer_path(self) -> str:
        """Directory of the tokenizer in use."""
        return self.tokenizer or self.path


def check_model_settings(path: Path) -> list[str]:
    """Return what `path` lacks to be a model without weights; empty where it is one."""
    if not path.is_dir():
        return [f"model.path: {path} is not a directory; name a Hugging Face model directory"]
    if not (path / "config.json").is_file():
        return [f"model.path: {path} has no config.json; name a Hugging Face model directory"]
    return []


def has_weights(path: Path) -> bool:
    """Whether a model directory holds weights, complete or not."""
    return any((path / name).is_file() for name in MODEL_WEIGHT_FILES)


def check_model_directory(path: Path) -> list[str]:
    """Return what `path` lacks to be loaded as a model; empty where it is complete."""
    problems = check_model_settings(path)
    if not path.is_dir():
        return problems
    single, index = (path / name for name in MODEL_WEIGHT_FILES)
    if single.is_file():
        return problems + _check_weight_files([single])
    if not index.is_file():
        problems.append(
            f"model.path: {path} has no weights, neither {' nor '.join(MODEL_WEIGHT_FILES)}; "
            "convert or download them as safetensors"
        )
        return problems
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [*problems, f"model.path: {index} is no index of weights ({error}); fetch it again"]
    problems += [
        f"model.path: {path} lacks the weight shard {shard} that its index names"
        for shard in shards
        if not (path / shard).is_file()
    ]
    return problems + _check_weight_files(
        [path / shard for shard in shards if (path / shard).is_file()]
    )


def _check_weight_files(files: list[Path]) -> list[str]:
    """Return which files are not whole safetensors; only their headers are read."""
    problems: list[str] = []
    for file in files:
        try:
            SafetensorsFile(file)
        except ValueError as error:
            problems.append(f"model.path: {error}")
    return problems


def build_empty_model(path: Path, *, num_rows: int | None = None) -> PreTrainedModel:
    """Build the model of a directory without its weights: shapes and names, no memory.

    Args:
        path: a model directory; only its config.json is read.
        num_rows: rows of the embeddings; None: as many as the model has.
    """
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    if num_rows is not None:
        config.vocab_size = num_rows
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def choose_attention(wanted: str, precision: Precision, device: torch.device) -> str:
    """Resolve `ModelConfig.attention` to the kernel that this worker uses.

    Raises:
        ValueError: FlashAttention was asked for by name and cannot run here.
    """
    installed = find_spec("flash_attn") is not None
    fits = device.type == "cuda" and precision != "fp32"
    if wanted == "flash_attention_2" and not (installed and fits):
        reason = "flash_attn is not installed" if not installed else f"{device.type} in {precision}"
        raise UserError(
            f"model.attention: flash_attention_2 cannot run here ({reason}); use auto or sdpa"
        )
    return "flash_attention_2" if wanted != "sdpa" and installed and fits else "sdpa"


def model_settings(config: ModelConfig) -> dict[str, Any]:
    """Return what a run's model has otherwise than the config.json of its base says."""
    own = AutoConfig.from_pretrained(config.path, local_files_only=True)
    return build_rope_settings(own, config.rope_scaling)


def load_model(
    config: ModelConfig,
    precision: Precision,
    device: torch.device,
    *,
    modules_to_save: Sequence[str] = (),
) -> PreTrainedModel:
    """Load the base on the CPU, its embeddings grown to the tokenizer, caching off.

    Quantised layers are on the run's device at once, without `modules_to_save`. Other weights that
    are stored in the wanted precision stay mapped from their file, so that the workers of a node
    share one copy until the engine moves or partitions them; the rest is converted, one copy a
    worker.
    """
    attention = choose_attention(config.attention, precision, device)
    changed = AutoConfig.from_pretrained(config.path, local_files_only=True)
    apply_rope_settings(changed, model_settings(config))
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        config.path,
        config=changed,
        dtype=DTYPES[precision],
        # Without a name: SDPA, but a model's own code where it has no other (Bloom).
        attn_implementation=None
        if (config.attention, attention) == ("auto", "sdpa")
        else attention,
        local_files_only=True,
        use_safetensors=True,
    )
    logger.info("attention: %s", model.config._attn_implementation)
    model.config.use_cache = False
    if config.tokenizer is not None and has_tokenizer(Path(config.path)):
        old, new = load_tokenizer(Path(config.path)), load_tokenizer(Path(config.tokenizer))
        grow_embeddings(model, old, new)
    if config.quantization is not None:
        from raytune_llama.model.quantized_layers import quantize_base

        quantize_base(model, config.quantization, modules_to_save, device)
    return model


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """Return the causal LM inside an adapter wrapper, or the model itself."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, PreTrainedModel)
    return inner


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers that a causal LM repeats; empty where its decoder keeps them in no list."""
    decoder = causal_lm(model).get_decoder()
    lists = [each for each in decoder.children() if isinstance(each, nn.ModuleList)]
    return [layer for each in lists for layer in each]


class SummedLoss(nn.Module):
    """The module that an engine trains: token ids in, the sum of the targets' losses out.

    The logits of a batch are never held together; see `model.loss`.
    """

    def __init__(self, model: nn.Module, *, neftune_alpha: float | None = None) -> None:
        """Wrap a causal LM, or an adapter around one.

        Args:
            model: what is trained.
            neftune_alpha: noise on the input embeddings while training; None: none.
        """
        super().__init__()
        self.model = model
        self._neftune_alpha = neftune_alpha
        accepted = _arguments(causal_lm(model))
        # Where a forward pass takes any keyword, the proofs of a run show if it heeds this one.
        self._passes_positions = "position_ids" in accepted or any(
            each.kind is inspect.Parameter.VAR_KEYWORD for each in accepted.values()
        )

    def forward(self, ids_BT: Tensor, positions_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """Return the summed loss in nats of the labels that are not IGNORE.

        Args:
            ids_BT: token ids.
            positions_BT: position of each token in its document. No attention mask is given, so
                that the model keeps documents apart wherever positions start again.
            labels_BT: the id that follows each token, or IGNORE.
        """
        lm = causal_lm(self.model)
        hidden_BTD = self._hidden(lm, ids_BT, positions_BT)
        weight_VD = projection_weight(lm)
        return summed_cross_entropy(hidden_BTD.flatten(0, 1), weight_VD, labels_BT.flatten())

    def loss_from_logits(self, ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """Return the same loss from the model's own logits, all held together: to check by."""
        lm = causal_lm(self.model)
        # One document a row: its positions are those that a model counts by itself.
        logits_BTV = lm(input_ids=ids_BT, use_cache=False).logits
        return cross_entropy(
            logits_BTV.flatten(0, 1).float(),
            labels_BT.flatten(),
            ignore_index=IGNORE_INDEX,
            reduction="sum",
        )

    def _hidden(self, lm: PreTrainedModel, ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """Return the last hidden states, (B, T, D)."""
        decoder = lm.get_decoder()
        options: dict[str, Any] = {"use_cache": False}
        if self._passes_positions:
            options["position_ids"] = positions_BT
        alpha = self._neftune_alpha if self.training else None
        if alpha is None and not isinstance(decoder, BloomModel):
            return decoder(input_ids=ids_BT, **options).last_hidden_state
        embedded_BTD = lm.get_input_embeddings()(ids_BT)
        if alpha is not None:
            embedded_BTD = add_noise(embedded_BTD, positions_BT, alpha)
        if isinstance(decoder, BloomModel):
            return run_bloom(decoder, embedded_BTD, positions_BT)
        return decoder(inputs_embeds=embedded_BTD, **options).last_hidden_state


def _arguments(lm: PreTrainedModel) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(lm.get_decoder().forward).parameters


def check_document_isolation(model: PreTrainedModel) -> list[str]:
    """Return why documents in one sequence cannot be kept apart; empty where they may be.

    A run proves it on its own model before the first step; this is what can be known without.
    """
    if "position_ids" in _arguments(model) or isinstance(model.get_decoder(), BloomModel):
        return []
    return [
        f"batch.isolate_documents: a {type(model).__name__} takes no position ids, by which "
        "documents in one sequence are kept apart; set it to false with packing=packed, so that "
        "they see each other"
    ]


def last_hidden_state_module(lm: PreTrainedModel) -> nn.Module:
    """Return the module of a causal LM whose output `SummedLoss` has for the last hidden state."""
    decoder = lm.get_decoder()
    return decoder.ln_f if isinstance(decoder, BloomModel) else decoder


def check_output_projection(model: PreTrainedModel) -> list[str]:
    """Return why the chunked loss cannot stand for this model's own; empty where it can."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        return [
            f"model.path: the output projection of {type(model).__name__} is not a linear layer "
            "without bias, which the training loss needs"
        ]
    return []
