"""Promise: Meta's form and Hugging Face's say the same, bit for bit, both ways."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from raytune_llama.model.meta.config import ConvertConfig
from raytune_llama.model.meta.conversion import convert_weights
from raytune_llama.model.meta.layout import MetaParams, build_meta_params, shard_ranges
from raytune_llama.model.tensors import open_weights
from tests.model.conftest import MakeModel, llama_config
from tests.model.meta.reference import contents, meta_logits, random_tensors, shard

PARAMS = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 8,
    "multiple_of": 16,
    "norm_eps": 1e-5,
    "vocab_size": -1,
}
VOCABULARY = 360
"""Pieces of `piece_model`."""


@pytest.fixture
def write_meta(tmp_path: Path, piece_model: Path) -> Callable[..., Path]:
    """Write a model of random weights in Meta's form."""

    def write(num_shards: int = 1, **fields: Any) -> Path:  # noqa: ANN401
        folder = tmp_path / "meta"
        folder.mkdir()
        values = {**PARAMS, **fields}
        params = MetaParams(**values)
        for number, content in enumerate(shard(random_tensors(params, VOCABULARY), num_shards)):
            content["rope.freqs"] = params.rope_frequencies(torch.float16)
            torch.save(content, folder / f"consolidated.{number:02d}.pth")
        (folder / "params.json").write_text(json.dumps(values))
        shutil.copyfile(piece_model, folder / "tokenizer.model")
        return folder

    return write


def config(source: Path, target: Path, **fields: Any) -> ConvertConfig:  # noqa: ANN401
    return ConvertConfig(source=str(source), target=str(target), **fields)


def assert_equal_shards(ours: Path, wanted: Path) -> None:
    left, right = contents(ours), contents(wanted)
    assert len(left) == len(right)
    for mine, other in zip(left, right, strict=True):
        assert set(mine) == set(other)
        for name, tensor in other.items():
            assert mine[name].dtype == tensor.dtype
            assert torch.equal(mine[name], tensor), name


@pytest.mark.parametrize("num_shards", [1, 2, 4, 8])
@pytest.mark.parametrize("fields", [{}, {"n_kv_heads": 8}, {"ffn_dim_multiplier": 1.3}])
def test_convert_there_and_back_gives_every_bit(
    write_meta: Callable[..., Path], tmp_path: Path, num_shards: int, fields: dict[str, Any]
) -> None:
    source = write_meta(num_shards, **fields)
    convert_weights(config(source, tmp_path / "hf"))
    convert_weights(config(tmp_path / "hf", tmp_path / "back", to="meta", num_shards=num_shards))
    assert_equal_shards(tmp_path / "back", source)
    assert json.loads((tmp_path / "back" / "params.json").read_text()) == {**PARAMS, **fields}
    for name in ("tokenizer.model",):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("num_kv_heads", [None, 2])
def test_convert_gives_the_logits_of_meta_s_own_computation(
    write_meta: Callable[..., Path], tmp_path: Path, num_kv_heads: int | None
) -> None:
    fields: dict[str, Any] = {} if num_kv_heads is None else {"n_kv_heads": num_kv_heads}
    source = write_meta(2, rope_theta=500.0, **fields)
    convert_weights(config(source, tmp_path / "hf", max_shard_mib=1))
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    params = MetaParams(**PARAMS, rope_theta=500.0, **fields)
    weights = {name: tensor.float() for name, tensor in random_tensors(params, VOCABULARY).items()}
    ids = torch.arange(3, 40)
    with torch.no_grad():
        got = model(ids[None]).logits[0]
    torch.testing.assert_close(got, meta_logits(weights, params, ids), rtol=1e-4, atol=1e-4)


def test_cut_gives_the_rest_to_the_last_shard_as_the_seeds_do() -> None:
    def sizes(rows: int, shards: int) -> list[int]:
        return [stop - start for start, stop in shard_ranges(rows, shards)]

    assert sizes(49_953, 2) == [24_976, 24_977]
    assert sizes(49_953, 4) == [12_488, 12_488, 12_488, 12_489]
    assert sizes(49_954, 4) == [12_488, 12_488, 12_488, 12_490]


@pytest.mark.parametrize("intermediate", [11_008, 13_824, 17_920, 22_016, 28_672, 1536, 24, 97])
def test_params_of_a_config_give_its_width_back(intermediate: int) -> None:
    dims = {11_008: 4096, 13_824: 5120, 17_920: 6656, 22_016: 8192, 28_672: 8192, 1536: 576}
    fields = {"hidden_size": dims.get(intermediate, 16), "intermediate_size": intermediate}
    params = build_meta_params(llama_config(**fields))
    assert params.intermediate == intermediate
    if intermediate in (11_008, 13_824, 17_920, 22_016):
        assert (params.multiple_of, params.ffn_dim_multiplier) == (256, None)
    if intermediate == 28_672:  # LLaMA 2 70B
        assert (params.multiple_of, params.ffn_dim_multiplier) == (4096, 1.3)


