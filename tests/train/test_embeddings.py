"""Promise: stage 1 trains embeddings alone, on any workers; stage 2 starts from its result."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from raytune_llama.merge.config import MergeConfig
from raytune_llama.merge.merger import merge_adapters
from raytune_llama.model.llama import SummedLoss, causal_lm, load_model
from raytune_llama.model.vocab import is_tied, new_ids
from raytune_llama.storage.place import Place
from raytune_llama.tokenizer.loader import hash_tokenizer, load_tokenizer
from raytune_llama.train.checkpoint.layout import list_checkpoints
from raytune_llama.train.config import PretrainConfig
from raytune_llama.train.engines.protocol import trained_parameters
from raytune_llama.train.export import read_result
from raytune_llama.train.loop import open_session, read_batches, train_step
from raytune_llama.train.monitoring.metrics import EVAL_LOSS, GRAD_NORM
from raytune_llama.train.process_group import ProcessGroup
from tests.train.conftest import MakeConfig, curve, problems_of, run_here, stage_fields
from tests.train.group import Group
from tests.train.saved import hashes_of

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NEW_ROWS = {"new_rows_only": True}
BOTH = {"new_rows_only": True, "lm_head": True}
SAME = 1e-5
"""Relative difference allowed between worker counts and stages in fp32."""


@pytest.fixture
def make_stage_1(make_config: MakeConfig, grown_tokenizer: Path, grown_store: Path) -> MakeConfig:
    """Build the config of a run of six steps that trains embeddings; weights decay fast."""

    def make(name: str = "stage1", **fields: Any) -> PretrainConfig:  # noqa: ANN401
        values: dict[str, Any] = {
            "train": "embeddings",
            "lora": None,
            "model__tokenizer": str(grown_tokenizer),
            "data__store_dir": str(grown_store),
            "optim": {"learning_rate": 0.02, "weight_decay": 1.0},
        }
        return make_config(name, **(values | fields))

    return make


def written(config: PretrainConfig) -> dict[str, Tensor]:
    return load_file(Path(config.run_dir, "pt_model", "model.safetensors"))


def old_rows(config: PretrainConfig) -> Tensor:
    """Return the rows of the base that no new id names, in the order of the ids."""
    ids = new_ids(Path(config.model.path), Path(config.model.tokenizer_path))
    table = load_file(Path(config.model.path, "model.safetensors"))[EMBEDDING]
    return table[: ids.start]


def whole_tensor(parameter: Tensor, stage: int) -> Tensor:
    if stage < 3:
        return parameter.detach().clone()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


@pytest.mark.parametrize(
    ("stage", "precision"),
    [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (2, "bf16"), (3, "bf16")],
)
def test_new_rows_steps_with_decay_and_moments_keep_every_other_bit(
    make_stage_1: MakeConfig, stage: int, precision: str
) -> None:
    config = make_stage_1(embeddings=NEW_ROWS, engine__precision=precision, **stage_fields(stage))
    session = open_session(config, ProcessGroup.single_process())
    lm = causal_lm(session.engine.module.model)
    before = {name: whole_tensor(p, stage) for name, p in lm.named_parameters()}
    for batch in read_batches(session, 0):
        assert train_step(session, batch, 1)[0].was_applied
    names = [name for name, _ in trained_parameters(session.engine.module)]
    assert names == ["model.embed_tokens.new_rows"]
    after = {name: whole_tensor(p, stage) for name, p in lm.named_parameters()}
    changed = [name for name, tensor in after.items() if not torch.equal(tensor, before[name])]
    assert changed == names
    assert torch.equal(after[EMBEDDING][:400], old_rows(config).to(after[EMBEDDING].dtype))
    assert (after[names[0]] != before[names[0]]).any(dim=1).all()


# Stage 1 has the optimizer of stage 2; that it moves no other bit, the test above tries.
@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_new_rows_of_both_tables_on_two_workers_equal_one_worker(
    make_stage_1: MakeConfig, two: Group, untied_model_dir: Path, stage: int
) -> None:
    fields = {"embeddings": BOTH, "model__path": str(untied_model_dir)}
    # Clipped in every step: the norm decides how far the rows go.
    fields |= {"optim__max_grad_norm": 0.1, "optim__epsilon": 1e-3}
    reference = make_stage_1("reference", **fields)
    run_here(reference)
    config = make_stage_1("two", **fields, **stage_fields(stage))
    two.run(config)
    assert curve(config) == pytest.approx(curve(reference), rel=SAME)
    assert curve(config, GRAD_NORM) == pytest.approx(curve(reference, GRAD_NORM), rel=1e-4)
    base = load_file(untied_model_dir / "model.safetensors")
    ours, wanted = written(config), written(reference)
    for name in (EMBEDDING, HEAD):
        assert torch.equal(ours[name][:400], base[name][:400])
        torch.testing.assert_close(ours[name], wanted[name], rtol=1e-4, atol=1e-5)
        assert (ours[name][400:410] != base[name][400:]).any(dim=1).all()


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_gradient_norm_is_that_of_the_trained_rows_alone(
    make_stage_1: MakeConfig, untied_model_dir: Path, *, tied: bool
) -> None:
    path = {} if tied else {"model__path": str(untied_model_dir)}
    config = make_stage_1(embeddings=NEW_ROWS, **path)
    batch = next(iter(read_batches(open_session(config, ProcessGroup.single_process()), 0)))
    model = load_model(config.model, "fp32", torch.device("cpu"))
    for part in batch.micro_batches:
        SummedLoss(model)(part.ids_BT, part.positions_BT, part.labels_BT).backward()
    gradient = model.get_input_embeddings().weight.grad
    assert isinstance(gradient, Tensor)
    num_targets = sum(int((part.labels_BT != -100).sum()) for part in batch.micro_batches)
    run_here(config)
    wanted = (gradient[400:] / num_targets).norm().item()
    assert curve(config, GRAD_NORM)[0] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(
    ("stage", "embeddings"), [(0, NEW_ROWS), (2, NEW_ROWS), (3, NEW_ROWS), (2, {})]
)
def test_stage_1_resumed_on_the_same_workers_is_bit_equal(
    make_stage_1: MakeConfig, two: Group, stage: int, embeddings: dict[str, Any]
) -> None:
    fields = {"embeddings": embeddings, **stage_fields(stage)}
    whole, parts = make_stage_1("whole", **fields), make_stage_1("parts", **fields)
    two.run(whole)
    two.run(parts, stop_after=3)
    two.run(parts)
    assert curve(parts) == curve(whole)
    assert len(curve(parts)) == 6
    final = [list_checkpoints(config.run_place)[-1] for config in (whole, parts)]
    assert hashes_of(final[0]) == hashes_of(final[1])
    tables = [written(config) for config in (whole, parts)]
    assert all(torch.equal(tensor, tables[1][name]) for name, tensor in tables[0].items())


def test_stage_1_resumed_without_new_rows_apart_is_refused_by_parameter(
    make_stage_1: MakeConfig,
) -> None:
    run_here(make_stage_1("run", embeddings=NEW_ROWS), stop_after=3)
    with pytest.raises(ValueError, match=r"it has no parameter model\.embed_tokens\.weight"):
        run_here(make_stage_1("run"))


@pytest.mark.parametrize(
    ("tied", "embeddings"),
    [(True, {}), (True, NEW_ROWS), (False, {"lm_head": True}), (False, NEW_ROWS), (False, BOTH)],
)
def test_stage_2_starts_where_stage_1_ended(
    make_stage_1: MakeConfig,
    make: MakeConfig,
    untied_model_dir: Path,
    embeddings: dict[str, Any],
    *,
    tied: bool,
) -> None:
    path = {} if tied else {"model__path": str(untied_model_dir)}
    first = make_stage_1("first", embeddings=embeddings, **path)
    run_here(first)
    assert curve(first, EVAL_LOSS)[-1] < curve(first, EVAL_LOSS)[0]
    result = Path(first.run_dir, "pt_model")
    fields = {
        "model__path": str(result),
        "data__store_dir": first.data.store_dir,
        "lora__dropout": 0.0,
        "max_steps": 1,
    }
    left = not tied and not embeddings.get("lm_head")
    # What stage 1 left untrained is not forgotten.
    assert len(problems_of(make("second", **fields))) == left
    saved = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    second = make("second", **fields, lora__modules_to_save=saved)
    assert problems_of(second) == []
    run_here(second)
    assert curve(second, EVAL_LOSS)[0] == pytest.approx(curve(first, EVAL_LOSS)[-1], rel=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_stage_1_result_loads_in_transformers_and_takes_the_adapter_of_stage_2(
    make_stage_1: MakeConfig,
    make_config: MakeConfig,
    grown_tokenizer: Path,
    untied_model_dir: Path,
    tmp_path: Path,
    *,
    tied: bool,
) -> None:
    path = {} if tied else {"model__path": str(untied_model_dir)}
    first = make_stage_1("first", **path)
    run_here(first)
    result = Path(first.run_dir, "pt_model")
    model: Any = AutoModelForCausalLM.from_pretrained(result)
    num_ids = len(load_tokenizer(grown_tokenizer))
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == num_ids
    assert is_tied(model) == tied
    assert hash_tokenizer(result) == hash_tokenizer(grown_tokenizer)
    base = load_file(Path(first.model.path, "model.safetensors"))
    tables = {EMBEDDING, HEAD}
    for name, tensor in model.named_parameters():
        assert name in tables or torch.equal(tensor, base[name])
    if not tied:
        assert torch.equal(model.lm_head.weight[:400], base[HEAD][:400])
    manifest = read_result(first) or {}
    assert manifest["num_trained"] == num_ids * 32
    assert manifest["untrained_rows"] == ({} if tied else {"lm_head": num_ids - 400})
    second = make_config(
        "second",
        model__path=str(result),
        data__store_dir=first.data.store_dir,
        lora__modules_to_save=["embed_tokens", "lm_head"],
        max_steps=2,
    )
    run_here(second)
    adapter, merged = str(Path(second.run_dir, "pt_lora_model")), tmp_path / "merged"
    merge_adapters(MergeConfig(base=str(result), adapters=(adapter,), target=str(merged)))
    assert AutoModelForCausalLM.from_pretrained(merged).config.vocab_size == num_ids


def test_stage_1_result_is_published_on_any_storage(
    make_config: MakeConfig, run_dir: Place
) -> None:
    run_here(make_config(train="embeddings", lora=None, run_dir=str(run_dir), max_steps=1))
    names = {file.name for file in (run_dir / "pt_model").files()}
    assert {"config.json", "manifest.json", "model.safetensors", "tokenizer.json"} <= names
