"""Promise: Meta's form of a merge is the merge, bit for bit; options of other forms are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raytune_llama.config.settings import ConfigError, from_dict
from raytune_llama.merge.config import MergeConfig
from raytune_llama.model.meta import to_meta
from raytune_llama.model.meta.config import ConvertConfig
from raytune_llama.model.meta.conversion import convert_weights
from raytune_llama.model.meta.layout import MetaParams, count_published_shards
from raytune_llama.model.tensors import open_weights
from tests.merge.conftest import WHOLE, MakeAdapter, MakeBase, left_over, merge, rewrite_base


@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.parametrize("dtype", ["base", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_pth_comes_back_as_the_merged_model(
    make_base: MakeBase,
    make_adapter: MakeAdapter,
    add_pieces: Callable[[Path], None],
    num_shards: int,
    dtype: str,
    *,
    tied: bool,
) -> None:
    base = make_base(tie_word_embeddings=tied)
    add_pieces(base)
    adapter = make_adapter(base)
    wanted = open_weights(merge(base, adapter, dtype=dtype).rename(base.with_name("wanted")))
    target = merge(base, adapter, output_format="pth", num_shards=num_shards, dtype=dtype)
    files = [f"consolidated.{number:02d}.pth" for number in range(num_shards)]
    names = sorted(path.name for path in target.iterdir())
    assert names == [*files, "manifest.json", "params.json", "tokenizer.model"]
    assert set(json.loads((target / "manifest.json").read_text())["files"]) == set(names) - {
        "manifest.json"
    }
    back = base.with_name("back")
    convert_weights(ConvertConfig(source=str(target), target=str(back)))
    found = open_weights(back)
    for name in found.specs:
        source = "model.embed_tokens.weight" if tied and name == "lm_head.weight" else name
        assert torch.equal(found.read(name), wanted.read(source)), name


def test_pth_of_a_grown_vocabulary_has_all_rows(
    make_base: MakeBase, make_adapter: MakeAdapter
) -> None:
    base = make_base()
    adapter = make_adapter(base, rows=423, modules_to_save=WHOLE)
    target = merge(base, adapter, output_format="pth", num_shards=2)
    shards = [torch.load(path, weights_only=True) for path in sorted(target.glob("*.pth"))]
    # Shards cut the output by rows, of which the last takes what is left over.
    assert [len(shard["output.weight"]) for shard in shards] == [211, 212]
    assert all(len(shard["tok_embeddings.weight"]) == 423 for shard in shards)


@pytest.mark.parametrize(("width", "shards"), [(4096, 1), (5120, 2), (6656, 4), (8192, 8), (64, 1)])
def test_pth_without_a_number_has_as_many_shards_as_were_published(width: int, shards: int) -> None:
    assert count_published_shards(MetaParams(dim=width, n_layers=1, n_heads=8)) == shards


def test_pth_that_was_written_wrong_is_found_and_leaves_nothing(
    make_base: MakeBase, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base()
    adapter = make_adapter(base, target_modules=["v_proj"])
    monkeypatch.setattr(to_meta, "to_interleaved_rows", lambda weight, _: weight)
    with pytest.raises(AssertionError, match=r"[qk]_proj\.weight was not written as it is in"):
        merge(base, adapter, output_format="pth")
    assert left_over(base) == []


def test_pth_of_what_metas_form_cannot_hold_is_refused(
    make_base: MakeBase, make_adapter: MakeAdapter
) -> None:
    base = make_base()
    adapter = make_adapter(base)
    with pytest.raises(ValueError, match=r"num_shards: 2 .*heads"):
        merge(base, adapter, output_format="pth", num_shards=4)
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"rope_parameters": rope}))
    with pytest.raises(ValueError, match=r"rope_parameters: 'linear' cannot be expressed"):
        merge(base, adapter, output_format="pth")
    assert left_over(base) == []


def test_float16_that_cannot_hold_a_value_is_refused(
    make_base: MakeBase, make_adapter: MakeAdapter
) -> None:
    base = make_base(intermediate_size=64)
    adapter = make_adapter(base, target_modules=["q_proj"])

    def enlarge(weights: dict[str, Tensor]) -> None:
        weights["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e6

    rewrite_base(base, enlarge)
    for fields in ({"dtype": "float16"}, {"dtype": "float16", "output_format": "pth"}):
        with pytest.raises(ValueError, match=r"up_proj\.weight has values up to 1e\+06"):
            merge(base, adapter, **fields)
    assert left_over(base) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gguf_type": "f16"}, "gguf_type: is only for output_format gguf, got huggingface"),
        ({"num_shards": 2}, "num_shards: is only for output_format pth, got huggingface"),
        ({"num_workers": 2, "output_format": "pth"}, "num_workers: is only for output_format hugg"),
        (
            {"max_shard_mib": 1, "output_format": "gguf"},
            "max_shard_mib: is only for output_format hu",
        ),
        ({"dtype": "float32", "output_format": "gguf"}, "dtype: got float32, but gguf uses gguf_"),
        (
            {"verify": "logits", "output_format": "pth"},
            "verify: logits are computed by transformers",
        ),
        ({"verify_text": "a.txt"}, "verify_text: is only for verify=logits"),
    ],
)
def test_options_of_another_form_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(MergeConfig, {"base": "a", "adapters": ["b"], "target": "c", **fields})
