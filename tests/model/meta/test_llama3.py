"""Promise: Meta's LLaMA 3 converts with its own logits and token ids, and back to its bytes."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from raytune_llama.model.meta.config import ConvertConfig
from raytune_llama.model.meta.conversion import convert_weights
from raytune_llama.model.meta.layout import MetaParams
from raytune_llama.tokenizer.hard_texts import hard_texts
from raytune_llama.tokenizer.loader import encode_text, load_reference_encoder, load_tokenizer
from tests.model.meta.conftest import WriteLlama3, real_texts
from tests.model.meta.reference import contents, meta_encoding, meta_logits, random_tensors

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
SCALED = {"use_scaled_rope": True}

NAMED_3 = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    2: "<|reserved_special_token_0|>",
    4: "<|reserved_special_token_2|>",
    5: "<|reserved_special_token_3|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|reserved_special_token_4|>",
    9: "<|eot_id|>",
    10: "<|reserved_special_token_5|>",
    255: "<|reserved_special_token_250|>",
}
NAMED_31 = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    3: "<|reserved_special_token_1|>",
    4: "<|finetune_right_pad_id|>",
    5: "<|reserved_special_token_2|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
    11: "<|reserved_special_token_3|>",
    255: "<|reserved_special_token_247|>",
}
"""Control tokens by their place, as the tokenizers of the releases have them."""


def config(source: Path, target: Path, **fields: Any) -> ConvertConfig:  # noqa: ANN401
    if fields.get("to") != "meta":
        fields = {"instruct": False, **fields}
    return ConvertConfig(source=str(source), target=str(target), **fields)


@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize(
    ("fields", "factors"),
    [
        ({}, (None, None)),
        (SCALED, (8.0, 32.0)),
        (SCALED | {"rope_scaling_factor": 16.0}, (16.0, 16.0)),
    ],
)
def test_convert_llama3_gives_the_logits_of_metas_own_computation(
    write_llama3: WriteLlama3,
    tmp_path: Path,
    num_shards: int,
    fields: dict[str, Any],
    factors: Any,  # noqa: ANN401 - of an untied and a tied model
    *,
    is_tied: bool,
) -> None:
    source = write_llama3(num_shards, is_tied=is_tied, **fields)
    convert_weights(config(source, tmp_path / "hf"))
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert model.config.tie_word_embeddings is is_tied
    params = MetaParams(**json.loads((source / "params.json").read_text()))
    weights = random_tensors(params, params.vocab_size, dtype=torch.float32, is_tied=is_tied)
    # Frequencies that scaling changes turn by little per position.
    ids = torch.randint(params.vocab_size, (1000,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = model(ids[None]).logits[0]
    wanted = meta_logits(weights, params, ids, factors[is_tied])
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    other = 32.0 if factors[is_tied] == 8.0 else 8.0
    assert (meta_logits(weights, params, ids, other) - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("fields", [{}, SCALED, SCALED | {"rope_scaling_factor": 32.0}])
@pytest.mark.parametrize(("num_shards", "is_tied"), [(1, False), (2, False), (4, True)])
def test_convert_llama3_there_and_back_gives_every_byte(
    write_llama3: WriteLlama3,
    tmp_path: Path,
    fields: dict[str, Any],
    num_shards: int,
    *,
    is_tied: bool,
) -> None:
    source = write_llama3(num_shards, is_tied=is_tied, dtype=torch.bfloat16, **fields)
    convert_weights(config(source, tmp_path / "hf"))
    convert_weights(config(tmp_path / "hf", tmp_path / "back", to="meta", num_shards=num_shards))
    for ours, theirs in zip(contents(tmp_path / "back"), contents(source), strict=True):
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype
            assert torch.equal(ours[name], tensor), name
    params = [json.loads((d / "params.json").read_text()) for d in (tmp_path / "back", source)]
    assert params[0] == params[1]
    name = "tokenizer.model"
    assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("is_tied", [False, True])
def test_convert_model_directory_to_meta_and_back_keeps_config_tokenizer_and_weights(
    write_llama3: WriteLlama3, tmp_path: Path, factor: float, *, is_tied: bool
) -> None:
    source = write_llama3(2, is_tied=is_tied, **SCALED, rope_scaling_factor=factor)
    convert_weights(config(source, tmp_path / "hf", instruct=True))
    # A directory that was not converted here: nothing is known but what transformers reads.
    (tmp_path / "hf" / "manifest.json").unlink()
    convert_weights(config(tmp_path / "hf", tmp_path / "pth", to="meta", num_shards=2))
    params = json.loads((tmp_path / "pth" / "params.json").read_text())
    assert (params["use_scaled_rope"], params["rope_scaling_factor"]) == (True, factor)
    # A constant of LLaMA 1 and 2, which would contradict the scaling.
    assert all("rope.freqs" not in content for content in contents(tmp_path / "pth"))
    convert_weights(config(tmp_path / "pth", tmp_path / "back", instruct=True))
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert names == {path.name for path in (tmp_path / "back").iterdir()} - {"manifest.json"}
    assert "tokenizer.model" not in names
    for name in names:
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


def control_names(tokenizer: Any, first: int) -> list[str]:  # noqa: ANN401
    return [tokenizer.convert_ids_to_tokens(first + place) for place in range(256)]


@pytest.mark.parametrize(("fields", "named"), [({}, NAMED_3), (SCALED, NAMED_31)])
def test_convert_llama3_names_control_tokens_as_the_releases_do(
    write_llama3: WriteLlama3,
    tmp_path: Path,
    ranks: dict[bytes, int],
    fields: dict[str, Any],
    named: dict[int, str],
) -> None:
    convert_weights(config(write_llama3(**fields), tmp_path / "hf"))
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert len(tokenizer) == len(ranks) + 256
    names = control_names(tokenizer, len(ranks))
    assert {place: names[place] for place in named} == named
    assert len(set(names)) == 256
    assert tokenizer.decode(range(len(ranks), len(ranks) + 256), skip_special_tokens=True) == ""


def test_convert_llama3_tokenizer_gives_the_ids_of_tiktoken(
    write_llama3: WriteLlama3, tmp_path: Path, ranks: dict[bytes, int]
) -> None:
    convert_weights(config(write_llama3(**SCALED), tmp_path / "hf"))
    tokenizer = load_tokenizer(tmp_path / "hf")
    plain: Any = AutoTokenizer.from_pretrained(tmp_path / "hf")
    wanted = meta_encoding(ranks, control_names(plain, len(ranks)))
    vocabulary = [token.decode(errors="replace") for token in ranks]
    texts = [*real_texts(), *hard_texts(NAMED_31.values(), vocabulary)]
    expected = [wanted.encode(text, disallowed_special=()) for text in texts]
    assert encode_text(tokenizer, texts) == expected
    encoder = load_reference_encoder(tmp_path / "hf")
    assert [ids.tolist() for ids in encoder.encode(texts)] == expected
    # transformers' own call matches control tokens in a text, as tiktoken does when allowed to.
    with_controls = [[len(ranks), *wanted.encode(text, allowed_special="all")] for text in texts]
    assert plain(texts)["input_ids"] == with_controls
    for text, ids in zip(texts, expected, strict=True):
        assert plain.decode(ids) == wanted.decode(ids) == text


@pytest.mark.parametrize(
    ("fields", "instruct", "ends"),
    [({}, False, [1]), ({}, True, [1, 9]), (SCALED, False, [1]), (SCALED, True, [1, 8, 9])],
)
def test_convert_llama3_ends_texts_as_the_kind_of_model_does(
    write_llama3: WriteLlama3,
    tmp_path: Path,
    ranks: dict[bytes, int],
    fields: dict[str, Any],
    ends: list[int],
    *,
    instruct: bool,
) -> None:
    convert_weights(config(write_llama3(**fields), tmp_path / "hf", instruct=instruct))
    generation: Any = GenerationConfig.from_pretrained(tmp_path / "hf")
    found = generation.eos_token_id
    assert (found if isinstance(found, list) else [found]) == [len(ranks) + place for place in ends]
    assert generation.bos_token_id == len(ranks)
    tokenizer = load_tokenizer(tmp_path / "hf")
    assert (tokenizer.bos_token, tokenizer.eos_token) == (BEGIN, "<|eot_id|>" if instruct else END)
    assert (tokenizer.chat_template is not None) is instruct
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert settings["max_position_embeddings"] == (131072 if fields else 8192)


def test_convert_instruct_template_gives_the_ids_of_metas_chat_format(
    write_llama3: WriteLlama3, tmp_path: Path, ranks: dict[bytes, int]
) -> None:
    convert_weights(config(write_llama3(**SCALED), tmp_path / "hf", instruct=True))
    tokenizer = load_tokenizer(tmp_path / "hf")
    encoding = meta_encoding(ranks, control_names(tokenizer, len(ranks)))
    dialog = [
        {"role": "system", "content": " 你是一个助手。\n"},
        {"role": "user", "content": "Why is the sky blue?  \n\n"},
        {"role": "assistant", "content": "\tRayleigh scattering: it's 1/λ⁴."},
        {"role": "user", "content": "Thanks!"},
    ]

    def header(role: str) -> list[int]:
        text = encoding.encode(role), encoding.encode("\n\n")
        return [len(ranks) + 6, *text[0], len(ranks) + 7, *text[1]]

    wanted = [len(ranks)]
    for message in dialog:
        ids = encoding.encode(message["content"].strip())
        wanted += [*header(message["role"]), *ids, len(ranks) + 9]
    got: Any = tokenizer.apply_chat_template(dialog, return_dict=False)
    assert got == wanted
    got = tokenizer.apply_chat_template(dialog, add_generation_prompt=True, return_dict=False)
    assert got == wanted + header("assistant")


def test_convert_llama3_without_a_theta_takes_that_of_metas_code(
    write_llama3: WriteLlama3, tmp_path: Path
) -> None:
    source = write_llama3()
    values = json.loads((source / "params.json").read_text())
    del values["rope_theta"]
    (source / "params.json").write_text(json.dumps(values))
    convert_weights(config(source, tmp_path / "hf"))
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert settings["rope_parameters"]["rope_theta"] == 500000.0


@pytest.mark.parametrize("num_shards", [1, 2])
def test_convert_an_output_that_differs_from_the_embedding_in_one_row_keeps_both(
    write_llama3: WriteLlama3, tmp_path: Path, num_shards: int
) -> None:
    source = write_llama3(num_shards, is_tied=True)
    file = max(source.glob("*.pth"))
    content = torch.load(file, weights_only=True)
    content["output.weight"][-1, 3] += 1
    torch.save(content, file)
    convert_weights(config(source, tmp_path / "hf"))
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert not model.config.tie_word_embeddings
    difference = model.lm_head.weight - model.model.embed_tokens.weight
    assert difference.nonzero().tolist() == [[len(difference) - 1, 3]]


def test_convert_to_meta_after_a_change_of_config_writes_the_new_params(
    write_llama3: WriteLlama3, tmp_path: Path
) -> None:
    convert_weights(config(write_llama3(**SCALED), tmp_path / "hf"))
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    settings["rope_parameters"]["factor"] = 12.0
    (tmp_path / "hf" / "config.json").write_text(json.dumps(settings))
    convert_weights(config(tmp_path / "hf", tmp_path / "pth", to="meta"))
    assert json.loads((tmp_path / "pth" / "params.json").read_text())["rope_scaling_factor"] == 12.0


def test_convert_to_meta_reads_merges_in_the_form_of_the_releases(
    write_llama3: WriteLlama3, tmp_path: Path
) -> None:
    source = write_llama3(**SCALED)
    convert_weights(config(source, tmp_path / "hf"))
    # Before 2024 a merge was one string; offsets do not change ids.
    content = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    content["pre_tokenizer"]["pretokenizers"][1]["trim_offsets"] = False
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(content))
    convert_weights(config(tmp_path / "hf", tmp_path / "pth", to="meta"))
    written = (tmp_path / "pth" / "tokenizer.model").read_bytes()
    assert written == (source / "tokenizer.model").read_bytes()


def test_convert_to_meta_writes_a_tokenizer_model_that_tiktoken_reads(
    write_llama3: WriteLlama3, tmp_path: Path, ranks: dict[bytes, int]
) -> None:
    convert_weights(config(write_llama3(), tmp_path / "hf"))
    convert_weights(config(tmp_path / "hf", tmp_path / "pth", to="meta"))
    lines = (tmp_path / "pth" / "tokenizer.model").read_text().splitlines()
    read = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines}
    assert read == ranks
