"""Promises: loss on answers alone, packed and padded learn the same, and a template stays known."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from raytune_llama.chat.config import ChatConfig
from raytune_llama.chat.conversations import Conversation, Turn
from raytune_llama.chat.encoding import EncodedConversation, build_chat_encoder
from raytune_llama.config.settings import ConfigError, from_dict
from raytune_llama.data.store.manifest import (
    STORE_FORMAT_VERSION,
    Manifest,
    RowCounts,
    SplitManifest,
    SplitName,
    fingerprint_of,
    write_manifest,
)
from raytune_llama.data.store.shards import EncodedDocuments, ShardWriter
from raytune_llama.merge.config import MergeConfig
from raytune_llama.merge.merger import merge_adapters
from raytune_llama.storage.files import OUTPUT_MANIFEST, read_json, write_json_atomic
from raytune_llama.storage.hashes import hash_file
from raytune_llama.storage.place import Place
from raytune_llama.tokenizer.loader import load_tokenizer
from raytune_llama.train.checkpoint.layout import list_checkpoints
from raytune_llama.train.config import SftConfig
from raytune_llama.train.monitoring.metrics import (
    EVAL_BITS_PER_BYTE,
    EVAL_LOSS,
    GRAD_NORM,
    LOSS,
    TARGET_TOKENS,
)
from tests.train.conftest import WORDS, curve, problems_of, run_here
from tests.train.saved import weights_in

MakeSft = Callable[..., SftConfig]
CHAT = ChatConfig(template="belle", max_tokens=64)
NUM_TRAINED = 30


def make_talks(count: int, seed: int) -> list[Conversation]:
    generator = random.Random(seed)

    def words(most: int) -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(1, most)))

    return [
        Conversation(
            tuple(
                turn
                for _ in range(generator.randint(1, 2))
                for turn in (Turn("user", words(4)), Turn("assistant", words(5)))
            )
        )
        for _ in range(count)
    ]


Written = dict[SplitName, list[EncodedConversation]]


def write_chat_store(folder: Path, tokenizer_dir: Path) -> Written:
    """Write a store of conversations without Ray; return what is in it."""
    encoder = build_chat_encoder(load_tokenizer(tokenizer_dir), CHAT)
    written: Written = {}
    splits: dict[SplitName, SplitManifest] = {}
    sizes: dict[SplitName, int] = {"train": NUM_TRAINED, "validation": 6}
    for split, count in sizes.items():
        talks = make_talks(count, seed=count)
        rows = [row for row in encoder.encode(talks) if isinstance(row, EncodedConversation)]
        assert len(rows) == len(talks)
        path = folder / f"{split}-00000.arrow"
        with ShardWriter(path, "uint16", source=0, has_targets=True) as writer:
            writer.write_documents(
                EncodedDocuments(
                    file=0,
                    ids=np.concatenate([row.ids for row in rows]),
                    lengths=np.array([len(row.ids) for row in rows]),
                    num_bytes=np.full(len(rows), 9),
                    offsets=np.arange(len(rows)),
                    is_validation=np.zeros(len(rows), dtype=bool),
                    targets=np.concatenate([row.targets for row in rows]),
                )
            )
        assert writer.shard is not None
        written[split], splits[split] = rows, SplitManifest.from_shards([writer.shard])
    template = {"template": "belle", "template_hash": encoder.template.hash()}
    inputs: dict[str, Any] = {"chat": template}
    manifest = Manifest(
        format_version=STORE_FORMAT_VERSION,
        fingerprint=fingerprint_of(inputs),
        inputs=inputs,
        token_dtype="uint16",  # noqa: S106 - a type's name
        splits=splits,
        rows=RowCounts(),
        quarantine=None,
        lengths=[],
    )
    write_manifest(Place.local(folder / "manifest.json"), manifest)
    return written


@pytest.fixture(scope="module")
def chat_store(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    write_chat_store(folder, tokenizer_dir)
    return folder


@pytest.fixture
def make_sft(tmp_path: Path, model_dir: Path, chat_store: Path) -> MakeSft:
    """Build the config of a run of six steps; keywords replace its fields by dotted path."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n')

    def make(name: str = "run", **fields: Any) -> SftConfig:  # noqa: ANN401
        values: dict[str, Any] = {
            "run_dir": str(tmp_path / name),
            "model": {"path": str(model_dir)},
            "data": {
                "sources": [{"path": str(rows)}],
                "store_dir": str(chat_store),
                "chat": {"template": "belle"},
            },
            "lora": {"rank": 4, "dropout": 0.1},
            "batch": {"sequence_tokens": 64, "sequences_per_step": 4, "micro_batch_sequences": 2},
            "optim": {"learning_rate": 0.01},
            "engine": {"precision": "fp32", "strategy": "ddp"},
            "checkpoint": {"every_steps": 2},
            "eval": {"every_steps": 3},
            "logging": {"tensorboard": False},
            "max_steps": 6,
        }
        for field, value in fields.items():
            *parents, last = field.split("__")
            place = values
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = value
        return from_dict(SftConfig, values)

    return make


