"""Promise: what a plan says of a run is what the run takes, and costs nothing."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from raytune_llama.cli import VERBS
from raytune_llama.config.settings import ConfigError, from_dict, identity, override, write_yaml
from raytune_llama.model.config import LoraConfig
from raytune_llama.model.llama import build_empty_model
from raytune_llama.model.lora import attach_adapter
from raytune_llama.tokenizer.loader import load_tokenizer
from raytune_llama.train.config import PretrainConfig
from raytune_llama.train.engines.config import ShardingLayout
from raytune_llama.train.estimate.memory import WorkerMemory, count_parameters, plan_memory
from raytune_llama.train.estimate.plan import build_model, build_plan, render_plan
from tests.train.conftest import MakeConfig, run_here
from tests.train.estimate.memory_probe import measure

WITHIN = 0.20
"""Share of the measured memory by which an estimate may differ: the estimate does not model the
order in which an engine allocates its buffers, and memory-mapped files count as measured."""

LLAMA_SIZES = {
    "7B": (4096, 32, 32, 11008),
    "13B": (5120, 40, 40, 13824),
    "33B": (6656, 60, 52, 17920),
    "65B": (8192, 80, 64, 22016),
}
TABLES = ("embed_tokens", "lm_head")

MeasureConfig = Callable[..., PretrainConfig]


def llama_settings(size: str, rows: int) -> LlamaConfig:
    hidden, layers, heads, intermediate = LLAMA_SIZES[size]
    return LlamaConfig(
        vocab_size=rows,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )


def adapted(size: str, rows: int, saved: tuple[str, ...]) -> torch.nn.Module:
    with torch.device("meta"):
        model = LlamaForCausalLM(llama_settings(size, rows))
        return attach_adapter(model, LoraConfig(rank=8, modules_to_save=saved), seed=1)


@pytest.mark.parametrize(
    ("rows", "trained", "unique"),
    [(49953, 429_203_456, 6_905_475_072), (49954, 429_211_648, 6_905_483_264)],
)
def test_count_parameters_of_7b_with_tables_equals_the_published_log(
    rows: int, trained: int, unique: int
) -> None:
    counts = count_parameters(adapted("7B", rows, TABLES))
    assert (counts.trained, counts.unique) == (trained, unique)
    # PEFT keeps the frozen tables beside the trained ones.
    assert counts.resident == unique + 2 * rows * 4096


def test_count_parameters_of_13b_with_tables_equals_the_oracle() -> None:
    assert count_parameters(adapted("13B", 49953, TABLES)).trained == 542_812_160


@pytest.mark.parametrize(("size", "trained"), [("33B", 60_948_480), ("65B", 99_942_400)])
def test_count_parameters_of_large_models_equals_the_oracle(size: str, trained: int) -> None:
    assert count_parameters(adapted(size, 49953, ())).trained == trained


def test_count_parameters_tied_table_counts_once(make_config: MakeConfig, model_dir: Path) -> None:
    config = make_config()
    skeleton = build_empty_model(model_dir)
    alone = sum(parameter.numel() for parameter in skeleton.parameters())
    counts = count_parameters(build_model(config, build_empty_model(model_dir)))
    table = 410 * 32
    assert counts.resident == counts.unique + table
    assert counts.unique == alone + counts.trained - table


@pytest.fixture(scope="session")
def bare_7b(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """The directory of a LLaMA of 7B with its config.json and a tokenizer, and no weights."""
    path = tmp_path_factory.mktemp("7b")
    llama_settings("7B", 49953).save_pretrained(path)
    load_tokenizer(tokenizer_dir).save_pretrained(path)
    return path


@pytest.fixture
def make_plan(make_config: MakeConfig, tmp_path: Path) -> Callable[..., PretrainConfig]:
    """Build the config of a plan, whose corpus is there."""

    def make(**fields: Any) -> PretrainConfig:  # noqa: ANN401
        corpus = tmp_path / "corpus.txt"
        corpus.write_text("the store of a run holds every token once\n" * 50)
        fields = {"plan": True, "data__sources": [{"path": str(corpus)}], **fields}
        return make_config(**fields)

    return make


def test_build_plan_of_stage_1_counts_the_table_and_writes_a_model(
    make_plan: MakeConfig, bare_7b: Path
) -> None:
    plan = build_plan(make_plan(model__path=str(bare_7b), train="embeddings", lora=None))
    assert plan.counts.trained == 204_607_488
    assert plan.disk.result == 4 * plan.counts.unique


def test_build_plan_without_weights_counts_and_says_so(
    make_plan: MakeConfig, bare_7b: Path
) -> None:
    config = make_plan(model__path=str(bare_7b), lora={"rank": 8, "modules_to_save": list(TABLES)})
    plan = build_plan(config)
    assert plan.counts.trained == 429_203_456
    assert not plan.has_weights
    text = render_plan(plan)
    assert "429,203,456" in text
    assert "no weights there yet" in text
    with pytest.raises(ConfigError, match=r"model\.path: .* has no weights"):
        build_plan(override(config, {"plan": False}))


def test_build_plan_counts_the_rows_that_the_tokenizer_adds(
    make_plan: MakeConfig, tmp_path: Path, tokenizer_dir: Path
) -> None:
    grown = copy.deepcopy(load_tokenizer(tokenizer_dir))
    grown.add_tokens([f"new{number}" for number in range(30)])
    grown.save_pretrained(tmp_path / "grown")
    before = build_plan(make_plan())
    after = build_plan(make_plan(model__tokenizer=str(tmp_path / "grown")))
    assert after.counts.trained - before.counts.trained == 20 * 32
    assert "430 ids, 430 rows, 20 of them new" in render_plan(after)


def test_build_plan_lists_all_mistakes(make_plan: MakeConfig) -> None:
    config = make_plan(model__path="/no/such/model", data__sources=[{"path": "/no/such/*.txt"}])
    with pytest.raises(ConfigError) as caught:
        build_plan(config)
    starts = {problem.split(":")[0] for problem in caught.value.problems}
    assert {"model.path", "data.sources.0.path"} <= starts


def test_build_plan_of_contradicting_deepspeed_keys_is_refused(make_plan: MakeConfig) -> None:
    keys = {"gradient_clipping": 5.0}
    config = make_plan(engine={"zero_stage": 2, "deepspeed": keys})
    with pytest.raises(ConfigError, match=r"engine\.deepspeed\.gradient_clipping"):
        build_plan(config)


def test_build_plan_says_steps_epochs_and_disk_of_the_run(
    make_plan: MakeConfig, store_dir: Path
) -> None:
    config = make_plan()
    plan = build_plan(config)
    run_here(config)
    run_dir = Path(config.run_dir)
    shards = (run_dir / "checkpoints").glob("step-*/*.safetensors")
    checkpoints = [sum(f.stat().st_size for f in [shard]) for shard in shards]
    adapter = (run_dir / "pt_lora_model" / "adapter_model.safetensors").stat().st_size
    # Beside the numbers a file has a header.
    assert plan.disk.checkpoint < min(checkpoints) < plan.disk.checkpoint * 1.3
    assert plan.disk.result < adapter < plan.disk.result * 1.3
    assert plan.disk.num_checkpoints >= len(checkpoints)
    stored = sum(file.stat().st_size for file in store_dir.glob("*.arrow"))
    assert plan.disk.store == stored
    manifest = json.loads((run_dir / "pt_lora_model" / "manifest.json").read_text())
    (seen,) = manifest["mixture"].values()
    assert plan.steps.epochs == {"corpus": pytest.approx(seen["epochs"])}
    assert (plan.steps.num_steps, plan.steps.step_tokens) == (6, 4 * 24)


def test_build_plan_of_an_elastic_run_shows_the_fewest_and_the_most_workers(
    make_plan: MakeConfig,
) -> None:
    elastic = {"scale__num_workers": {"min": 1, "max": 3}, "batch__micro_batch_sequences": 1}
    plan = build_plan(make_plan(**elastic))
    assert [
        (workers.num_workers, workers.num_micro_batches, workers.filler_sequences)
        for workers in plan.workers
    ] == [(1, 4, 0), (3, 2, 2)]
    for number, workers in ((1, plan.workers[0]), (3, plan.workers[1])):
        alone = make_plan(scale__num_workers=number, batch__micro_batch_sequences=1)
        assert build_plan(alone).workers == (workers,)
    text = render_plan(plan)
    assert "GiB of 1 of 1 workers" in text
    assert "GiB of 1 of 3 workers" in text


def test_build_plan_without_a_store_knows_no_epochs(make_plan: MakeConfig, tmp_path: Path) -> None:
    fields = {"data__store_dir": str(tmp_path / "none"), "max_steps": None, "num_epochs": 2.0}
    plan = build_plan(make_plan(**fields))
    assert (plan.steps.num_steps, plan.steps.epochs) == (None, None)
    assert "unknown until the token store is built" in render_plan(plan)
    assert not (tmp_path / "none").exists()
    assert plan.disk.store is not None
    # 50 documents of 41 bytes: between one and eleven tokens each, with ends, of two bytes.
    assert 50 * (28 + 2 * 3) < plan.disk.store < 50 * (28 + 2 * 43)


def test_plan_field_is_no_part_of_the_run(make_config: MakeConfig) -> None:
    assert identity(make_config()) == identity(make_config(plan=True))


def test_job_with_plan_prints_exits_0_and_leaves_nothing(
    make_plan: MakeConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_plan()
    write_yaml(override(config, {"plan": False}), tmp_path / "job.yaml")
    # Not an address: to start Ray would be an error.
    monkeypatch.setenv("RAY_ADDRESS", "nowhere")
    # Called in this process: another would spend seven seconds on imports.
    status = VERBS["pretrain"]([str(tmp_path / "job.yaml"), "plan=true"], "raytune pretrain")
    assert status == 0
    assert "ddp*" in capsys.readouterr().out
    assert not Path(config.run_dir).exists()


def gpu_memory(make_config: MakeConfig, **engine: Any) -> WorkerMemory:  # noqa: ANN401
    """Return the memory of a worker on a GPU under ZeRO 2."""
    config = make_config(engine={"precision": "bf16", "zero_stage": 2, **engine})
    config = override(config, {"scale.use_gpu": True, "scale.num_workers": 2})
    return plan_memory(config, build_model(config, build_empty_model(Path(config.model.path))), 2)[
        2
    ]


def test_plan_memory_of_an_offloaded_optimizer_is_the_hosts(make_config: MakeConfig) -> None:
    here, offloaded = gpu_memory(make_config), gpu_memory(make_config, offload_optimizer=True)
    assert offloaded.offloaded == here.optimizer > 0
    assert here.peak - offloaded.peak == here.optimizer


def test_plan_memory_on_a_gpu_holds_a_whole_bucket(make_config: MakeConfig) -> None:
    small = {"zero_optimization": {"reduce_bucket_size": 10**8}}
    saved = gpu_memory(make_config).peak - gpu_memory(make_config, deepspeed=small).peak
    assert saved == 4 * 10**8 * 2


@pytest.fixture(scope="session")
def wide_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA of 42 million parameters: what weights and optimizer take is most of it."""
    path = tmp_path_factory.mktemp("wide")
    return write_sized(path, rows=16000, hidden=512, intermediate=1408, layers=8)


