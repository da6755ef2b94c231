"""Promise: training the embeddings trains just them; all else keeps every bit."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from raytune_llama.model.config import EmbeddingsConfig, ModelConfig
from raytune_llama.model.directory import stored_tables, write_with_trained_tables
from raytune_llama.model.embeddings import check_embeddings, projection_weight, train_embeddings
from raytune_llama.model.llama import SummedLoss, build_empty_model, load_model
from raytune_llama.model.vocab import is_tied, new_ids
from raytune_llama.tokenizer.loader import load_tokenizer
from tests.model.conftest import MakeModel

IDS = torch.tensor([[5, 401, 7, 399, 402, 409, 401]])
NEW = range(400, 403)
"""Ids taken for new: behind them the models have surplus rows."""
ROWS = EmbeddingsConfig(new_rows_only=True)
BOTH = EmbeddingsConfig(new_rows_only=True, lm_head=True)


def trained_names(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def summed_loss(model: nn.Module) -> torch.Tensor:
    return SummedLoss(model)(IDS[:, :-1], torch.arange(IDS.shape[1] - 1)[None], IDS[:, 1:])


def count_trained(config: EmbeddingsConfig) -> int:
    """Count on a 7B LLaMA with Chinese-LLaMA's vocabulary, which takes no memory."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=49_953))
    train_embeddings(model, config, range(32_000, 49_953))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_train_embeddings_of_7b_trains_as_many_parameters_as_the_seeds() -> None:
    assert count_trained(EmbeddingsConfig()) == 49_953 * 4096 == 204_607_488
    assert count_trained(EmbeddingsConfig(lm_head=True)) == 2 * 204_607_488
    assert count_trained(ROWS) == 17_953 * 4096 == 73_535_488
    assert count_trained(BOTH) == 2 * 73_535_488


@pytest.mark.parametrize(
    ("tied", "lm_head", "names"),
    [
        (True, False, ["model.embed_tokens"]),
        (True, True, ["model.embed_tokens"]),
        (False, False, ["model.embed_tokens"]),
        (False, True, ["model.embed_tokens", "lm_head"]),
    ],
)
def test_train_embeddings_trains_the_tables_that_were_chosen(
    make_llama: MakeModel, *, tied: bool, lm_head: bool, names: list[str]
) -> None:
    for new_rows_only, last in ((False, "weight"), (True, "new_rows")):
        model = make_llama(tie_word_embeddings=tied)
        config = EmbeddingsConfig(lm_head=lm_head, new_rows_only=new_rows_only)
        train_embeddings(model, config, NEW)
        assert trained_names(model) == [f"{name}.{last}" for name in names]
        assert is_tied(model) == tied


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("config", [ROWS, BOTH])
def test_new_rows_apart_change_no_logit_and_have_the_gradient_of_the_whole_table(
    make_llama: MakeModel, config: EmbeddingsConfig, *, tied: bool
) -> None:
    whole, parted = (make_llama(tie_word_embeddings=tied) for _ in range(2))
    train_embeddings(parted, config, NEW)
    with torch.no_grad():
        assert torch.equal(parted(IDS).logits, whole(IDS).logits)
    losses = [summed_loss(model) for model in (whole, parted)]
    assert losses[0].item() == losses[1].item()
    for loss in losses:
        loss.backward()
    wanted: Any = dict(whole.named_parameters())
    for name, parameter in parted.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
            continue
        gradient = wanted[name.replace("new_rows", "weight")].grad[NEW.start : NEW.stop]
        assert gradient.abs().max() > 0
        torch.testing.assert_close(parameter.grad, gradient)


