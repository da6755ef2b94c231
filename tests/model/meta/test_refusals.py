"""Promise: what does not convert right is refused by name, and leaves nothing.

Each message names the file or the field, what it holds and what to do.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import ConfigError, from_dict
from raytune_llama.model.meta.config import ConvertConfig
from raytune_llama.model.meta.conversion import convert_weights
from raytune_llama.model.meta.layout import MetaParams
from raytune_llama.model.meta.tiktoken_file import dump_tiktoken
from raytune_llama.tokenizer.loader import load_tokenizer
from tests.model.conftest import MakeModel
from tests.model.meta.conftest import LLAMA3, ROOT, WriteLlama3
from tests.model.meta.reference import random_tensors

Spoil = Callable[[Path], object]


def convert(source: Path, target: Path, **fields: Any) -> None:  # noqa: ANN401
    if fields.get("to") != "meta":
        fields = {"instruct": False, **fields}
    convert_weights(ConvertConfig(source=str(source), target=str(target), **fields))


@pytest.mark.parametrize("fields", [{"source": "s3://b/x"}, {"target": "s3://b/x"}])
def test_bucket_is_refused_and_not_taken_for_a_local_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"source": str(tmp_path), "target": "out", "instruct": False, **fields}
    with pytest.raises(UserError, match=r"got 's3://b/x', but only local paths are supported here"):
        convert_weights(from_dict(ConvertConfig, given))
    assert list(tmp_path.iterdir()) == []


def change_json(name: str, **values: Any) -> Spoil:  # noqa: ANN401
    """Set keys of a JSON file; None deletes."""

    def spoil(source: Path) -> None:
        content = json.loads((source / name).read_text()) | values
        kept = {key: value for key, value in content.items() if value is not None}
        (source / name).write_text(json.dumps(kept))

    return spoil


def change_params(**values: Any) -> Spoil:  # noqa: ANN401
    return change_json("params.json", **values)


def change_lines(change: Callable[[list[bytes]], list[bytes]]) -> Spoil:
    def spoil(source: Path) -> None:
        file = source / "tokenizer.model"
        file.write_bytes(b"\n".join(change(file.read_bytes().splitlines())) + b"\n")

    return spoil


def change_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    def spoil(source: Path) -> None:
        file = source / "consolidated.01.pth"
        content = torch.load(file, weights_only=True)
        content[name] = change(content[name])
        torch.save(content, file)

    return spoil


def write(name: str, content: str) -> Spoil:
    return lambda source: (source / name).write_text(content)


def cut(source: Path) -> None:
    file = source / "tokenizer.model"
    file.write_bytes(file.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut, r"tokenizer\.model: line \d+ is b'.*', not a token in base64 and its rank"),
        (change_lines(lambda lines: lines[:-1]), r"has 1199 tokens, to which LLaMA 3 adds 256"),
        (change_lines(lambda lines: lines[1:]), r"has 1199 tokens, but none of rank 0; the file"),
        (change_lines(lambda lines: [*lines, lines[300]]), r"line 1201 repeats the token b'.*' of"),
        (
            change_lines(lambda lines: [b"AAAA 0" if x.endswith(b" 0") else x for x in lines]),
            r"has no token for the byte 0x21, so that some texts have no ids",
        ),
        (write("tokenizer.model", "?"), "is neither a SentencePiece model.* nor a file of tiktok"),
        (write("tokenizer.model", ""), "is neither a SentencePiece model.* nor a file of tiktok"),
        (
            write("tokenizer.model", "version https://git-lfs.github.com/spec/v1\n"),
            r"tokenizer\.model: is a Git LFS pointer",
        ),
        (lambda source: (source / "tokenizer.model").unlink(), "has tokenizer.model; put it there"),
        (lambda source: (source / "params.json").unlink(), r"params\.json is missing; fetch it"),
        (write("params.json", "{"), r"params\.json: invalid JSON"),
        (write("params.json", "[]"), r"params\.json is not a JSON object"),
        (change_params(dim=None), r"params\.json: dim: is missing"),
        (change_params(n_layers=0), r"params\.json: n_layers: .*greater than or equal to 1"),
        (change_params(n_heads=0), r"params\.json: n_heads: .*greater than or equal to 1"),
        (change_params(n_heads=7), r"dim 64 is not an even number for each of 7 heads"),
        (change_params(n_kv_heads=3), r"8 heads cannot share 3 key-value heads"),
        (change_params(norm_eps=float("nan")), r"params\.json: norm_eps: .*finite"),
        (change_params(vocab_size=0), r"vocab_size: got 0, wanted a number of rows or -1"),
        (change_params(vocab_size=128256), r"vocab_size of .* is 128256, but output.* has 1456 r"),
        (change_params(rope_scaling_factor=32), "rope_scaling_factor is set, but use_scaled_rope"),
        (change_params(quantization_args={}), "quantization_args: the weights are quantized; use"),
        (change_params(lora_args={"rank": 16}), "lora_args: the weights are quantized, with a Lo"),
        (change_params(vision_chunk_size=448), "vision_chunk_size: the model also reads images"),
        (change_params(moe_args={"num_experts": 16}), "moe_args: the model is a LLaMA 4"),
        (change_params(use_qk_norm=True), "use_qk_norm: the model is a LLaMA 4"),
        (change_params(moe=True), "moe: the model is a mixture of experts"),
        (change_params(hidden_dim=6400), "hidden_dim: the model is a pruned LLaMA Guard"),
        (change_params(window=4), "window: this converter does not know the key, so that its mean"),
        (
            change_tensor("layers.0.attention.wq.weight", lambda tensor: tensor.to(torch.int8)),
            r"wq\.weight of .*consolidated\.01\.pth is of type torch\.int8, wanted float16, bfloat",
        ),
        (
            change_tensor("layers.0.attention.wq.weight", lambda tensor: tensor.half()),
            r"consolidated\.01\.pth is of type torch\.float16, wanted torch\.float32",
        ),
        (
            change_tensor("layers.1.feed_forward.w1.weight", lambda tensor: tensor[:, :-1]),
            r"feed_forward\.w1\.weight is .* over 2 shards, but params\.json requires",
        ),
        (
            change_tensor("layers.0.attention.wo.weight", lambda tensor: tensor.flatten()),
            r"attention\.wo\.weight is .* over 2 shards, but params\.json requires",
        ),
        (
            change_tensor("output.weight", lambda tensor: tensor[:-1]),
            r"tok_embeddings\.weight is \[1456, 64\].*requires \[1455, 64\]",
        ),
    ],
)
def test_convert_llama3_of_bad_files_is_refused_by_name(
    write_llama3: WriteLlama3, tmp_path: Path, spoil: Spoil, message: str
) -> None:
    source = write_llama3(2)
    spoil(source)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta"]


def test_convert_llama3_without_the_kind_of_model_asks_for_it(
    write_llama3: WriteLlama3, tmp_path: Path
) -> None:
    source = write_llama3()
    with pytest.raises(ValueError, match=r"instruct: .* set instruct=true .* or instruct=false"):
        convert(source, tmp_path / "hf", instruct=None)
    assert not (tmp_path / "hf").exists()


def test_convert_scaled_rope_to_no_more_than_its_original_context_is_refused(
    write_llama3: WriteLlama3, tmp_path: Path
) -> None:
    source = write_llama3(use_scaled_rope=True)
    with pytest.raises(ValueError, match=r"max_position_embeddings: got 4096, but .* of 8192 tok"):
        convert(source, tmp_path / "hf", max_position_embeddings=4096)


def test_convert_scaled_rope_of_unknown_factor_asks_for_it(
    write_llama3: WriteLlama3, tmp_path: Path
) -> None:
    # The sizes of LLaMA 3.2 1B, with an output matrix of its own.
    sizes = {"dim": 2048, "n_layers": 16, "n_heads": 2, "n_kv_heads": 1}
    source = write_llama3(**LLAMA3 | {"dim": 16, "n_layers": 1, "use_scaled_rope": True})
    values = {**json.loads((source / "params.json").read_text()), **sizes}
    values |= {"ffn_dim_multiplier": 0.001, "multiple_of": 1}
    (source / "params.json").write_text(json.dumps(values))
    params = MetaParams(**values)
    tensors = random_tensors(params, params.vocab_size, dtype=torch.float16)
    torch.save(tensors, source / "consolidated.00.pth")
    with pytest.raises(ValueError, match=r"factor 32.*factor 8.*add the rope_scaling_factor"):
        convert(source, tmp_path / "hf")


def write_llama2(folder: Path, rows: int, piece_model: Path, **fields: Any) -> Path:  # noqa: ANN401
    values = {"dim": 16, "n_layers": 1, "n_heads": 2, "multiple_of": 16, "vocab_size": -1, **fields}
    folder.mkdir()
    torch.save(random_tensors(MetaParams(**values), rows), folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(values))
    shutil.copyfile(piece_model, folder / "tokenizer.model")
    return folder


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        (128256, {"vocab_size": 128256}, r"SentencePiece model of 360 tokens, but .* 128256 rows"),
        (403, {}, r"360 tokens, but output\.weight has 403 rows;.* or set vocab_size to 403"),
        (300, {}, r"360 tokens, but output\.weight has 300 rows; put the model's own"),
        (300, {"vocab_size": 300}, r"360 tokens, but output\.weight has 300 rows"),
        (360, {"use_scaled_rope": True}, r"use_scaled_rope, as only LLaMA 3 does, but the token"),
    ],
)
def test_convert_sentencepiece_of_another_model_is_refused(
    tmp_path: Path, piece_model: Path, rows: int, fields: dict[str, Any], message: str
) -> None:
    source = write_llama2(tmp_path / "meta", rows, piece_model, **fields)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "hf", instruct=None)
    assert not (tmp_path / "hf").exists()


def test_convert_sentencepiece_with_rows_that_have_no_token_keeps_them(
    tmp_path: Path, piece_model: Path
) -> None:
    source = write_llama2(tmp_path / "meta", 403, piece_model, vocab_size=403)
    convert(source, tmp_path / "hf", instruct=None)
    (tmp_path / "hf" / "manifest.json").unlink()
    convert(tmp_path / "hf", tmp_path / "pth", to="meta")
    convert(tmp_path / "pth", tmp_path / "back", instruct=None)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["vocab_size"] == 403


def test_convert_sentencepiece_after_rows_were_added_records_their_number(
    tmp_path: Path, piece_model: Path
) -> None:
    source = write_llama2(tmp_path / "meta", 360, piece_model)
    convert(source, tmp_path / "hf", instruct=None)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    model.resize_token_embeddings(370, mean_resizing=False)
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "pth", to="meta")
    # The original's -1 would mean the 360 pieces of the tokenizer.
    assert json.loads((tmp_path / "pth" / "params.json").read_text())["vocab_size"] == 370


def test_convert_sentencepiece_as_an_instruct_model_is_refused(
    tmp_path: Path, piece_model: Path
) -> None:
    source = write_llama2(tmp_path / "meta", 360, piece_model)
    with pytest.raises(ValueError, match=r"instruct: is only for LLaMA 3, but .* SentencePiece"):
        convert(source, tmp_path / "hf", instruct=True)


def change_engine(**changes: Any) -> Spoil:  # noqa: ANN401
    """Change sections of tokenizer.json."""

    def spoil(source: Path) -> None:
        content = json.loads((source / "tokenizer.json").read_text())
        for section, change in changes.items():
            content[section] = change(content[section])
        (source / "tokenizer.json").write_text(json.dumps(content))

    return spoil


def renamed(tokens: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [t | {"content": "<|mine|>"} if t["id"] == 1220 else t for t in tokens]


def added(tokens: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [*tokens, tokens[-1] | {"id": 1456, "content": "<|pad|>"}]


def rope(**values: Any) -> Spoil:  # noqa: ANN401
    def spoil(source: Path) -> None:
        content = json.loads((source / "config.json").read_text())
        content["rope_parameters"] |= values
        (source / "config.json").write_text(json.dumps(content))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (rope(rope_type="linear"), r"rope_parameters: 'linear' cannot be expressed in params\.js"),
        (rope(rope_type="yarn"), r"rope_parameters: 'yarn' cannot be expressed in params\.json"),
        (rope(low_freq_factor=2.0), r"low_freq_factor: got 2\.0, but use_scaled_rope.* means 1$"),
        (rope(high_freq_factor=8.0), r"high_freq_factor: got 8\.0, but use_scaled_rope.* means 4$"),
        (
            rope(original_max_position_embeddings=4096),
            r"original_max_position_embeddings: got 4096, but .* always means 8192$",
        ),
        (
            change_json("config.json", hidden_act="gelu"),
            r"hidden_act: got 'gelu', but .* only silu",
        ),
        (change_json("config.json", head_dim=16), r"head_dim: 8 heads of 16 do not add up to"),
        (change_engine(added_tokens=renamed), r"names the id 1220 '<\|mine\|>', but Meta's code"),
        (change_engine(added_tokens=added), r"names the id 1456 '<\|pad\|>', but .* names it None"),
        (
            change_engine(normalizer=lambda _: {"type": "NFC"}),
            r"otherwise than LLaMA 3's tokenizer \(its normalizer differ\)",
        ),
        (
            change_engine(pre_tokenizer=lambda rules: rules["pretokenizers"][1]),
            r"otherwise than LLaMA 3's tokenizer \(its pre_tokenizer differ\)",
        ),
        (
            change_engine(model=lambda model: model | {"ignore_merges": False}),
            r"otherwise than LLaMA 3's tokenizer \(its ignore_merges differ\)",
        ),
        (
            change_engine(model=lambda model: model | {"merges": model["merges"][1:]}),
            r"otherwise than LLaMA 3's tokenizer \(its merges differ\)",
        ),
        (
            change_engine(model=lambda model: model | {"merges": model["merges"][::-1]}),
            r"otherwise than LLaMA 3's tokenizer \(its order of merges differ\)",
        ),
        (write("tokenizer.json", "[]"), r"tokenizer\.json is not a JSON object"),
    ],
)
def test_convert_to_meta_of_what_the_format_cannot_hold_is_refused_by_name(
    write_llama3: WriteLlama3, tmp_path: Path, spoil: Spoil, message: str
) -> None:
    convert(write_llama3(use_scaled_rope=True), tmp_path / "hf")
    spoil(tmp_path / "hf")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "hf", tmp_path / "pth", to="meta")
    assert not (tmp_path / "pth").exists()


def test_convert_to_meta_of_two_tokenizers_that_disagree_is_refused(
    write_llama3: WriteLlama3, tmp_path: Path, ranks: dict[bytes, int]
) -> None:
    convert(write_llama3(), tmp_path / "hf")
    swapped = dict(ranks)
    first, second = list(ranks)[-2:]
    swapped[first], swapped[second] = ranks[second], ranks[first]
    (tmp_path / "hf" / "tokenizer.model").write_bytes(dump_tiktoken(swapped))
    with pytest.raises(ValueError, match=r"tokenizer\.json are different tokenizers; delete the"):
        convert(tmp_path / "hf", tmp_path / "pth", to="meta")


def test_convert_to_meta_of_another_number_of_rows_is_refused(
    write_llama3: WriteLlama3, make_llama: MakeModel, tmp_path: Path
) -> None:
    convert(write_llama3(), tmp_path / "hf")
    theta = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
    make_llama(vocab_size=1460, **theta).save_pretrained(tmp_path / "hf")
    with pytest.raises(ValueError, match=r"1460 rows .* has 1456 tokens, .* exactly as many rows"):
        convert(tmp_path / "hf", tmp_path / "pth", to="meta")


def test_convert_to_meta_of_rows_that_no_shard_count_divides_is_refused(
    make_llama: MakeModel, tmp_path: Path
) -> None:
    theta = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
    make_llama(vocab_size=411, **theta).save_pretrained(tmp_path / "hf")
    with pytest.raises(ValueError, match="num_shards: 411 rows of the embedding cannot be split"):
        convert(tmp_path / "hf", tmp_path / "pth", to="meta", num_shards=2)


@pytest.mark.parametrize("kind", [None, "LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_load_tokenizer_of_metas_own_directory_names_the_conversion(
    write_llama3: WriteLlama3, kind: str | None
) -> None:
    source = write_llama3()
    if kind is not None:
        write("tokenizer_config.json", json.dumps({"tokenizer_class": kind}))(source)
    with pytest.raises(ValueError, match=r"not a SentencePiece model, .* raytune convert-weights"):
        load_tokenizer(source)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"to": "meta", "instruct": True}, "instruct: is only for to=huggingface, got to=meta"),
        ({"to": "meta", "max_position_embeddings": 9}, "max_position_embeddings: is only for to=h"),
        ({"to": "meta", "require_originals": True}, "require_originals: is only for to=huggingfa"),
        ({"num_shards": 2}, "num_shards: is only for to=meta, got to=huggingface; remove it"),
    ],
)
def test_convert_config_of_the_other_direction_is_refused(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(ConvertConfig, {"source": "a", "target": "b", **fields})


def test_command_of_a_bad_directory_prints_one_message_and_fails(
    write_llama3: WriteLlama3, tmp_path: Path
) -> None:
    source = write_llama3()
    cut(source)
    command = ["convert-weights", f"source={source}", f"target={tmp_path / 'hf'}", "instruct=false"]
    done = subprocess.run(
        [sys.executable, "-c", "from raytune_llama.cli import main; main()", *command],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr + done.stdout
    assert (done.stderr + done.stdout).count("not a token in base64") == 1
    assert not (tmp_path / "hf").exists()
