"""Promise: other families than LLaMA 1 train in a pack as they do alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig

from raytune_llama.tokenizer.loader import load_tokenizer
from raytune_llama.train.monitoring.metrics import EVAL_LOSS, LOSS
from raytune_llama.train.result import RunResult
from tests.train.conftest import MakeConfig, curve, run_here
from tests.train.pack.conftest import Listed, is_equal, pack_here
from tests.train.test_families import FAMILIES, SIZES

PACKED = {
    **{name: FAMILIES[name] for name in ("llama3", "qwen2", "qwen3")},
    # A window shorter than the sequences: its mask differs from the causal one.
    "mistral": MistralConfig(**SIZES, sliding_window=7),
}


@pytest.mark.parametrize("family", PACKED)
def test_family_in_a_pack_equals_the_runs_alone(
    make_config: MakeConfig, tmp_path: Path, tokenizer_dir: Path, family: str
) -> None:
    torch.manual_seed(1)
    model: Any = AutoModelForCausalLM.from_config(PACKED[family])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    model.save_pretrained(tmp_path / "base")
    load_tokenizer(tokenizer_dir).save_pretrained(tmp_path / "base")
    base = {"model__path": str(tmp_path / "base"), "lora__modules_to_save": []}
    slots: list[dict[str, Any]] = [{"lora__rank": 2}, {"batch__sequence_tokens": 40, "seed": 3}]
    # Crops are continued sequences: their first position may be any.
    slots[1]["batch__packing"] = "crops"
    pairs = [
        (make_config(f"alone-{n}", **base, **each), make_config(f"packed-{n}", **base, **each))
        for n, each in enumerate(slots)
    ]
    for alone, _ in pairs:
        run_here(alone)
    outcomes = pack_here(Listed([packed for _, packed in pairs]))
    assert outcomes == {number: RunResult("finished", 6) for number in range(2)}
    for alone, packed in pairs:
        assert curve(packed, LOSS) == curve(alone, LOSS)
        assert curve(packed, EVAL_LOSS) == curve(alone, EVAL_LOSS)
        assert is_equal(packed, alone)
