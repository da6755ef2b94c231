"""Promise: a GGUF file is the merged model: its weights, settings and tokenizer, read by others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from raytune_llama.merge import gguf_file
from raytune_llama.model.tensors import open_weights
from raytune_llama.tokenizer.loader import encode_text, load_tokenizer
from tests.conftest import train_tokenizer
from tests.merge.conftest import IDS, WHOLE, MakeAdapter, MakeBase, left_over, load, merge
from tests.model.conftest import SENTENCES

LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


@pytest.fixture
def make_spoken(make_base: MakeBase) -> MakeBase:
    """Make a base with a byte-level tokenizer, of widths that 8-bit blocks can hold."""

    def make(**fields: Any) -> Path:  # noqa: ANN401
        base = make_base(**{"hidden_size": 64, "intermediate_size": 96, **fields})
        train_tokenizer(base)
        return base

    return make


def read_logits(target: Path) -> torch.Tensor:
    """Return what transformers' own reader of GGUF makes of a file."""
    (file,) = target.glob("*.gguf")
    model: Any = AutoModelForCausalLM.from_pretrained(
        target, gguf_file=file.name, dtype=torch.float32
    )
    with torch.no_grad():
        return model.eval()(IDS).logits


def fields_of(target: Path) -> dict[str, Any]:
    (file,) = target.glob("*.gguf")
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


@pytest.mark.parametrize(("gguf_type", "dtype"), [("f32", "float32"), ("f16", "float16")])
@pytest.mark.parametrize("tied", [False, True])
def test_gguf_has_the_logits_of_the_merged_model(
    make_spoken: MakeBase, make_adapter: MakeAdapter, gguf_type: str, dtype: str, *, tied: bool
) -> None:
    base = make_spoken(tie_word_embeddings=tied, rope_theta=77777.0, rms_norm_eps=3e-4)
    adapter = make_adapter(base)
    wanted = merge(base, adapter, dtype=dtype).rename(base.with_name("wanted"))
    target = merge(base, adapter, output_format="gguf", gguf_type=gguf_type)
    with torch.no_grad():
        torch.testing.assert_close(
            read_logits(target), load(wanted)(IDS).logits, rtol=1e-4, atol=1e-4
        )
    has_head = "output.weight" in {t.name for t in GGUFReader(next(target.glob("*.gguf"))).tensors}
    assert has_head != tied


def test_gguf_of_eight_bits_is_the_quantised_merge_in_half_a_step(
    make_spoken: MakeBase, make_adapter: MakeAdapter
) -> None:
    base = make_spoken()
    adapter = make_adapter(base)
    exact = open_weights(merge(base, adapter).rename(base.with_name("wanted")))
    target = merge(base, adapter, output_format="gguf", gguf_type="q8_0")
    tensors = {tensor.name: tensor for tensor in GGUFReader(target / "model-q8_0.gguf").tensors}
    for ours, theirs in (
        ("model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight"),
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.0.self_attn.v_proj.weight", "blk.0.attn_v.weight"),
    ):
        values = exact.read(ours).numpy()
        stored = tensors[theirs].data
        np.testing.assert_array_equal(stored, gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0))
        got = gguf.dequantize(stored, gguf.GGMLQuantizationType.Q8_0)
        blocks = values.reshape(-1, 32)
        steps = np.abs(blocks).max(axis=1, keepdims=True) / 127
        assert (np.abs(got.reshape(-1, 32) - blocks) <= steps * 0.57).all()
    norm = tensors["blk.0.attn_norm.weight"]
    assert norm.tensor_type == gguf.GGMLQuantizationType.F32
    with torch.no_grad():
        wanted = load(base.with_name("wanted"))(IDS).logits
    logits = torch.stack([read_logits(target).flatten(), wanted.flatten()])
    assert torch.corrcoef(logits)[0, 1] > 0.99


def test_gguf_names_the_settings_of_the_model(
    make_spoken: MakeBase, make_adapter: MakeAdapter
) -> None:
    base = make_spoken(max_position_embeddings=333, rope_theta=12345.0, rms_norm_eps=1e-4)
    fields = fields_of(merge(base, make_adapter(base), output_format="gguf"))
    assert fields["general.architecture"] == "llama"
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16
    wanted = {
        "context_length": 333,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "block_count": 2,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-4),
        "rope.dimension_count": 16,
        "rope.freq_base": 12345.0,
        "vocab_size": 410,
    }
    assert {name: fields[f"llama.{name}"] for name in wanted} == wanted


