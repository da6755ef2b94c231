"""Instruction tuning against TRL and LLaMA-Factory: target tokens a second, loss and memory.

    python benchmarks/sft_vs_peers.py [--rounds 2] [--steps 50] [--tiny]

Conversations are the demo's questions about reviews (or made up ones), several turns of which are
joined to dialogues of very different lengths. All sides get the same ids and masks, the same
model and adapter, two processes of one thread under torchrun, gradients exchanged by plain data
parallelism; once packed, once padded. The order is each side's own, so losses are compared as the
mean of the last ten steps.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness.launch import Measurement, run_torchrun, run_torchrun_loop
from harness.material import REPOSITORY, SEED, TINY, BenchmarkSize, write_json, write_model
from harness.peers import PACKAGES, install_llama_factory, install_packages, is_installed
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from raytune_llama.chat.config import ChatConfig
from raytune_llama.chat.conversations import Conversation, Turn
from raytune_llama.chat.encoding import EncodedConversation, build_chat_encoder
from raytune_llama.config.settings import from_dict
from raytune_llama.data.store.manifest import (
    MANIFEST_NAME,
    STORE_FORMAT_VERSION,
    Manifest,
    RowCounts,
    SplitManifest,
    fingerprint_of,
    token_dtype,
    write_manifest,
)
from raytune_llama.data.store.shards import EncodedDocuments, ShardWriter
from raytune_llama.model.config import LoraConfig
from raytune_llama.model.lora import attach_adapter
from raytune_llama.storage.place import Place
from raytune_llama.tokenizer.loader import load_tokenizer
from raytune_llama.train.config import SftConfig

TARGETS = {"packed": 1.5, "padded": 1.1}
OURS, TRL, FACTORY = "ours", "TRL", "LLaMA-Factory"

RunFunction = Callable[["SftMaterial", Path, str, int], Measurement]
"""Runs once: the material, a folder, packed or padded, the number of steps."""


@dataclass(frozen=True)
class SftMaterial:
    """Directories that both sides read."""

    shape: BenchmarkSize
    model: Path
    adapter: Path
    store: Path
    rows: Path

    def config(self, run_dir: Path, packing: str, num_steps: int) -> SftConfig:
        """Return the config of our side."""
        shape = self.shape
        fields: dict[str, Any] = {
            "run_dir": str(run_dir),
            "model": {"path": str(self.model), "attention": "sdpa"},
            "data": {
                "sources": [{"path": "reviews.jsonl"}],
                "store_dir": str(self.store),
                "chat": {"template": "belle"},
            },
            "adapter": str(self.adapter),
            "batch": {
                "packing": packing,
                "sequence_tokens": shape.sequence_tokens,
                "sequences_per_step": shape.sequences_per_step,
                "micro_batch_sequences": shape.sequences_per_worker,
            },
            "optim": {"learning_rate": 1e-3, "weight_decay": 0.01, "max_grad_norm": 1.0},
            "schedule": {"kind": "cosine", "warmup_ratio": 0.0},
            "max_steps": num_steps,
            "seed": SEED,
            "engine": {"precision": "fp32", "strategy": "ddp"},
            "scale": {"num_workers": shape.num_workers, "cpus_per_worker": 1, "max_failures": 1},
            "checkpoint": {"every_steps": 10**9, "keep_best": False},
            "eval": {"every_steps": None},
            "logging": {"every_steps": 10, "tensorboard": False},
        }
        return from_dict(SftConfig, fields)


def make_material(folder: Path, shape: BenchmarkSize, num_talks: int) -> SftMaterial:
    """Write a model, an adapter and conversations, as a token store and as rows."""
    material = SftMaterial(shape, *(folder / n for n in ("model", "adapter", "store", "rows.json")))
    write_model(material.model, shape)
    demo = REPOSITORY / "demo" / "model"
    tokenizer = load_tokenizer(demo) if demo.is_dir() else _tiny_tokenizer()
    tokenizer.save_pretrained(material.model)
    model = LlamaForCausalLM.from_pretrained(material.model, local_files_only=True)
    lora = LoraConfig(rank=8, alpha=32.0, dropout=0.0)
    attach_adapter(model, lora, seed=SEED).save_pretrained(str(material.adapter))
    chat = ChatConfig(template="belle", max_tokens=shape.sequence_tokens - 1)
    encoder = build_chat_encoder(load_tokenizer(material.model), chat)
    encoded = encoder.encode(_make_talks(num_talks))
    rows = [row for row in encoded if isinstance(row, EncodedConversation)]
    _write_store(material.store, rows, len(tokenizer))
    lengths = [len(row.ids) for row in rows]
    print(
        f"{len(rows)} conversations of {min(lengths)} to {max(lengths)} tokens, median "
        f"{statistics.median(lengths):.0f}, {np.mean([row.targets.mean() for row in rows]):.0%} "
        "of them answers"
    )
    material.rows.write_text(
        json.dumps(
            [
                {"input_ids": row.ids.tolist(), "completion_mask": row.targets.astype(int).tolist()}
                for row in rows
            ]
        )
    )
    return material


def _make_talks(count: int) -> list[Conversation]:
    """Join questions to dialogues of one to six turns, each answer with the review repeated."""
    generator = random.Random(SEED)
    file = REPOSITORY / "demo" / "instructions" / "reviews.jsonl"
    if file.is_file():
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    else:
        words = [{"input": f"text number {n} " * (n % 9 + 1), "output": "yes"} for n in range(200)]
        rows = [{"instruction": "Is it so?", **row} for row in words]
    talks: list[Conversation] = []
    for _ in range(count):
        chosen = generator.choices(rows, k=generator.choice([1, 1, 1, 2, 3, 6]))
        turns = [
            turn
            for row in chosen
            for turn in (
                Turn("user", f"{row['instruction']}\n{row['input']}"),
                Turn("assistant", f"{row['output']}: {row['input']}"),
            )
        ]
        talks.append(Conversation(tuple(turns)))
    return talks


def _tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(["a few words of a text that has a number"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")  # noqa: S106


def _write_store(path: Path, rows: list[EncodedConversation], vocabulary: int) -> None:
    path.mkdir()
    dtype = token_dtype(vocabulary)
    with ShardWriter(path / "train-00000.arrow", dtype, source=0, has_targets=True) as writer:
        writer.write_documents(
            EncodedDocuments(
                file=0,
                ids=np.concatenate([row.ids for row in rows]),
                lengths=np.array([len(row.ids) for row in rows]),
                num_bytes=np.ones(len(rows), dtype=np.int64),
                offsets=np.arange(len(rows)),
                is_validation=np.zeros(len(rows), dtype=bool),
                targets=np.concatenate([row.targets for row in rows]),
            )
        )
    assert writer.shard is not None
    inputs = {"shard": writer.shard.hash}
    manifest = Manifest(
        format_version=STORE_FORMAT_VERSION,
        fingerprint=fingerprint_of(inputs),
        inputs=inputs,
        token_dtype=dtype,
        splits={
            "train": SplitManifest.from_shards([writer.shard]),
            "validation": SplitManifest.from_shards([]),
        },
        rows=RowCounts(),
        quarantine=None,
        lengths=[],
    )
    write_manifest(Place.local(path / MANIFEST_NAME), manifest)


def run_ours(material: SftMaterial, folder: Path, packing: str, num_steps: int) -> Measurement:
    """Run our loop once."""
    return run_torchrun_loop(material.config(folder / "run", packing, num_steps))


def run_peer(
    program: str,
    material: SftMaterial,
    folder: Path,
    packing: str,
    num_steps: int,
    *,
    python: Path | None = None,
) -> Measurement:
    """Run a peer once, with the numbers of our config."""
    config = material.config(folder, packing, num_steps)
    settings = {
        "run_dir": str(folder / "peer"),
        "model": str(material.model),
        "adapter": str(material.adapter),
        "rows": str(material.rows),
        "result": str(folder / "result.json"),
        "packing": packing == "packed",
        "sequence_tokens": material.shape.sequence_tokens,
        "sequences_per_worker": material.shape.sequences_per_worker,
        "num_steps": num_steps,
        "learning_rate": config.optim.learning_rate,
        "weight_decay": config.optim.weight_decay,
        "max_grad_norm": config.optim.max_grad_norm,
        "seed": config.seed,
    }
    file = write_json(folder / "settings.json", settings)
    extra = {} if python else {"PYTHONPATH": f"{REPOSITORY}:{PACKAGES}"}
    run_torchrun(program, file, python=python, extra=extra)
    return Measurement(**json.loads((folder / "result.json").read_text()))


def find_sides() -> dict[str, RunFunction]:
    """Return what can run here; what cannot is named."""
    sides: dict[str, RunFunction] = {OURS: run_ours}
    install_packages()
    if is_installed("trl"):
        sides[TRL] = partial(run_peer, "trl_sft.py")
    python = install_llama_factory()
    if python is not None:
        sides[FACTORY] = partial(run_peer, "llama_factory.py", python=python)
    for name in {TRL, FACTORY} - sides.keys():
        print(f"{name} is not installed here, and left out")
    return sides


def print_packing(packing: str, runs: dict[str, list[Measurement]]) -> None:
    """Print each side's figures, and ours over each peer's, round by round."""
    for side, measured in runs.items():
        ratios = [
            ours.targets_per_second / run.targets_per_second
            for ours, run in zip(runs[OURS], measured, strict=True)
        ]
        speed = statistics.median(run.targets_per_second for run in measured)
        print(
            f"{packing}, {side}: {speed:,.0f} target tokens/s, ours / this "
            f"{statistics.median(ratios):.2f} (target {TARGETS[packing]}), loss "
            f"{measured[0].losses[0]:.3f} -> {measured[0].last_loss:.3f}, "
            f"{statistics.mean(measured[0].targets):.0f} targets a step, "
            f"peak {measured[0].peak_gib:.2f} GiB"
        )


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description="See the head of this file.")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--tiny", action="store_true", help="try out; the figures mean nothing")
    options = parser.parse_args()
    sides = find_sides()
    shape = (
        replace(TINY, sequence_tokens=256)
        if options.tiny
        else BenchmarkSize(sequences_per_worker=4)
    )
    measured: dict[str, dict[str, list[Measurement]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(SEED)
        material = make_material(folder, shape, 200 if options.tiny else 4000)
        print(shape.describe())
        for number in range(options.rounds):
            pairs = [(packing, side) for packing in TARGETS for side in sides]
            for packing, side in pairs if number % 2 == 0 else reversed(pairs):
                place = folder / f"{number}-{packing}-{side}"
                place.mkdir()
                run = sides[side](material, place, packing, options.steps)
                measured.setdefault(packing, {}).setdefault(side, []).append(run)
                speed = f"{run.targets_per_second:,.0f} target tokens/s"
                print(f"round {number + 1}: {packing}, {side}: {speed}", flush=True)
    for packing, runs in measured.items():
        print_packing(packing, runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
