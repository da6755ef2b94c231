"""Prompts for benchmarks of serving: stretches of this repository's licence, of known lengths."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from raytune_llama.model.config import LoraConfig
from raytune_llama.model.lora import attach_adapter
from raytune_llama.tokenizer.loader import load_tokenizer

LICENCE = Path(__file__).resolve().parents[2] / "LICENSE"
_STRIDE_TOKENS = 47


@dataclass(frozen=True)
class Prompt:
    """A prompt in both forms: some servers take ids, some only text."""

    text: str
    ids: list[int]
    """What Hugging Face's tokenizer makes of the text; decoding them gives it again."""


def make_prompts(model: Path, count: int, lengths: Sequence[int]) -> list[Prompt]:
    """Return different prompts whose numbers of tokens go round the given lengths.

    Raises:
        RuntimeError: the text is too short for so many.
    """
    tokenizer = load_tokenizer(model)
    words = " ".join(LICENCE.read_text(encoding="utf-8").split())
    ids: list[int] = tokenizer.encode(words, add_special_tokens=False)
    prompts: list[Prompt] = []
    for start in range(0, len(ids) - max(lengths), _STRIDE_TOKENS):
        piece = ids[start : start + lengths[len(prompts) % len(lengths)]]
        text = tokenizer.decode(piece)
        assert isinstance(text, str)
        # A piece may begin within a word: then its text has other ids.
        if tokenizer.encode(text) == piece:
            prompts.append(Prompt(text, piece))
        if len(prompts) == count:
            return prompts
    raise RuntimeError(f"{LICENCE} has {len(prompts)} prompts, wanted {count}")


def load_reference(model: Path) -> PreTrainedModel:
    """Load a model with transformers, in fp32."""
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, local_files_only=True
    )
    return loaded.eval()


def generate(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], num_new: int
) -> list[list[int]]:
    """Let transformers generate greedily for all prompts in one batch, through ends of text.

    Shorter prompts are padded in front and masked.
    """
    longest = max(len(prompt) for prompt in prompts)
    ids_BT = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts])
    mask_BT = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    # A config of its own: the model's may end or penalise.
    with torch.inference_mode():
        told = model.generate(  # pyright: ignore[reportCallIssue]
            ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=num_new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return told[:, longest:].tolist()


def write_random_adapter(model_dir: Path, target: Path, *, seed: int) -> Path:
    """Write an adapter of rank 8 on all linear layers with small random weights; return its place.

    Args:
        model_dir: directory of the base model.
        target: directory of the adapter.
        seed: of the weights.
    """
    tuned = attach_adapter(load_reference(model_dir), LoraConfig(rank=8, alpha=0.02), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02, generator=generator)
    tuned.save_pretrained(str(target))
    load_tokenizer(model_dir).save_pretrained(target)
    return target
