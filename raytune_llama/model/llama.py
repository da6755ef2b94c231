"""A LLaMA-family causal language model: settings, loading, and the module to train."""

import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, BloomModel, PreTrainedModel

from raytune_llama.config.errors import UserError
from raytune_llama.model.adapter_config import ADAPTER_CONFIG_FILE
from raytune_llama.model.bloom import run_bloom
from raytune_llama.model.config import ModelConfig, Precision
from raytune_llama.model.embeddings import projection_weight
from raytune_llama.model.loss import IGNORE_INDEX, summed_cross_entropy
from raytune_llama.model.rope import apply_rope_settings, build_rope_settings
from raytune_llama.model.tensors import SAFETENSORS, SAFETENSORS_INDEX, SafetensorsFile
from raytune_llama.model.vocab import grow_embeddings, has_tokenizer
from raytune_llama.storage.directories import fetched, published_name
from raytune_llama.storage.files import read_json
from raytune_llama.tokenizer.loader import load_tokenizer

logger = logging.getLogger(__name__)

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

MODEL_WEIGHT_FILES = (SAFETENSORS, SAFETENSORS_INDEX)
"""Weight files, of which a model directory has one; formats that need unpickling are not read."""


def check_model_settings(path: Path) -> list[str]:
    """Return what `path` lacks to be a model directory, weights aside; empty if nothing."""
    if not path.is_dir():
        return [f"model.path: {path} is not a directory; name a Hugging Face model directory"]
    if not (path / "config.json").is_file():
        if (path / ADAPTER_CONFIG_FILE).is_file():
            return [
                f"model.path: {path} is an adapter, not a model; name the base that it was trained "
                "on, or merge it into that base first"
            ]
        return [f"model.path: {path} has no config.json; name a Hugging Face model directory"]
    return []


def check_not_quantized(path: Path, field: str) -> list[str]:
    """Return why a base whose stored weights are quantized cannot be trained on or merged into.

    Args:
        path: directory of the base.
        field: config field that names it, for errors.
    """
    settings = read_json(path / "config.json").get("quantization_config")
    if not settings:
        return []
    method = settings.get("quant_method", "an unknown method")
    return [
        f"{field}: the weights of {path} are quantized ({method}); use the model that they were "
        "quantized from, which has the precision that an adapter is added to"
    ]


def has_weights(path: Path) -> bool:
    """Whether a model directory holds weights, complete or not."""
    return any((path / name).is_file() for name in MODEL_WEIGHT_FILES)


def check_model_directory(path: Path) -> list[str]:
    """Return why `path` cannot be loaded as a model; empty if it can."""
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
        return [*problems, f"model.path: {index} is not a valid index ({error}); fetch it again"]
    problems += [
        f"model.path: {path} lacks the weight shard {shard} that its index lists"
        for shard in shards
        if not (path / shard).is_file()
    ]
    return problems + _check_weight_files(
        [path / shard for shard in shards if (path / shard).is_file()]
    )


def _check_weight_files(files: list[Path]) -> list[str]:
    """Return which files are not complete safetensors; only their headers are read."""
    problems: list[str] = []
    for file in files:
        try:
            SafetensorsFile(file)
        except ValueError as error:
            problems.append(f"model.path: {error}")
    return problems


def build_empty_model(path: Path, *, num_rows: int | None = None) -> PreTrainedModel:
    """Build a directory's model on the meta device: shapes and names, no memory.

    Args:
        path: a model directory; only its config.json is read.
        num_rows: rows of the embeddings; None: the number in its config.json.
    """
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    if num_rows is not None:
        config.vocab_size = num_rows
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def choose_attention(wanted: str, precision: Precision, device: torch.device) -> str:
    """Resolve `ModelConfig.attention` to the attention kernel of this worker.

    Raises:
        ValueError: FlashAttention was requested explicitly and cannot run here.
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
    """Return the config.json fields in which a run's model differs from its base."""
    own = AutoConfig.from_pretrained(fetched(config.path), local_files_only=True)
    return build_rope_settings(own, config.rope_scaling)


