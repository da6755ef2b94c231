"""Compare a merged model with base and adapters under PEFT: same logits, same perplexity.

One model at a time is in memory, in float32, plus the logits of the first one.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from raytune_llama.config.errors import UserError
from raytune_llama.merge.plan import MergePlan
from raytune_llama.model.lineage import find_leading_ids
from raytune_llama.model.rope import apply_rope_settings
from raytune_llama.tokenizer.loader import encode_text, load_tokenizer

logger = logging.getLogger(__name__)

SENTENCES: tuple[str, ...] = (
    "The library opens at nine in the morning, and most of its readers come for the newspapers.",
    "Water boils at 100 degrees Celsius at sea level; on a mountain it boils earlier.",
    "def area(width, height):\n    return width * height\n",
    "北京是中国的首都。这座城市已经有三千多年的历史。",
    "请写一封信感谢老师一年来的帮助。",
)
"""Texts to compare on if none is given."""

_MAX_TOKENS, _WINDOW_TOKENS = 1024, 256
_MAX_CHARACTERS = 1 << 16
_TOLERANCE, _TOLERANCE_CAST = 1e-4, 1e-3
"""Tolerances relative to the largest logit, or absolute if that is below 1. Of cast weights, one in
some ten thousand rounds the other way because PEFT's sum differs in its last bit."""


@dataclass(frozen=True)
class LogitsDifference:
    """Difference between two models on some text."""

    largest: float
    """Largest absolute difference of a logit."""
    allowed: float
    """Largest difference that rounding explains."""
    perplexities: tuple[float, float]
    """Perplexity under PEFT, and of the merged model."""


def load_comparison_ids(
    tokenizer_dir: Path | None, text: str | None, lineage: Sequence[Path] = ()
) -> list[Tensor]:
    """Return token ids to compare models on, each [1, T]; a text begins as in training.

    Args:
        tokenizer_dir: Directory of the merged model's tokenizer.
        text: Text file whose beginning is used; None: built-in sentences.
        lineage: Base and adapters, in the order of their training.

    Raises:
        ValueError: There is no tokenizer, or the text has fewer than two tokens.
    """
    if tokenizer_dir is None:
        raise UserError(
            "verify: logits need a tokenizer, but neither the adapters nor the base have one"
        )
    texts = list(SENTENCES) if text is None else [_read_beginning(Path(text))]
    tokenizer = load_tokenizer(tokenizer_dir)
    begin = find_leading_ids(lineage, tokenizer)
    encoded = [[*begin, *ids] for ids in encode_text(tokenizer, texts)]
    windows = [
        torch.tensor([ids[start : start + _WINDOW_TOKENS]])
        for ids in encoded
        for start in range(0, min(len(ids), _MAX_TOKENS), _WINDOW_TOKENS)
    ]
    windows = [ids_BT for ids_BT in windows if ids_BT.shape[1] > 1]
    if not windows:
        raise UserError(f"verify_text: {text} has fewer than two tokens; use a longer text")
    logger.info(
        "comparing logits on %d tokens of %s",
        sum(ids_BT.shape[1] for ids_BT in windows),
        text or "built-in sentences",
    )
    return windows


def compare_logits(folder: Path, plan: MergePlan, samples: list[Tensor]) -> LogitsDifference:
    """Compare a merged model with base and adapters under PEFT.

    In float32, PEFT adds the last adapter's output to that of each layer, without merging. Weights
    of other types are compared with PEFT's own merge in float32, cast to the same type.

    Args:
        folder: Directory of the merged model.
        plan: Plan of the merge.
        samples: Token ids, each [1, T].

    Raises:
        AssertionError: A logit differs by more than rounding explains.
    """
    is_cast = any(spec.dtype != torch.float32 for spec in plan.specs.values())
    reference = _load_reference(plan, is_cast=is_cast)
    wanted = [_logits(reference, ids_BT) for ids_BT in samples]
    del reference
    merged = _load(folder)
    largest, size, losses = 0.0, 1.0, [0.0, 0.0]
    for ids_BT, wanted_BTV in zip(samples, wanted, strict=True):
        got_BTV = _logits(merged, ids_BT)
        # A NaN counts as an infinite difference.
        distance = (got_BTV - wanted_BTV).abs().nan_to_num(nan=math.inf)
        largest, size = (
            max(largest, float(distance.max())),
            max(size, float(wanted_BTV.abs().max())),
        )
        for number, logits_BTV in enumerate((wanted_BTV, got_BTV)):
            losses[number] += _summed_loss(logits_BTV, ids_BT)
    num_targets = sum(ids_BT.shape[1] - 1 for ids_BT in samples)
    before, after = (math.exp(loss / num_targets) for loss in losses)
    allowed = size * (_TOLERANCE_CAST if is_cast else _TOLERANCE)
    text = f"largest difference of a logit from PEFT's is {largest:.2e}, allowed {allowed:.2e}"
    if not largest <= allowed:
        raise AssertionError(f"{text}: the merged model does not match base and adapters")
    logger.info("%s; perplexity %.4f under PEFT, %.4f merged", text, before, after)
    return LogitsDifference(largest, allowed, (before, after))


def _read_beginning(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"verify_text: {path} is not a file; set it to a text file")
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(_MAX_CHARACTERS)
    except UnicodeDecodeError as error:
        raise UserError(f"verify_text: {path} is not UTF-8 ({error}); convert it") from None


def _load(path: Path, changed: Mapping[str, Any] | None = None) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    apply_rope_settings(config, changed or {})
    return AutoModelForCausalLM.from_pretrained(
        path, config=config, dtype=torch.float32, local_files_only=True
    ).eval()


def _load_reference(plan: MergePlan, *, is_cast: bool) -> torch.nn.Module:
    """Load base and adapters with PEFT; merge and cast them if `is_cast`."""
    model: Any = _load(plan.base_dir, plan.model_settings)
    for adapter in plan.adapters:
        if isinstance(model, PeftModel):
            model = model.merge_and_unload()
        if plan.names.embedding in adapter.replaced:
            num_rows = adapter.spec(plan.names.embedding).shape[0]
            if num_rows > model.get_input_embeddings().weight.shape[0]:
                model.resize_token_embeddings(num_rows, mean_resizing=False)
        model = PeftModel.from_pretrained(model, str(adapter.path))
    if is_cast:
        model = model.merge_and_unload()
        for name, parameter in model.named_parameters():
            if name in plan.specs:
                parameter.data = parameter.data.to(plan.specs[name].dtype).float()
    return model.eval()


def _logits(model: torch.nn.Module, ids_BT: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=ids_BT, use_cache=False).logits.float()


def _summed_loss(logits_BTV: Tensor, ids_BT: Tensor) -> float:
    loss = functional.cross_entropy(logits_BTV[0, :-1], ids_BT[0, 1:], reduction="sum")
    return float(loss)
