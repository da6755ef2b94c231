"""Promise: a run that continues an adapter records it, and starts only from the adapter's base."""

from pathlib import Path

import pytest

from raytune_llama.config.settings import override
from raytune_llama.merge.config import MergeConfig
from raytune_llama.merge.merger import merge_adapters
from raytune_llama.model.adapter_lineage import LINEAGE_KEY
from raytune_llama.storage.files import read_json, read_manifest, write_json_atomic
from raytune_llama.storage.hashes import hash_file
from raytune_llama.tokenizer.loader import load_tokenizer
from tests.train.conftest import MakeConfig, problems_of, run_here, write_model

RESULT = "pt_lora_model"
WEIGHTS = "adapter_model.safetensors"


def test_run_that_continues_an_adapter_records_it_and_its_result_replaces_it(
    make: MakeConfig, tmp_path: Path
) -> None:
    first = make("first", max_steps=2)
    run_here(first)
    adapter = Path(first.run_dir) / RESULT
    later = override(make("later", max_steps=2), {"lora": None, "adapter": str(adapter), "seed": 2})
    assert problems_of(later) == []
    run_here(later)
    result = Path(later.run_dir) / RESULT
    lineage = read_manifest(result)[LINEAGE_KEY]
    assert lineage["continues"] == [hash_file(adapter / WEIGHTS)]
    assert lineage["adapters"] == []
    config = MergeConfig(
        base=first.model.path,
        adapters=(str(adapter), str(result)),
        target=str(tmp_path / "merged"),
    )
    with pytest.raises(ValueError, match=r"contains it; set adapters=\[.*later/pt_lora_model\]"):
        merge_adapters(config)
    merge_adapters(override(config, {"adapters": [str(result)]}))


def test_run_on_another_base_than_the_adapters_is_refused_before_it_starts(
    make: MakeConfig, tmp_path: Path, tokenizer_dir: Path
) -> None:
    first = make("first", max_steps=2)
    run_here(first)
    adapter = Path(first.run_dir) / RESULT
    other = write_model(tmp_path / "other", seed=1)
    load_tokenizer(tokenizer_dir).save_pretrained(other)
    changes = {"lora": None, "adapter": str(adapter), "model.path": str(other)}
    [problem] = problems_of(override(make("later"), changes))
    assert problem.startswith(f"model.path: {other} is not the base that {adapter} was trained on")


def test_run_on_quantized_weights_or_on_an_adapter_as_its_model_is_refused_by_that_name(
    make: MakeConfig, tmp_path: Path, tokenizer_dir: Path
) -> None:
    base = write_model(tmp_path / "base")
    load_tokenizer(tokenizer_dir).save_pretrained(base)
    settings = read_json(base / "config.json")
    quantization = {"quant_method": "gptq", "bits": 4}
    write_json_atomic(base / "config.json", settings | {"quantization_config": quantization})
    config = override(make(), {"model.path": str(base)})
    assert any("are quantized (gptq); use the model" in each for each in problems_of(config))
    (base / "config.json").rename(base / "adapter_config.json")
    assert any("is an adapter, not a model; name the base" in each for each in problems_of(config))