def test_new_rows_apart_are_read_by_both_layers_of_a_tied_model(make_llama: MakeModel) -> None:
    model = make_llama(tie_word_embeddings=True)
    train_embeddings(model, ROWS, NEW)
    rows = next(p for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        rows.fill_(2.0)
        table = projection_weight(model)
        assert torch.equal(model.get_input_embeddings()(torch.arange(410)), table)
    assert (table[NEW.start : NEW.stop] == 2).all()
    untouched = projection_weight(make_llama(tie_word_embeddings=True))
    assert torch.equal(table[: NEW.start], untouched[: NEW.start])
    assert torch.equal(table[NEW.stop :], untouched[NEW.stop :])


def test_check_embeddings_new_rows_need_new_ids_and_plain_layers(make_llama: MakeModel) -> None:
    class Scaled(nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # as torch has it
            return 2 * super().forward(input)

    model = make_llama()
    assert check_embeddings(model, EmbeddingsConfig(), range(0)) == []
    (problem,) = check_embeddings(model, ROWS, range(0))
    assert problem.startswith("embeddings.new_rows_only: got true")
    with pytest.raises(ValueError, match=r"^embeddings\.new_rows_only: "):
        train_embeddings(model, ROWS, range(0))
    model.set_input_embeddings(Scaled(410, 16))
    (problem,) = check_embeddings(model, ROWS, NEW)
    assert "model.embed_tokens is a Scaled" in problem
    assert check_embeddings(model, EmbeddingsConfig(), NEW) == []


def cast_to(model: nn.Module, dtype: torch.dtype) -> Any:  # noqa: ANN401  # of the same class
    return model.to(dtype)


def save(model: PreTrainedModel, path: Path, tokenizer: Path, **options: Any) -> Path:  # noqa: ANN401
    model.save_pretrained(path, **options)
    load_tokenizer(tokenizer).save_pretrained(path)
    return path


@pytest.fixture
def grown_dir(tmp_path: Path, tokenizer_dir: Path) -> Path:
    """A tokenizer with 15 ids more: five beyond the rows of the models here."""
    tokenizer = copy.deepcopy(load_tokenizer(tokenizer_dir))
    tokenizer.add_tokens([f"<{number}>" for number in range(15)])
    tokenizer.save_pretrained(tmp_path / "grown")
    return tmp_path / "grown"


def write(base: Path, tokenizer: Path, config: EmbeddingsConfig, folder: Path) -> PreTrainedModel:
    """Load a base for training, double what is trained of it, write it; return what was trained."""
    settings = ModelConfig(path=str(base), tokenizer=str(tokenizer))
    model = load_model(settings, "fp32", torch.device("cpu"))
    train_embeddings(model, config, new_ids(base, tokenizer))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(2)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    folder.mkdir()
    norms = write_with_trained_tables(model, base, tokenizer, trained, folder)
    assert norms == {name: pytest.approx(tensor.norm().item()) for name, tensor in trained.items()}
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("config", [EmbeddingsConfig(), ROWS, BOTH])
def test_write_with_tables_is_the_trained_model_in_plain_transformers(
    make_llama: MakeModel,
    tokenizer_dir: Path,
    grown_dir: Path,
    tmp_path: Path,
    config: EmbeddingsConfig,
    *,
    tied: bool,
) -> None:
    base = save(make_llama(tie_word_embeddings=tied), tmp_path / "base", tokenizer_dir)
    model = write(base, grown_dir, config, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.vocab_size == 415
    assert is_tied(loaded) == tied
    ids = torch.arange(300, 415)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("config", [ROWS, BOTH])
def test_write_with_tables_of_a_model_that_was_grown_before_has_its_trained_rows(
    make_llama: MakeModel, grown_dir: Path, tmp_path: Path, config: EmbeddingsConfig
) -> None:
    """Its own tokenizer has all ids; the manifest tells which of them no training has seen."""
    base = save(make_llama(vocab_size=415), tmp_path / "base", grown_dir)
    (base / "manifest.json").write_text(json.dumps({"expanded": {"num_old_ids": 400}}))
    model = write(base, base, config, tmp_path / "out")
    before, after = (
        AutoModelForCausalLM.from_pretrained(path).model.embed_tokens.weight
        for path in (base, tmp_path / "out")
    )
    assert torch.equal(after[:400], before[:400])
    assert torch.equal(after[400:], 2 * before[400:])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(300, 415)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_write_with_tables_keeps_precision_shards_and_every_other_bit(
    make_llama: MakeModel, tokenizer_dir: Path, grown_dir: Path, tmp_path: Path
) -> None:
    model = make_llama(tie_word_embeddings=False)
    base = save(
        cast_to(model, torch.bfloat16), tmp_path / "base", tokenizer_dir, max_shard_size="10KB"
    )
    assert len(list(base.glob("*.safetensors"))) > 1
    write(base, grown_dir, ROWS, tmp_path / "out")
    before = {k: t for file in base.glob("*.safetensors") for k, t in load_file(file).items()}
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert set(after) == set(before)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    for name, tensor in before.items():
        rows = 400 if name in {"model.embed_tokens.weight", "lm_head.weight"} else len(tensor)
        assert torch.equal(after[name][:rows], tensor[:rows])
    settings = [json.loads((path / "config.json").read_text()) for path in (base, tmp_path / "out")]
    # The base's config.json names other control tokens than its tokenizer has.
    assert settings[1] == settings[0] | {"vocab_size": 415, "bos_token_id": 0, "eos_token_id": 1}
    assert (tmp_path / "out" / "generation_config.json").is_file()


def test_write_with_tables_writes_a_tied_table_under_each_stored_name(
    make_llama: MakeModel, tokenizer_dir: Path, tmp_path: Path
) -> None:
    base = save(make_llama(tie_word_embeddings=True), tmp_path / "base", tokenizer_dir)
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    write(base, base, EmbeddingsConfig(), tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    doubled = 2 * weights["lm_head.weight"]
    assert torch.equal(after["lm_head.weight"], doubled)
    assert torch.equal(after["model.embed_tokens.weight"], doubled)


def test_write_with_tables_of_a_model_saved_without_its_head_finds_its_names(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=410, hidden_size=16, n_layer=1, n_head=2))
    base = save(model, tmp_path / "base", tokenizer_dir)
    weights = load_file(base / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    assert stored_tables(build_empty_model(base), base) == {
        "word_embeddings.weight": "transformer.word_embeddings.weight"
    }
    trained = write(base, base, EmbeddingsConfig(), tmp_path / "out").eval()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, trained(IDS).logits)


def test_write_with_tables_what_the_precision_of_the_base_cannot_hold_is_refused(
    make_llama: MakeModel, tokenizer_dir: Path, tmp_path: Path
) -> None:
    base = save(cast_to(make_llama(), torch.float16), tmp_path / "base", tokenizer_dir)
    trained = {"model.embed_tokens.weight": torch.full((410, 16), 1e6)}
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"^model\.embed_tokens\.weight: is not finite"):
        write_with_trained_tables(build_empty_model(base), base, base, trained, tmp_path / "out")