@pytest.fixture(scope="session")
def sharded_model_dir(wide_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in small files: a mapped file stays resident while one of its weights is in use."""
    path = tmp_path_factory.mktemp("sharded")
    LlamaForCausalLM.from_pretrained(wide_model_dir).save_pretrained(path, max_shard_size="2MB")
    return path


@pytest.fixture(scope="session")
def deep_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA of six million parameters: with long sequences activations are most of it."""
    path = tmp_path_factory.mktemp("deep")
    return write_sized(path, rows=2000, hidden=256, intermediate=704, layers=8)


def write_sized(path: Path, *, rows: int, hidden: int, intermediate: int, layers: int) -> Path:
    torch.manual_seed(0)
    model: PreTrainedModel = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=rows,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
        )
    )
    model.save_pretrained(path)
    return path


def measure_config(path: Path, tmp_path: Path, **fields: Any) -> PretrainConfig:  # noqa: ANN401
    """Build the config of a run that is measured; keywords are groups of fields."""
    values: dict[str, Any] = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(path)},
        "data": {"sources": [{"path": "corpus.txt"}], "store_dir": str(tmp_path / "store")},
        "lora": {"rank": 8, "modules_to_save": list(TABLES)},
        "batch": {"sequence_tokens": 64, "sequences_per_step": 4, "micro_batch_sequences": 1},
        "engine": {"precision": "fp32", "strategy": "ddp"},
        "max_steps": 3,
    }
    return from_dict(PretrainConfig, values | fields)


