"""Read Meta's params.json: its keys are used, known to mean nothing, or refused by name.

    file = read_params(directory, is_llama3=True)
    file.params.dim, file.content

Meta's own code ignores keys that it does not know, and so computes another model than was trained.
"""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from raytune_llama.config.errors import UserError
from raytune_llama.model.meta.layout import META_ROPE_FACTOR, PARAMS, MetaParams
from raytune_llama.storage.files import read_json

logger = logging.getLogger(__name__)

LLAMA3_THETA = 500000.0
"""Base of the rotary frequencies in the code of LLaMA 3 where params.json has none."""

_SMALL_ROPE_FACTOR = 32.0
_SMALL_SIZES = {(2048, 16), (3072, 28)}
"""Width and layers of LLaMA 3.2 1B and 3B, which were trained with a RoPE factor of 32."""

_QUANTIZED = "the weights are quantized; use the release in bfloat16"
_VISION = "the model also reads images; only text models are converted"
_LLAMA_4 = "the model is a LLaMA 4, of another architecture; only LLaMA 1 to 3 are converted"
_PRUNED = "the model is a pruned LLaMA Guard, which this converter does not know"
_REASONS = {
    "quantization_args": _QUANTIZED,
    "lora_args": "the weights are quantized, with a LoRA adapter; use the release in bfloat16",
    "vision_chunk_size": _VISION,
    "vision_max_num_chunks": _VISION,
    "vision_num_cross_attention_layers": _VISION,
    "vision_model": _VISION,
    "vision_args": _LLAMA_4,
    "moe_args": _LLAMA_4,
    "nope_layer_interval": _LLAMA_4,
    "use_qk_norm": _LLAMA_4,
    "attention_chunk_size": _LLAMA_4,
    "attn_temperature_tuning": _LLAMA_4,
    "rope_high_freq_factor": _LLAMA_4,
    "moe": "the model is a mixture of experts; only dense models are converted",
    "hidden_dim": _PRUNED,
    "rope_freq_base": _PRUNED,
    "model": "the settings are nested; write the content of model as the whole file",
}
"""Keys of other models of Meta, and what to do."""


@dataclass(frozen=True)
class ParamsFile:
    """A params.json."""

    path: Path
    """The file."""
    content: dict[str, Any]
    """Its JSON object, to be written again when the model is converted back."""
    params: MetaParams
    """Its meaning."""

    def with_rope_factor(self, *, is_tied: bool) -> MetaParams:
        """Return the params with the RoPE factor that the model was trained with.

        Args:
            is_tied: Whether the output matrix equals the embedding.

        Raises:
            ValueError: The factor is unknown; see `infer_rope_factor`.
        """
        if not self.params.use_scaled_rope or self.params.rope_scaling_factor is not None:
            return self.params
        factor = infer_rope_factor(self.params, is_tied=is_tied)
        if factor is None:
            raise UserError(
                f"source: {self.path} has use_scaled_rope and the sizes of a LLaMA 3.2 (RoPE "
                f"factor {_SMALL_ROPE_FACTOR:g}), but output.weight differs from "
                f"tok_embeddings.weight, as in LLaMA 3.1 (factor {META_ROPE_FACTOR:g}); add the "
                "rope_scaling_factor that the model was trained with to the file"
            )
        logger.info(
            "%s names no rope_scaling_factor: taking %g, as in LLaMA %s, since output.weight %s "
            "tok_embeddings.weight; add rope_scaling_factor to the file if it is another",
            self.path,
            factor,
            "3.2" if is_tied else "3.1 and 3.3",
            "equals" if is_tied else "differs from",
        )
        return dataclasses.replace(self.params, rope_scaling_factor=factor)


def infer_rope_factor(params: MetaParams, *, is_tied: bool) -> float | None:
    """Return the RoPE factor of a model whose params.json has none; None if it is unknown.

    No release of Meta names it: it is 8 in LLaMA 3.1 and 3.3, and 32 in 3.2 1B and 3B, the only
    ones whose output matrix is their embedding; Meta's code takes 8 for those too, by mistake.
    (https://github.com/meta-llama/llama-models/issues/166 and 241)
    """
    if (params.dim, params.n_layers) in _SMALL_SIZES and not is_tied:
        return None
    return _SMALL_ROPE_FACTOR if is_tied else META_ROPE_FACTOR


def read_params(source: Path, *, is_llama3: bool) -> ParamsFile:
    """Read the params.json of a directory in Meta's format.

    Args:
        source: The directory.
        is_llama3: Whether the tokenizer is LLaMA 3's, whose code has other defaults.

    Raises:
        ValueError: The file is missing or not JSON, a value is impossible, or a key is unknown.
    """
    path = source / PARAMS
    if not path.is_file():
        raise UserError(f"source: {path} is missing; fetch it")
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"source: {path} is not a JSON object; fetch it again")
    params = parse_params(content, where=f"source: {path}", is_llama3=is_llama3)
    if params.use_scaled_rope and not is_llama3:
        raise UserError(
            f"source: {path} has use_scaled_rope, as only LLaMA 3 does, but the tokenizer.model is "
            "a SentencePiece model, of LLaMA 1 or 2; put the model's own tokenizer.model there"
        )
    return ParamsFile(path, content, params)


def parse_params(content: dict[str, Any], *, where: str, is_llama3: bool) -> MetaParams:
    """Parse the content of a params.json.

    Args:
        content: The JSON object.
        where: What it belongs to, for errors.
        is_llama3: Whether the model is a LLaMA 3.

    Raises:
        ValueError: A value is impossible, or a key is unknown.
    """
    unset = {"rope_theta": LLAMA3_THETA} if is_llama3 else {}
    try:
        return pydantic.TypeAdapter(MetaParams).validate_python(unset | content)
    except pydantic.ValidationError as error:
        problems = [_problem(e["loc"], e["type"], e["msg"]) for e in error.errors()]
        raise UserError(f"{where}: {'; '.join(problems)}") from None


def _problem(loc: tuple[int | str, ...], kind: str, message: str) -> str:
    name = ".".join(map(str, loc))
    if kind == "unexpected_keyword_argument":
        reason = "this converter does not know the key, so that its meaning would be lost"
        return f"{name}: {_REASONS.get(name, reason)}"
    if kind == "missing":
        return f"{name}: is missing"
    text = message.removeprefix("Value error, ")
    return f"{name}: {text}" if name else text
