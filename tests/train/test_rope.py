"""Promise: positions that a run was trained with are those of every model made of its result."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from raytune_llama.config.settings import override
from raytune_llama.merge.config import MergeConfig
from raytune_llama.merge.merger import merge_adapters
from raytune_llama.model.config import RopeScaling
from raytune_llama.model.llama import load_model
from raytune_llama.model.rope import check_rope_scaling
from raytune_llama.train.config import PretrainConfig
from tests.train.conftest import MakeConfig, curve, fields_of, problems_of, run_here
from tests.train.test_families import LLAMA3_ROPE, write_family

IDS = torch.arange(5, 100)[None]
LINEAR = {"model__rope_scaling": {"type": "linear", "factor": 4.0}}


def result_of(config: PretrainConfig) -> Path:
    return Path(config.run_dir, config.result_name)


def logits_of(model: Any) -> torch.Tensor:  # noqa: ANN401  # a model, maybe with its adapter
    with torch.no_grad():
        return model.eval()(IDS).logits


def load(path: Path, **changed: Any) -> Any:  # noqa: ANN401  # a model that is called
    config = AutoConfig.from_pretrained(path)
    for field, value in changed.items():
        setattr(config, field, value)
    return AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32)


def merge(base: Path, *adapters: Path, target: Path) -> Path:
    merge_adapters(
        MergeConfig(
            base=str(base), adapters=tuple(map(str, adapters)), target=str(target), verify="logits"
        )
    )
    return target


@pytest.mark.parametrize(
    ("scaling", "rope"),
    [
        ({"type": "linear", "factor": 4.0}, {}),
        ({"type": "dynamic", "factor": 4.0}, {}),
        ({"type": "yarn", "factor": 4.0}, {"original_max_position_embeddings": 128}),
        (
            {"type": "llama3", "factor": 4.0, "high_freq_factor": 2.0},
            {
                "original_max_position_embeddings": 128,
                "low_freq_factor": 1.0,
                "high_freq_factor": 2.0,
            },
        ),
    ],
)
def test_load_model_computes_as_transformers_does_with_the_same_scaling(
    make: MakeConfig, model_dir: Path, scaling: dict[str, Any], rope: dict[str, Any]
) -> None:
    config = make(model__rope_scaling=scaling)
    assert problems_of(config) == []
    ours = load_model(config.model, "fp32", torch.device("cpu"))
    own = {"rope_type": scaling["type"], "rope_theta": 10000.0, "factor": 4.0, **rope}
    longer = 128 if scaling["type"] == "dynamic" else 512
    theirs = load(model_dir, rope_parameters=own, max_position_embeddings=longer)
    assert torch.equal(logits_of(ours), logits_of(theirs))
    # Up to the model's own context, dynamic scaling changes nothing.
    is_same = torch.equal(logits_of(ours), logits_of(load(model_dir)))
    assert is_same == (scaling["type"] == "dynamic")


def test_adapter_trained_with_scaling_is_merged_with_it(
    make_config: MakeConfig, model_dir: Path, tmp_path: Path
) -> None:
    config, plain = make_config("scaled", **LINEAR), make_config("plain")
    run_here(config)
    run_here(plain)
    assert curve(config)[0] != curve(plain)[0]
    adapter = result_of(config)
    changed = json.loads((adapter / "manifest.json").read_text())["model_settings"]
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    assert changed == {"rope_parameters": rope, "max_position_embeddings": 512}
    merged = merge(model_dir, adapter, target=tmp_path / "merged")
    with_scaling = PeftModel.from_pretrained(load(model_dir, **changed), str(adapter))
    wanted = logits_of(with_scaling)
    torch.testing.assert_close(logits_of(load(merged)), wanted, rtol=1e-4, atol=1e-4)
    unscaled = logits_of(PeftModel.from_pretrained(load(model_dir), str(adapter)))
    assert not torch.allclose(unscaled, wanted, atol=0.1)
    assert load(merged).config.max_position_embeddings == 512
    # Adapters of different positions make no model.
    other = make_config("other", model__rope_scaling={"type": "yarn", "factor": 2.0})
    run_here(other)
    with pytest.raises(ValueError, match="trained with"):
        merge(model_dir, adapter, result_of(other), target=tmp_path / "both")


@pytest.mark.parametrize("train", ["full", "embeddings"])
def test_model_trained_with_scaling_has_it_in_its_config(
    make_config: MakeConfig, train: str
) -> None:
    config = make_config(lora=None, train=train, **LINEAR)
    run_here(config)
    written = AutoConfig.from_pretrained(result_of(config))
    assert written.rope_parameters["rope_type"] == "linear"
    assert written.rope_parameters["factor"] == 4.0
    assert written.max_position_embeddings == 512


def test_run_that_goes_on_from_an_adapter_has_to_have_its_scaling(make: MakeConfig) -> None:
    first = make("first", **LINEAR)
    run_here(first)
    fields = {"lora": None, "adapter": str(result_of(first))}
    assert problems_of(make("same", **fields, **LINEAR)) == []
    [problem] = problems_of(make("other", **fields))
    assert problem.startswith("model.rope_scaling: the adapter ")


def test_scaling_of_a_model_that_has_its_own_or_no_positions_is_refused(
    make: MakeConfig, tmp_path: Path, tokenizer_dir: Path
) -> None:
    for family, targets, part in (
        ("llama3", "q_proj", "llama3 scaling by 8.0"),
        ("bloom", "query_key_value", "no rotary positions"),
    ):
        base = write_family(tmp_path / family, family, tokenizer_dir)
        fields = {"model__path": str(base), "lora__targets": [targets]}
        config = make(**fields, lora__modules_to_save=[], **LINEAR)
        [problem] = problems_of(config)
        assert problem.startswith("model.rope_scaling: ")
        assert part in problem
    assert LLAMA3_ROPE["factor"] == 8.0


def test_dynamic_scaling_beyond_the_models_context_is_refused(make: MakeConfig) -> None:
    dynamic = {"model__rope_scaling": {"type": "dynamic", "factor": 2.0}}
    problems = problems_of(make(**dynamic, batch__sequence_tokens=129))
    assert fields_of(problems) == ["model.rope_scaling.type"]
    assert problems_of(make(**dynamic, batch__sequence_tokens=128)) == []


def test_scaling_that_transformers_calls_wrong_is_refused() -> None:
    config = LlamaConfig(max_position_embeddings=128)
    before = config.to_dict()
    scaling = RopeScaling(type="llama3", factor=2.0, low_freq_factor=4.0, high_freq_factor=1.0)
    [problem] = check_rope_scaling(config, scaling, 64)
    assert problem.startswith("model.rope_scaling: rejected by transformers: ")
    assert "high_freq_factor" in problem
    assert config.to_dict() == before


def test_scaling_with_a_field_of_another_kind_is_refused(make: MakeConfig) -> None:
    with pytest.raises(
        ValueError, match=r"model\.rope_scaling\.beta_fast: applies only to type yarn"
    ):
        make(model__rope_scaling={"type": "linear", "factor": 2.0, "beta_fast": 16.0})


def overrides_of(message: str) -> dict[str, Any]:
    """Return the overrides of RoPE scaling that a message names."""
    found = re.findall(r"model\.rope_scaling\.(type|factor)=(\w+)", message)
    return {
        f"model.rope_scaling.{name}": int(value) if value.isdecimal() else value
        for name, value in found
    }


def write_scaled(base: Path, path: Path, **rope: Any) -> Path:  # noqa: ANN401
    """Copy a model of 128 positions, and give it RoPE scaling of its own."""
    shutil.copytree(base, path)
    settings = json.loads((path / "config.json").read_text())
    settings["rope_parameters"] = {"rope_theta": 10000.0, **rope}
    (path / "config.json").write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize(
    ("scaling", "tokens", "named"),
    [
        (None, 300, {"model.rope_scaling.type": "yarn", "model.rope_scaling.factor": 3}),
        ({"type": "linear", "factor": 2.0}, 300, {"model.rope_scaling.factor": 3}),
    ],
)
def test_sequence_beyond_the_models_positions_is_refused_with_the_scaling_that_would_do(
    make: MakeConfig, scaling: dict[str, Any] | None, tokens: int, named: dict[str, Any]
) -> None:
    config = make(model__rope_scaling=scaling, batch__sequence_tokens=tokens)
    [problem] = problems_of(config)
    assert problem.startswith(f"batch.sequence_tokens: got {tokens}, ")
    assert "max_position_embeddings 128" in problem
    assert overrides_of(problem) == named
    assert problems_of(override(config, named)) == []
    context = 256 if scaling else 128
    assert f"batch.sequence_tokens={context}" in problem
    assert problems_of(override(config, {"batch.sequence_tokens": context})) == []
    beyond = override(config, {"batch.sequence_tokens": context + 1})
    assert fields_of(problems_of(beyond)) == ["batch.sequence_tokens"]


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"rope_type": "linear", "factor": 2.0}, 256),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}, 256),
        # The number of positions includes the scaling already.
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}, 128),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            128,
        ),
        # Beyond 128 the scale would be that of the longest sequence of a batch.
        ({"rope_type": "dynamic", "factor": 2.0}, 128),
    ],
)
def test_sequence_is_held_against_the_scaling_in_the_models_own_config(
    make: MakeConfig, model_dir: Path, tmp_path: Path, rope: dict[str, Any], context: int
) -> None:
    model = str(write_scaled(model_dir, tmp_path / "scaled", **rope))
    assert problems_of(make(model__path=model, batch__sequence_tokens=context)) == []
    [problem] = problems_of(make(model__path=model, batch__sequence_tokens=context + 1))
    assert problem.startswith(f"batch.sequence_tokens: got {context + 1}, ")
    assert str(rope["rope_type"]) in problem
    # A model that is scaled already cannot be scaled by the run.
    assert overrides_of(problem) == {}


def test_sequence_of_a_model_without_positions_has_no_limit(
    make: MakeConfig, tmp_path: Path, tokenizer_dir: Path
) -> None:
    base = write_family(tmp_path / "bloom", "bloom", tokenizer_dir)
    fields = {"lora__targets": ["query_key_value"], "lora__modules_to_save": []}
    assert problems_of(make(model__path=str(base), batch__sequence_tokens=9999, **fields)) == []


def test_sequence_beyond_the_context_of_an_adapter_needs_a_new_adapter(make: MakeConfig) -> None:
    first = make("first", **LINEAR)
    run_here(first)
    fields = {"lora": None, "adapter": str(result_of(first)), **LINEAR}
    assert problems_of(make("fits", batch__sequence_tokens=512, **fields)) == []
    [problem] = problems_of(make("beyond", batch__sequence_tokens=513, **fields))
    assert problem.startswith("batch.sequence_tokens: got 513, ")
    assert "train a new adapter" in problem