def assert_measured(config: PretrainConfig, tmp_path: Path) -> None:
    """Compare a plan's peak with what the worker that holds most was seen to hold."""
    model = build_model(config, build_empty_model(Path(config.model.path)))
    number = config.scale.max_workers
    planned = {memory.layout: memory for memory in plan_memory(config, model, number)}
    memory = planned[config.engine.layout]
    measured = max(worker["peak"] for worker in measure(config, tmp_path / "probe"))
    assert memory.peak == pytest.approx(measured, rel=WITHIN)


# 15 s in a process of its own; what the plan counts is tested without one.
@pytest.mark.slow
def test_plan_memory_of_lora_is_what_a_worker_holds(wide_model_dir: Path, tmp_path: Path) -> None:
    assert_measured(measure_config(wide_model_dir, tmp_path), tmp_path)


FULL = {"train": "full", "lora": None}
TWO = {"num_workers": 2}
LAYOUTS: dict[ShardingLayout, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "ZeRO 1": {"zero_stage": 1},
    "ZeRO 2": {"zero_stage": 2},
    "ZeRO 3": {"zero_stage": 3},
    "fsdp": {"strategy": "fsdp"},
}


@pytest.mark.slow
@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_plan_memory_of_two_workers_is_what_they_hold(
    wide_model_dir: Path, tmp_path: Path, layout: ShardingLayout, precision: str, train: str
) -> None:
    fields: dict[str, Any] = FULL if train == "full" else {}
    engine = {"precision": precision, **LAYOUTS[layout]}
    config = measure_config(wide_model_dir, tmp_path, scale=TWO, engine=engine, **fields)
    assert_measured(config, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_plan_memory_of_a_quantised_base_is_what_a_worker_holds(
    sharded_model_dir: Path, tmp_path: Path, kind: str
) -> None:
    model = {"path": str(sharded_model_dir), "quantization": kind}
    lora = {"rank": 8}
    config = measure_config(sharded_model_dir, tmp_path, model=model, lora=lora)
    assert_measured(config, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("train", ["lora", "full"])
def test_plan_memory_of_activations_is_what_a_worker_holds(
    deep_model_dir: Path,
    tmp_path: Path,
    train: str,
    checkpointing: bool,  # noqa: FBT001
) -> None:
    fields: dict[str, Any] = FULL if train == "full" else {}
    engine = {
        "precision": "fp32",
        "strategy": "ddp",
        "gradient_checkpointing": checkpointing,
    }
    batch = {"sequence_tokens": 512, "sequences_per_step": 2, "micro_batch_sequences": 2}
    config = measure_config(deep_model_dir, tmp_path, engine=engine, batch=batch, **fields)
    assert_measured(config, tmp_path)