def load_model(
    config: ModelConfig,
    precision: Precision,
    device: torch.device,
    *,
    modules_to_save: Sequence[str] = (),
) -> PreTrainedModel:
    """Load the base on the CPU, its embeddings grown to the tokenizer, with the KV cache off.

    Quantized layers go to the run's device at once, except `modules_to_save`. Other weights that
    are stored in the wanted precision stay memory-mapped, so that the workers of a node share one
    copy until the engine moves or partitions them; the rest is converted, one copy per worker.
    """
    attention, path = choose_attention(config.attention, precision, device), fetched(config.path)
    changed = AutoConfig.from_pretrained(path, local_files_only=True)
    apply_rope_settings(changed, model_settings(config))
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path,
        config=changed,
        dtype=DTYPES[precision],
        # None selects SDPA, or the model's own code if it does not support SDPA (Bloom).
        attn_implementation=None
        if (config.attention, attention) == ("auto", "sdpa")
        else attention,
        local_files_only=True,
        use_safetensors=True,
    )
    logger.info("attention: %s", model.config._attn_implementation)
    model.config.use_cache = False
    if str(path) != config.path:
        # What an adapter's settings name as its base: not this node's copy.
        model.name_or_path = published_name(config.path)
    if config.tokenizer is not None and has_tokenizer(path):
        old, new = load_tokenizer(path), load_tokenizer(fetched(config.tokenizer))
        grow_embeddings(model, old, new)
    if config.quantization is not None:
        from raytune_llama.model.quantized_layers import quantize_base

        quantize_base(model, config.quantization, modules_to_save, device)
    return model


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """Return the causal LM inside an adapter wrapper, or the model itself."""
    # PEFT's, which takes seconds to import and is not needed without an adapter.
    get_base_model = getattr(model, "get_base_model", None)
    inner = model if get_base_model is None else get_base_model()
    assert isinstance(inner, PreTrainedModel)
    return inner


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the repeated layers of a causal LM; empty if its decoder has no ModuleList."""
    decoder = causal_lm(model).get_decoder()
    lists = [each for each in decoder.children() if isinstance(each, nn.ModuleList)]
    return [layer for each in lists for layer in each]


class SummedLoss(nn.Module):
    """The module that an engine trains: takes token ids, returns the loss summed over the targets.

    The logits of a full batch are never materialized; see `model.loss`.
    """

    def __init__(self, model: nn.Module, *, neftune_alpha: float | None = None) -> None:
        """Wrap a causal LM, or an adapter around one.

        Args:
            model: the module to train.
            neftune_alpha: scale of the noise on the input embeddings in training; None: no noise.
        """
        super().__init__()
        self.model = model
        self._neftune_alpha = neftune_alpha
        accepted = _arguments(causal_lm(model))
        # If the forward pass takes **kwargs, the run's self-tests show whether it uses this one.
        self._passes_positions = "position_ids" in accepted or any(
            each.kind is inspect.Parameter.VAR_KEYWORD for each in accepted.values()
        )

    def forward(
        self, ids_BT: Tensor, positions_BT: Tensor, labels_BT: Tensor, *, by_row: bool = False
    ) -> Tensor:
        """Return the summed loss in nats of the labels that are not IGNORE.

        Args:
            ids_BT: token ids.
            positions_BT: position of each token in its document. No attention mask is passed,
                so the model isolates documents wherever positions restart.
            labels_BT: the id that follows each token, or IGNORE.
            by_row: return one sum per row, (B), instead of one over all rows.
        """
        lm = causal_lm(self.model)
        hidden_BTD = self._hidden(lm, ids_BT, positions_BT)
        weight_VD = projection_weight(lm)
        if by_row:
            rows = zip(hidden_BTD, labels_BT, strict=True)
            return torch.stack([summed_cross_entropy(row, weight_VD, own) for row, own in rows])
        return summed_cross_entropy(hidden_BTD.flatten(0, 1), weight_VD, labels_BT.flatten())

    def loss_from_logits(self, ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """Return the same loss from the model's own full logits, as a reference for checks."""
        lm = causal_lm(self.model)
        # One document per row: the model's default positions are correct.
        logits_BTV = lm(input_ids=ids_BT, use_cache=False).logits
        return cross_entropy(
            logits_BTV.flatten(0, 1).float(),
            labels_BT.flatten(),
            ignore_index=IGNORE_INDEX,
            reduction="sum",
        )

    def embed(self, ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """Return the input embeddings, (B, T, D), in training with NEFTune's noise."""
        embedded_BTD = causal_lm(self.model).get_input_embeddings()(ids_BT)
        if self._neftune_alpha is None or not self.training:
            return embedded_BTD
        return add_noise(embedded_BTD, positions_BT, self._neftune_alpha)

    def _hidden(self, lm: PreTrainedModel, ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """Return the last hidden states, (B, T, D)."""
        decoder = lm.get_decoder()
        options: dict[str, Any] = {"use_cache": False}
        if self._passes_positions:
            options["position_ids"] = positions_BT
        is_noisy = self.training and self._neftune_alpha is not None
        if not is_noisy and not isinstance(decoder, BloomModel):
            return decoder(input_ids=ids_BT, **options).last_hidden_state
        embedded_BTD = self.embed(ids_BT, positions_BT)
        if isinstance(decoder, BloomModel):
            return run_bloom(decoder, embedded_BTD, positions_BT)
        return decoder(inputs_embeds=embedded_BTD, **options).last_hidden_state


def _arguments(lm: PreTrainedModel) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(lm.get_decoder().forward).parameters


def check_document_isolation(model: PreTrainedModel) -> list[str]:
    """Return why documents in one sequence cannot be isolated; empty if they can.

    This checks the model's class; a run's self-tests verify isolation before the first step.
    """
    if "position_ids" in _arguments(model) or isinstance(model.get_decoder(), BloomModel):
        return []
    return [
        f"batch.isolate_documents: {type(model).__name__} takes no position_ids, which isolate "
        "the documents of a packed sequence; set it to false with packing=packed, so that they "
        "attend to each other"
    ]


def last_hidden_state_module(lm: PreTrainedModel) -> nn.Module:
    """Return the module whose output `SummedLoss` uses as the last hidden state."""
    decoder = lm.get_decoder()
    return decoder.ln_f if isinstance(decoder, BloomModel) else decoder


def check_output_projection(model: PreTrainedModel) -> list[str]:
    """Return why the chunked loss cannot replace the model's own; empty if it can."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        return [
            f"model.path: the output projection of {type(model).__name__} is not a linear layer "
            "without bias, which the training loss requires; use another model"
        ]
    return []


def add_noise(embedded_BTD: Tensor, positions_BT: Tensor, alpha: float) -> Tensor:
    """Add uniform noise within alpha / sqrt(L x D) to the embeddings of documents of L tokens.

    L is the document's own length, so its noise does not depend on what it is packed or padded
    with. Padding counts as a separate document, which nothing attends to.

    Args:
        embedded_BTD: the token embeddings.
        positions_BT: position of each token in its document, which starts at 0.
        alpha: scale of the noise; 5 to 15 in the paper.
    """
    documents_BT = (positions_BT == 0).cumsum(dim=1)
    # Index 0 is for a sequence that starts mid-document, hence one more count.
    counts = documents_BT.new_zeros(len(documents_BT), documents_BT.shape[1] + 1)
    counts.scatter_add_(1, documents_BT, torch.ones_like(documents_BT))
    numel_BT = counts.gather(1, documents_BT) * embedded_BTD.shape[-1]
    bound_BT1 = (alpha / numel_BT.float().sqrt()).unsqueeze(-1)
    # Drawn in float32 from the generator that dropout uses, which is seeded per micro-batch.
    noise_BTD = torch.rand(embedded_BTD.shape, device=embedded_BTD.device) * 2 - 1
    return embedded_BTD + (noise_BTD * bound_BT1).to(embedded_BTD.dtype)