def test_gguf_of_llama_3_1_has_the_factors_of_its_frequencies(
    make_spoken: MakeBase, make_adapter: MakeAdapter
) -> None:
    base = make_spoken(
        head_dim=32,
        num_attention_heads=2,
        max_position_embeddings=2048,
        rope_parameters=LLAMA_3_ROPE,
    )
    target = merge(base, make_adapter(base), output_format="gguf", gguf_type="f32")
    tensors = {tensor.name: tensor for tensor in GGUFReader(target / "model-f32.gguf").tensors}
    factors = torch.from_numpy(tensors["rope_freqs.weight"].data.copy())
    plain = 1.0 / 500000.0 ** (torch.arange(0, 32, 2) / 32)
    used: Any = LlamaRotaryEmbedding(load(base).config).inv_freq
    torch.testing.assert_close(plain / factors, used)
    assert factors.min() == 1
    assert factors.max() == pytest.approx(8)


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_gguf_tokenizer_gives_the_same_ids(
    make_base: MakeBase,
    make_adapter: MakeAdapter,
    add_pieces: Callable[[Path], None],
    kind: str,
) -> None:
    base = make_base()
    if kind == "bytes":
        train_tokenizer(base)
    else:
        add_pieces(base)
    target = merge(base, make_adapter(base), output_format="gguf")
    read: Any = AutoTokenizer.from_pretrained(target, gguf_file="model-f16.gguf")
    texts = [*SENTENCES, "x  =  42\n"]
    assert [read(text, add_special_tokens=False)["input_ids"] for text in texts] == encode_text(
        load_tokenizer(base), texts
    )


def test_gguf_of_a_grown_vocabulary_has_the_adapter_s_rows(
    make_spoken: MakeBase, make_adapter: MakeAdapter
) -> None:
    base = make_spoken()
    adapter = make_adapter(base, rows=448, modules_to_save=WHOLE)
    target = merge(base, adapter, output_format="gguf", gguf_type="f32")
    fields = fields_of(target)
    assert fields["llama.vocab_size"] == len(fields["tokenizer.ggml.tokens"]) == 448
    assert read_logits(target).shape[-1] == 448


def spoil_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "to_interleaved_rows", lambda weight, _: weight)


def spoil_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    def truncated(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
        steps = np.abs(values.reshape(-1, 32)).max(axis=1, keepdims=True) / 127
        numbers = np.trunc(values.reshape(-1, 32) / np.where(steps == 0, 1, steps))
        parts = [steps.astype(np.float16).view(np.uint8), numbers.astype(np.int8).view(np.uint8)]
        return np.concatenate(parts, axis=1).reshape(len(values), -1)

    monkeypatch.setattr(gguf_file.gguf, "quantize", truncated)


@pytest.mark.parametrize("spoil", [spoil_order, spoil_rounding])
def test_gguf_that_was_written_wrong_is_found_and_leaves_nothing(
    make_spoken: MakeBase,
    make_adapter: MakeAdapter,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[pytest.MonkeyPatch], None],
) -> None:
    base = make_spoken()
    adapter = make_adapter(base, target_modules=["v_proj"])
    spoil(monkeypatch)
    with pytest.raises(AssertionError, match=r"is off by|was not written as it is"):
        merge(base, adapter, output_format="gguf", gguf_type="q8_0")
    assert left_over(base) == []


@pytest.mark.parametrize(
    ("base_fields", "fields", "message"),
    [
        (
            {"intermediate_size": 48},
            {"gguf_type": "q8_0"},
            r"gguf_type: q8_0 needs rows that are a multiple of 32, but",
        ),
        ({"hidden_act": "gelu"}, {}, "does not support LLaMAs with hidden_act 'gelu'"),
        ({"attention_bias": True}, {}, r"has a tensor model\.layers\.0\.self_attn\..*bias, which"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            {},
            "does not support LLaMAs with rope_type 'dynamic'",
        ),
    ],
)
def test_gguf_of_what_llama_cpp_cannot_compute_is_refused(
    make_spoken: MakeBase,
    make_adapter: MakeAdapter,
    base_fields: dict[str, Any],
    fields: dict[str, Any],
    message: str,
) -> None:
    base = make_spoken(**base_fields)
    adapter = make_adapter(base)
    with pytest.raises(ValueError, match=message):
        merge(base, adapter, output_format="gguf", **fields)
    assert left_over(base) == []


def test_gguf_without_a_tokenizer_is_refused(
    make_base: MakeBase, make_adapter: MakeAdapter
) -> None:
    base = make_base()
    with pytest.raises(ValueError, match="gguf holds the tokenizer too"):
        merge(base, make_adapter(base), output_format="gguf")