def adapter_of(config: SftConfig) -> Path:
    return Path(config.run_dir, "sft_lora_model", "adapter_model.safetensors")


def one_step(make_sft: MakeSft, packing: str, **fields: Any) -> SftConfig:  # noqa: ANN401
    """Take one step on all conversations."""
    config = make_sft(
        packing,
        lora__dropout=0.0,
        batch__packing=packing,
        batch__sequences_per_step=NUM_TRAINED,
        max_steps=None,
        num_epochs=1,
        **fields,
    )
    run_here(config)
    return config


def test_packed_and_padded_learn_the_same_from_the_same_conversations(make_sft: MakeSft) -> None:
    packed, padded = (one_step(make_sft, packing) for packing in ("packed", "padded"))
    for metric in (TARGET_TOKENS, LOSS, GRAD_NORM):
        assert curve(packed, metric) == pytest.approx(curve(padded, metric), rel=1e-5)
    one, other = load_file(adapter_of(packed)), load_file(adapter_of(padded))
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(tensor, other[key], rtol=1e-3, atol=1e-5)


def test_loss_is_the_mean_over_the_answers_of_all_conversations(
    make_sft: MakeSft, tmp_path: Path, model_dir: Path, tokenizer_dir: Path
) -> None:
    folder = tmp_path / "again"
    folder.mkdir()
    rows = write_chat_store(folder, tokenizer_dir)["train"]
    config = one_step(make_sft, "packed")
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    total, num_targets = 0.0, 0
    for row in rows:
        ids = torch.from_numpy(row.ids.astype(np.int64))
        with torch.no_grad():
            logits_TV = model(ids[None]).logits[0]
        targets = torch.from_numpy(row.targets[1:])
        each = torch.nn.functional.cross_entropy(logits_TV[:-1], ids[1:], reduction="none")
        total += each[targets].sum().item()
        num_targets += int(targets.sum())
    assert curve(config, TARGET_TOKENS) == [num_targets]
    assert curve(config) == pytest.approx([total / num_targets], rel=1e-5)
    evaluated = curve(config, EVAL_LOSS)
    assert len(evaluated) == 2
    assert evaluated[1] < evaluated[0]
    assert not curve(config, EVAL_BITS_PER_BYTE)  # which would be of prompts too


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_stopped_and_started_again_equals_the_uninterrupted_run(
    make_sft: MakeSft, packing: str
) -> None:
    whole, parts = (make_sft(name, batch__packing=packing) for name in ("whole", "parts"))
    run_here(whole)
    assert run_here(parts, stop_after=3).status == "stopped"
    run_here(parts)
    assert curve(parts) == curve(whole)
    assert hash_file(adapter_of(parts)) == hash_file(adapter_of(whole))


def test_result_loads_with_peft_and_names_the_template(
    make_sft: MakeSft, model_dir: Path, tmp_path: Path
) -> None:
    config = make_sft()
    run_here(config)
    result = adapter_of(config).parent
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), str(result))
    chat = read_json(result / OUTPUT_MANIFEST)["chat"]
    assert chat["template"] == "belle"
    merged = tmp_path / "merged"
    merge_adapters(MergeConfig(base=str(model_dir), adapters=(str(result),), target=str(merged)))
    assert read_json(merged / OUTPUT_MANIFEST)["chat"] == chat


def test_another_template_than_the_adapters_is_refused_unless_told(make_sft: MakeSft) -> None:
    first = make_sft("first")
    run_here(first)
    adapter = str(adapter_of(first).parent)
    on = {"lora": None, "adapter": adapter}
    assert not problems_of(make_sft("same", **on))
    other = on | {"data__chat": {"template": "alpaca"}}
    (problem,) = problems_of(make_sft("other", **other))
    assert problem.startswith("data.chat.template: got alpaca, but ")
    assert "was tuned with belle" in problem
    assert not problems_of(make_sft("told", **other, allow_other_template=True))


