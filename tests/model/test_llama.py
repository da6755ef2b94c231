"""Promises: the training loss is the model's own, documents are apart, weights are not copied."""

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from raytune_llama.model.config import LoraConfig, ModelConfig, Precision
from raytune_llama.model.llama import (
    SummedLoss,
    build_empty_model,
    check_model_directory,
    check_output_projection,
    choose_attention,
    load_model,
    model_settings,
)
from raytune_llama.model.lora import attach_adapter
from raytune_llama.model.loss import IGNORE_INDEX
from raytune_llama.storage.hashes import hash_file
from tests.hub_server import HubServer
from tests.model.conftest import MakeModel

CPU = torch.device("cpu")


def document(num: int, *, rows: int = 410, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(rows, (num,), generator=generator)


def labels_of(ids_T: Tensor) -> Tensor:
    """Return the next token of each; the last one has none."""
    return torch.cat([ids_T[1:], ids_T.new_tensor([IGNORE_INDEX])])


def loss_of(model: nn.Module, *documents: Tensor, restart: bool = True) -> Tensor:
    """Return the summed loss of documents packed into one sequence."""
    ids_T, labels_T = torch.cat(documents), torch.cat([labels_of(ids) for ids in documents])
    positions = [torch.arange(len(ids)) for ids in documents]
    positions_T = torch.cat(positions) if restart else torch.arange(len(ids_T))
    return SummedLoss(model)(ids_T[None], positions_T[None], labels_T[None])


def own_loss_of(model: PreTrainedModel, ids_T: Tensor) -> Tensor:
    """Return the loss from the model's own logits."""
    return nn.functional.cross_entropy(
        model(ids_T[None]).logits[0], labels_of(ids_T), reduction="sum", ignore_index=IGNORE_INDEX
    )


@pytest.fixture(scope="module")
def bloom() -> BloomForCausalLM:
    torch.manual_seed(0)
    return BloomForCausalLM(
        BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.3)
    ).eval()


@pytest.fixture(scope="module")
def qwen() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    return Qwen2ForCausalLM(config).eval()


