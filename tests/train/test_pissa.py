"""Promise: a PiSSA run resumes from what it started from, and its result needs the base alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from raytune_llama.merge.config import MergeConfig
from raytune_llama.merge.merger import merge_adapters
from raytune_llama.storage.hashes import hash_file
from raytune_llama.storage.place import Place
from raytune_llama.train.checkpoint.layout import CheckpointError
from raytune_llama.train.checkpoint.restore import restore
from raytune_llama.train.config import PretrainConfig
from raytune_llama.train.estimate.plan import build_plan
from raytune_llama.train.loop import open_session
from raytune_llama.train.monitoring.metrics import EVAL_LOSS
from raytune_llama.train.process_group import ProcessGroup
from tests.train.conftest import MakeConfig, curve, problems_of, run_here, stage_fields
from tests.train.group import Group

IDS = torch.arange(5, 60)[None]
PISSA: dict[str, Any] = {"lora__init": "pissa", "lora__dropout": 0.0}


def adapter_of(config: PretrainConfig) -> Path:
    return Path(config.run_dir, "pt_lora_model")


def logits_of(model: Any) -> torch.Tensor:  # noqa: ANN401  # a model, maybe with its adapter
    with torch.no_grad():
        return model.eval()(IDS).logits


def load(path: Path) -> Any:  # noqa: ANN401  # a model that is called
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def test_pissa_run_writes_an_adapter_that_is_the_trained_model_on_the_original_base(
    make_config: MakeConfig, model_dir: Path, tmp_path: Path
) -> None:
    config = make_config(**PISSA, lora__modules_to_save=[])
    run_here(config)
    # The trained model, from the run's last checkpoint.
    trained = resumed(config)
    wanted = logits_of(trained)
    on_base = logits_of(PeftModel.from_pretrained(load(model_dir), str(adapter_of(config))))
    torch.testing.assert_close(on_base, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits_of(load(model_dir)), wanted, atol=0.1)
    target = tmp_path / "merged"
    merge_adapters(
        MergeConfig(
            base=str(model_dir),
            adapters=(str(adapter_of(config)),),
            target=str(target),
            verify="logits",
        )
    )
    torch.testing.assert_close(logits_of(load(target)), wanted, rtol=1e-4, atol=1e-4)


def resumed(config: PretrainConfig) -> Any:  # noqa: ANN401  # a model that is called
    """Return the model of a run's newest checkpoint."""
    session = open_session(config, ProcessGroup.single_process())
    state = restore(config.run_place, session.engine, ProcessGroup.single_process())
    assert state.step == 6
    return session.engine.module.model


def test_pissa_run_stopped_and_started_again_equals_the_whole(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts, plain = (
        make_config("whole", **PISSA),
        make_config("parts", **PISSA),
        make_config("plain", lora__dropout=0.0),
    )
    for config in (whole, plain):
        run_here(config)
    run_here(parts, stop_after=3)
    # Another machine's SVD would have other bits: nothing of it may be used.
    monkeypatch.setattr(torch, "svd_lowrank", None)
    run_here(parts)
    assert curve(parts) == curve(whole)
    name = "adapter_model.safetensors"
    assert hash_file(adapter_of(parts) / name) == hash_file(adapter_of(whole) / name)
    # It learns, from the base, and not as B = 0 does.
    assert curve(whole, EVAL_LOSS)[0] == pytest.approx(curve(plain, EVAL_LOSS)[0], rel=1e-4)
    assert curve(whole, EVAL_LOSS)[-1] < curve(whole, EVAL_LOSS)[0]
    assert curve(whole)[-1] != pytest.approx(curve(plain)[-1], rel=1e-3)


@pytest.mark.parametrize("stage", [2, 3])
def test_pissa_run_gives_the_same_losses_and_adapter_on_every_stage(
    make_config: MakeConfig, two: Group, stage: int
) -> None:
    fields = {**PISSA, "optim__learning_rate": 1e-3}
    reference = make_config("reference", **fields)
    run_here(reference)
    config = make_config("zero", **fields, **stage_fields(stage))
    two.run(config, stop_after=3)
    two.run(config)
    assert curve(config) == pytest.approx(curve(reference), rel=1e-5)
    model = Path(config.model.path)
    ours, wanted = (
        logits_of(PeftModel.from_pretrained(load(model), str(adapter_of(each))))
        for each in (config, reference)
    )
    torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3)


def test_pissa_run_whose_start_is_damaged_or_gone_is_refused(make_config: MakeConfig) -> None:
    config = make_config(**PISSA)
    run_here(config, stop_after=2)
    initial = Path(config.run_dir, "initial")
    file = initial / "initial.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"initial\.safetensors: its content"):
        run_here(config)
    initial.rename(initial.with_name("moved"))
    with pytest.raises(CheckpointError, match="is missing"):
        run_here(config)


def test_pissa_run_in_object_storage_resumes_from_there(
    make_config: MakeConfig, s3_path: Place
) -> None:
    config = make_config(**PISSA, run_dir=str(s3_path))
    run_here(config, stop_after=2)
    run_here(config)
    whole = make_config("whole", **PISSA)
    run_here(whole)
    assert curve(config) == curve(whole)


def test_pissa_run_can_be_planned(make: MakeConfig) -> None:
    fields = {"lora__modules_to_save": [], "plan": True}
    plain, pissa = (build_plan(make(**fields, **more)) for more in ({}, PISSA))
    assert pissa.counts.trained == plain.counts.trained
    assert pissa.counts.resident == plain.counts.resident + plain.counts.trained
    assert problems_of(make(**PISSA)) == []