def test_convert_a_tied_model_to_meta_writes_the_table_twice(
    make_llama: MakeModel, tmp_path: Path
) -> None:
    model = make_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "hf")
    convert_weights(config(tmp_path / "hf", tmp_path / "meta", to="meta", num_shards=2))
    left, right = contents(tmp_path / "meta")
    table: Any = model.get_input_embeddings().weight
    embedding = torch.cat([left["tok_embeddings.weight"], right["tok_embeddings.weight"]], dim=1)
    output = torch.cat([left["output.weight"], right["output.weight"]])
    assert torch.equal(embedding, table)
    assert torch.equal(output, table)


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch was-run",))


def test_convert_a_malicious_file_runs_nothing(
    write_meta: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write_meta(1)
    torch.save({"tok_embeddings.weight": Evil()}, source / "consolidated.00.pth")
    with pytest.raises(ValueError, match="holds more than tensors and was not loaded"):
        convert_weights(config(source, tmp_path / "hf"))
    assert not (tmp_path / "was-run").exists()
    assert not (tmp_path / "hf").exists()


def spoil_pointer(source: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (source / "consolidated.00.pth").write_text(pointer)


def spoil_cut(source: Path) -> None:
    file = source / "consolidated.01.pth"
    file.write_bytes(file.read_bytes()[:-5000])


def spoil_missing(source: Path) -> None:
    (source / "consolidated.00.pth").unlink()


def spoil_params(source: Path) -> None:
    values = json.loads((source / "params.json").read_text())
    (source / "params.json").write_text(json.dumps({**values, "multiple_of": 128}))


def spoil_layers(source: Path) -> None:
    values = json.loads((source / "params.json").read_text())
    (source / "params.json").write_text(json.dumps({**values, "n_layers": 3}))


def spoil_unknown_param(source: Path) -> None:
    values = json.loads((source / "params.json").read_text())
    (source / "params.json").write_text(json.dumps({**values, "moe": 3}))


def spoil_tokenizer(source: Path) -> None:
    (source / "tokenizer.model").unlink()


def spoil_norm(source: Path) -> None:
    file = source / "consolidated.01.pth"
    content = torch.load(file, weights_only=True)
    content["norm.weight"] += 1
    torch.save(content, file)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_pointer, "consolidated.00.pth: is a Git LFS pointer"),
        (spoil_cut, "consolidated.01.pth: is damaged or truncated"),
        (spoil_missing, "lacks consolidated.00.pth, but has consolidated.01.pth"),
        (spoil_params, r"feed_forward.w1.weight is \[176, 64\] over 2 shards.*\[256, 64\]"),
        (spoil_layers, r"lacks layers.2.*params.json describes 3 layers"),
        (spoil_unknown_param, "params.json: moe"),
        (spoil_tokenizer, "tokenizer.model; put it there"),
        (
            spoil_norm,
            "norm.weight of .*consolidated.01.pth differs from that of consolidated.00.pth",
        ),
    ],
)
def test_convert_bad_input_is_named_and_leaves_nothing(
    write_meta: Callable[..., Path],
    tmp_path: Path,
    spoil: Callable[[Path], None],
    message: str,
) -> None:
    source = write_meta(2)
    spoil(source)
    with pytest.raises(ValueError, match=message):
        convert_weights(config(source, tmp_path / "hf"))
    assert not (tmp_path / "hf").exists()


def test_convert_refuses_a_target_with_other_things_and_unknown_originals(
    write_meta: Callable[..., Path], tmp_path: Path
) -> None:
    source = write_meta(1)
    good = config(source, tmp_path / "hf")
    with pytest.raises(ValueError, match=r"require_originals: consolidated\.00\.pth"):
        convert_weights(replace(good, require_originals=True))
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="exists and is not empty"):
        convert_weights(good)
    assert (tmp_path / "hf" / "thesis.tex").read_text() == "x"


def test_convert_to_meta_refuses_more_shards_than_heads(
    make_llama: MakeModel, tmp_path: Path
) -> None:
    make_llama().save_pretrained(tmp_path / "hf")
    with pytest.raises(ValueError, match="num_shards: 4 heads cannot be split into 8 shards"):
        convert_weights(config(tmp_path / "hf", tmp_path / "meta", to="meta", num_shards=8))
    assert not (tmp_path / "meta").exists()


def test_open_weights_damaged_files_are_named(make_llama: MakeModel, tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(open_weights(tmp_path).files) > 2
    files = sorted(tmp_path.glob("model-*.safetensors"))
    data = files[0].read_bytes()
    files[0].write_bytes(data[:-7])
    with pytest.raises(
        ValueError, match=rf"{files[0].name}: has \d+ bytes, but its header requires"
    ):
        open_weights(tmp_path)
    files[0].unlink()
    with pytest.raises(ValueError, match=f"lacks 1 of the .* the first is {files[0].name}"):
        open_weights(tmp_path)