@pytest.mark.parametrize("tied", [True, False])
def test_loss_of_a_model_equals_that_of_its_own_logits(
    make_llama: MakeModel, *, tied: bool
) -> None:
    model = make_llama(tie_word_embeddings=tied)
    ids_T = document(20)
    losses = [loss_of(model, ids_T), own_loss_of(model, ids_T)]
    weights = list(model.parameters())
    torch.testing.assert_close(*losses)
    for mine, own in zip(*(torch.autograd.grad(loss, weights) for loss in losses), strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bloom", "qwen"])
def test_loss_of_other_families_equals_that_of_their_own_logits(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model: PreTrainedModel = request.getfixturevalue(family)
    assert check_output_projection(model) == []
    model.save_pretrained(tmp_path)
    assert check_model_directory(tmp_path) == []
    loaded = load_model(ModelConfig(path=str(tmp_path)), "fp32", CPU)
    ids_T = document(20, rows=64)
    torch.testing.assert_close(loss_of(loaded, ids_T), own_loss_of(model, ids_T))


def test_model_on_the_hub_is_loaded_from_its_copy_on_this_node(
    make_llama: MakeModel, tmp_path: Path, hub: HubServer
) -> None:
    model = make_llama()
    model.save_pretrained(tmp_path / "model")
    files = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    config = ModelConfig(path=f"hf://org/tiny@{hub.publish('org/tiny', files)}")
    ids_T = document(20)
    assert model_settings(config) == {}
    assert loss_of(load_model(config, "fp32", CPU), ids_T) == loss_of(model, ids_T)


def test_loss_of_packed_documents_equals_their_losses_alone(make_llama: MakeModel) -> None:
    model = make_llama()
    documents = [document(num, seed=num) for num in (9, 1, 14)]
    with torch.no_grad():
        alone = sum(loss_of(model, ids) for ids in documents)
        packed = loss_of(model, *documents)
        plain = loss_of(model, *documents, restart=False)
    torch.testing.assert_close(packed, alone)
    assert abs(plain - alone) > 1e-3 * abs(plain)


def test_loss_of_a_packed_document_does_not_depend_on_one_bit_of_another(
    make_llama: MakeModel,
) -> None:
    model = make_llama()
    second = document(8)
    positions_1T = torch.arange(8).repeat(2)[None]
    labels_1T = torch.cat([torch.full((8,), IGNORE_INDEX), labels_of(second)])[None]
    with torch.no_grad():
        losses = [
            SummedLoss(model)(torch.cat([first, second])[None], positions_1T, labels_1T).item()
            for first in (document(8, seed=1), document(8, seed=2))
        ]
    assert losses[0] == losses[1]


def test_checkpointing_with_frozen_embeddings_keeps_every_gradient(make_llama: MakeModel) -> None:
    gradients: list[dict[str, Tensor]] = []
    for recompute in (False, True):
        model = make_llama()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        attached = attach_adapter(model, LoraConfig(rank=2, dropout=0.0), seed=0)
        for parameter in attached.parameters():
            if parameter.requires_grad:
                nn.init.constant_(parameter, 0.1)
        attached.train()
        loss_of(attached, document(12), document(7, seed=1)).backward()
        gradients.append(
            {name: p.grad for name, p in attached.named_parameters() if p.grad is not None}
        )
    assert len(gradients[0]) == 28
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert all(gradient.any() for gradient in gradients[0].values())


def rows_of(model: PreTrainedModel) -> Tensor:
    return dict(model.named_parameters())["model.embed_tokens.weight"]


def mapped_file(tensor: Tensor) -> str:
    """Return the file whose mapping holds a tensor's memory; empty for memory of our own."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, last = line.split(maxsplit=5)
        start, end = (int(number, 16) for number in span.split("-"))
        if start <= tensor.data_ptr() < end:
            return last if last.startswith("/") else ""
    raise AssertionError(tensor.shape)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_load_model_in_the_stored_precision_maps_the_file_and_copies_nothing(
    make_llama: MakeModel, tmp_path: Path, precision: Literal["fp32", "bf16"]
) -> None:
    make_llama().save_pretrained(tmp_path)
    model = load_model(ModelConfig(path=str(tmp_path)), precision, CPU)
    files = {mapped_file(parameter) for parameter in model.parameters()}
    # Pages of a mapped file are one copy for all processes of a node.
    shared = {str(tmp_path / "model.safetensors")}
    assert (files == shared) == (precision == "fp32")
    assert {parameter.dtype for parameter in model.parameters()} == {
        torch.float32 if precision == "fp32" else torch.bfloat16
    }


def test_load_model_with_a_larger_tokenizer_grows_in_memory_only(
    make_llama: MakeModel, tmp_path: Path, tokenizer_dir: Path
) -> None:
    make_llama().save_pretrained(tmp_path)
    shutil.copytree(tokenizer_dir, tmp_path, dirs_exist_ok=True)
    grown = tmp_path / "grown"
    shutil.copytree(tokenizer_dir, grown)
    tokenizer = json.loads((grown / "tokenizer.json").read_text())
    fox = tokenizer["added_tokens"][0] | {"id": 400, "content": "fox", "special": False}
    tokenizer["added_tokens"].append(fox)
    (grown / "tokenizer.json").write_text(json.dumps(tokenizer))
    before = hash_file(tmp_path / "model.safetensors")
    plain = load_model(ModelConfig(path=str(tmp_path)), "fp32", CPU)
    model = load_model(ModelConfig(path=str(tmp_path), tokenizer=str(grown)), "fp32", CPU)
    differs = rows_of(model).ne(rows_of(plain))
    assert differs.any(dim=1).nonzero().flatten().tolist() == [400]
    assert hash_file(tmp_path / "model.safetensors") == before
    # A model without a tokenizer of its own has enough rows, and nothing to grow from.
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    kept = load_model(ModelConfig(path=str(tmp_path), tokenizer=str(grown)), "fp32", CPU)
    assert torch.equal(rows_of(kept), rows_of(plain))


def test_load_skeleton_has_the_models_shapes_and_no_memory(
    make_llama: MakeModel, tmp_path: Path
) -> None:
    model = make_llama()
    model.save_pretrained(tmp_path)
    skeleton = dict(build_empty_model(tmp_path).named_parameters())
    assert {name: p.shape for name, p in skeleton.items()} == {
        name: p.shape for name, p in model.named_parameters()
    }
    assert all(parameter.is_meta for parameter in skeleton.values())


def test_check_model_directory_of_a_whole_model_finds_nothing(
    make_llama: MakeModel, tmp_path: Path
) -> None:
    make_llama().save_pretrained(tmp_path / "one")
    make_llama().save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert check_model_directory(tmp_path / "one") == []
    assert check_model_directory(tmp_path / "shards") == []


def test_check_model_directory_names_everything_that_is_missing(tmp_path: Path) -> None:
    [problem] = check_model_directory(tmp_path / "none")
    assert str(tmp_path / "none") in problem
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    config, weights = check_model_directory(tmp_path)
    assert "config.json" in config
    assert "model.safetensors" in weights


def test_check_model_directory_with_a_damaged_part_names_it(
    make_llama: MakeModel, tmp_path: Path
) -> None:
    make_llama().save_pretrained(tmp_path, max_shard_size="10KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3
    shards[0].unlink()
    shards[1].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    shards[2].write_bytes(shards[2].read_bytes()[:-1])
    problems = check_model_directory(tmp_path)
    assert len(problems) == 3
    for shard, problem in zip(shards, problems, strict=False):
        assert shard.name in problem
    assert "git lfs pull" in problems[1]


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": 3}'])
def test_check_model_directory_with_a_broken_index_names_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    [problem] = check_model_directory(tmp_path)
    assert "model.safetensors.index.json" in problem


def test_choose_attention_with_the_package_uses_it_on_cuda_in_half_precision_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    cuda = torch.device("cuda")
    assert choose_attention("auto", "bf16", cuda) == "flash_attention_2"
    assert choose_attention("flash_attention_2", "fp16", cuda) == "flash_attention_2"
    assert choose_attention("sdpa", "bf16", cuda) == "sdpa"
    # Asked for by name it may not fall back.
    cases: list[tuple[Precision, torch.device]] = [("bf16", CPU), ("fp32", cuda)]
    for precision, device in cases:
        assert choose_attention("auto", precision, device) == "sdpa"
        with pytest.raises(ValueError, match=rf"{device.type} in {precision}.*use auto or sdpa"):
            choose_attention("flash_attention_2", precision, device)


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="FlashAttention is here")
def test_choose_attention_by_name_without_the_package_is_refused() -> None:
    cuda = torch.device("cuda")
    assert choose_attention("auto", "bf16", cuda) == "sdpa"
    with pytest.raises(ValueError, match="flash_attn is not installed"):
        choose_attention("flash_attention_2", "bf16", cuda)


def test_check_output_projection_with_a_bias_is_refused(make_llama: MakeModel) -> None:
    model: LlamaForCausalLM = make_llama()
    assert check_output_projection(model) == []
    model.lm_head = nn.Linear(16, 410, bias=True)
    [problem] = check_output_projection(model)
    assert "LlamaForCausalLM" in problem