def test_goes_on_from_an_adapter_with_its_own_settings(make_sft: MakeSft) -> None:
    first = make_sft("first", lora__rank=2)
    run_here(first)
    second = make_sft("second", lora=None, adapter=str(adapter_of(first).parent))
    run_here(second)
    assert curve(second)[0] < curve(first)[0]
    one, two = load_file(adapter_of(first)), load_file(adapter_of(second))
    assert {key: t.shape for key, t in one.items()} == {key: t.shape for key, t in two.items()}
    with pytest.raises(ConfigError, match="lora: set either lora"):
        make_sft("both", adapter=str(adapter_of(first).parent))


def test_full_tuning_writes_a_model_directory_that_stops_at_its_own_end(
    make_sft: MakeSft, model_dir: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(model_dir, tmp_path / "base")
    for name in ("config.json", "generation_config.json"):
        write_json_atomic(base / name, read_json(base / name) | {"eos_token_id": 300})
    config = make_sft(train="full", lora=None, optim__learning_rate=1e-3, model__path=str(base))
    run_here(config)
    assert curve(config)[-1] < curve(config)[0]
    model = AutoModelForCausalLM.from_pretrained(Path(config.run_dir, "sft_model"))
    assert model.generation_config.eos_token_id == 1
    assert model.config.eos_token_id == 1


def test_run_without_progress_ends_early_and_again_does_nothing(make_sft: MakeSft) -> None:
    config = make_sft(
        optim__learning_rate=1e-12, eval__every_steps=1, eval__patience=2, max_steps=50
    )
    assert run_here(config).step < 50
    assert len(curve(config)) < 50
    losses = curve(config, EVAL_LOSS)
    best = losses.index(min(losses))
    assert len(losses) - 1 == best + 2


def test_result_of_the_best_step_has_its_weights(make_sft: MakeSft) -> None:
    # It ends with the first step after which the loss is not lower, as soon as there is one.
    config = make_sft(
        optim__learning_rate=0.05,
        schedule__kind="constant",
        eval__every_steps=1,
        eval__patience=1,
        checkpoint__result="best",
        checkpoint__keep_last=1,
        max_steps=200,
    )
    run_here(config)
    losses = curve(config, EVAL_LOSS)
    best = losses.index(min(losses))
    assert 0 < best == len(losses) - 2, losses
    (place,) = [p for p in list_checkpoints(config.run_place) if p.name.endswith(f"{best:08d}")]
    trained = weights_in(place)
    written = load_file(adapter_of(config))
    for key, tensor in written.items():
        name = key.replace(".weight", ".default.weight")
        assert torch.equal(tensor, trained[name])


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"data__chat": {"template": "belle", "max_tokens": 65}}, "data.chat.max_tokens"),
        ({"eval": {"every_steps": None, "patience": 2}}, "eval.patience"),
        ({"checkpoint": {"keep_best": False, "result": "best"}}, "checkpoint.result"),
        ({"num_epochs": 1}, "max_steps"),
    ],
)
def test_config_that_contradicts_itself_is_refused(
    make_sft: MakeSft, fields: dict[str, Any], field: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_sft(**fields)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [field]


def test_padded_with_weights_is_refused(make_sft: MakeSft) -> None:
    sources = [{"path": "a.jsonl", "weight": 1.0}]
    with pytest.raises(ConfigError, match=r"batch\.packing: padded"):
        make_sft(data__sources=sources, batch__packing="padded")


def test_conversations_longer_than_a_sequence_are_cut_when_encoded(make_sft: MakeSft) -> None:
    assert make_sft().encoded_data.chat.max_tokens == 64
    shorter = make_sft(data__chat={"template": "belle", "max_tokens": 32})
    assert shorter.encoded_data.chat.max_tokens == 32


def test_positions_of_a_conversation_are_held_against_the_models_not_those_of_a_sequence(
    make_sft: MakeSft,
) -> None:
    longer = {"batch__sequence_tokens": 512}
    capped = {"data__chat": {"template": "belle", "max_tokens": 128}}
    assert problems_of(make_sft(**longer, **capped)) == []
    (problem,) = problems_of(make_sft(**longer))
    assert problem.startswith("batch.sequence_tokens: got 512, ")
    capped["data__chat"]["max_tokens"] = 129
    (problem,) = problems_of(make_sft(**longer, **capped))
    assert problem.startswith("data.chat.max_tokens: got 129, ")


def test_changed_template_of_a_manifest_is_seen(make_sft: MakeSft) -> None:
    first = make_sft("first")
    run_here(first)
    result = adapter_of(first).parent
    manifest = read_json(result / OUTPUT_MANIFEST)
    manifest["chat"]["template_hash"] = "blake3:" + "0" * 64
    write_json_atomic(result / OUTPUT_MANIFEST, manifest)
    (problem,) = problems_of(make_sft("second", lora=None, adapter=str(result)))
    assert problem.startswith("data.chat.template")
