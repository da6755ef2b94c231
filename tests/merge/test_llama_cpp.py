"""Promise: llama.cpp says the words that transformers says, from the merged model's GGUF file.

Runs where the package llama-cpp-python is installed and the demo's model is in `demo/`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from raytune_llama.tokenizer.loader import encode_text, load_tokenizer
from tests.merge.conftest import ALL, MakeAdapter, merge

DEMO = Path(__file__).parents[2] / "demo" / "model"
PROMPTS = ("The capital of France is", "def fibonacci(n):\n    ", "1998年12月31日")
NUM_TOKENS = 20

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DEMO.is_dir(), reason="needs the demo's model"),
]


def say(model: Any, ids: list[int]) -> list[int]:  # noqa: ANN401
    with torch.no_grad():
        said = model.generate(
            torch.tensor([ids]), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None
        )
    return said[0, len(ids) :].tolist()


def say_by_llama_cpp(llama: Any, ids: list[int]) -> list[int]:  # noqa: ANN401
    llama.reset()
    said = []
    for id_ in llama.generate(ids, temp=0.0, repeat_penalty=1.0):
        said.append(id_)
        if len(said) == NUM_TOKENS:
            return said
    return said


def preference(model: Any, ids: list[int], first: int, second: int) -> float:  # noqa: ANN401
    """Return how much more the model likes one next token than another, in nats."""
    with torch.no_grad():
        logits_V = model(torch.tensor([ids])).logits[0, -1]
    return float(logits_V[first] - logits_V[second])


@pytest.mark.parametrize(("gguf_type", "tolerance"), [("f16", 0.01), ("q8_0", 0.5)])
def test_llama_cpp_says_what_transformers_says(
    make_adapter: MakeAdapter, tmp_path: Path, gguf_type: str, tolerance: float
) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    base = tmp_path / "base"
    base.symlink_to(DEMO)
    # Small enough that the model still speaks.
    adapter = make_adapter(base, r=8, lora_alpha=0.02, target_modules=ALL)
    wanted: Any = AutoModelForCausalLM.from_pretrained(
        merge(base, adapter).rename(tmp_path / "wanted"), dtype=torch.float32
    )
    target = merge(base, adapter, output_format="gguf", gguf_type=gguf_type)
    llama = llama_cpp.Llama(
        str(target / f"model-{gguf_type}.gguf"), n_ctx=256, n_threads=1, verbose=False
    )
    tokenizer = load_tokenizer(base)
    num_same = 0
    for prompt in PROMPTS:
        (ids,) = encode_text(tokenizer, [prompt])
        assert llama.tokenize(prompt.encode(), add_bos=False, special=False) == ids
        # Rounded weights may turn a choice between tokens that the model likes alike, no other.
        for ours, theirs in zip(say(wanted, ids), say_by_llama_cpp(llama, ids), strict=True):
            if ours != theirs:
                assert preference(wanted, ids, ours, theirs) < tolerance, prompt
                break
            ids.append(ours)
            num_same += 1
    assert num_same >= len(PROMPTS) * NUM_TOKENS // 3
