"""A tiny model for clients: with a chat template, room for tools in the prompt, and an adapter."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from raytune_llama.serve.config import (
    ReplicaConfig,
    SamplingDefaults,
    ServeConfig,
    ServedModelConfig,
)
from raytune_llama.tokenizer.loader import load_tokenizer
from tests.serve.adapters.conftest import write_adapter_directory

NAME, ADAPTER = "tiny", "poet"
CONTEXT_TOKENS = 4096

# `<s>` and `<|im_end|>` are control tokens of the tests' tokenizer.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


def write_chat_model(path: Path, tokenizer_dir: Path, **fields: Any) -> None:  # noqa: ANN401
    """Write a small LLaMA whose tokenizer has a chat template; fields are of its config."""
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=400,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=0,
            eos_token_id=1,
            **fields,
        )
    ).save_pretrained(path)
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(path)


def write_tiny_chat(folder: Path, tokenizer_dir: Path) -> ServeConfig:
    """Write the model and its adapter into a folder, and return how to serve them."""
    path, adapters = folder / NAME, folder / "adapters"
    write_chat_model(
        path, tokenizer_dir, max_position_embeddings=CONTEXT_TOKENS, initializer_range=0.3
    )
    adapters.mkdir()
    write_adapter_directory(path, adapters / ADAPTER, seed=1)
    return ServeConfig(
        models=(ServedModelConfig(path=str(path), name=NAME, adapters_dir=str(adapters)),),
        # For clients that set neither: the same answer at each run, of a second.
        defaults=SamplingDefaults(max_tokens=200, temperature=0),
        # Few, so that some requests of many are refused.
        replicas=ReplicaConfig(slots=4, waiting=8),
    )
