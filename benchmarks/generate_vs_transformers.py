"""Batch inference against transformers' `generate` in static batches sorted by length.

    python benchmarks/generate_vs_transformers.py [--rounds 3] [--cpus N] [--quick]

The demo's model in fp32 answers 200 questions about spans of this repository's license, of 4 to 120
words, greedily, each until it ends or has 64 tokens. Ours is the worker of `raytune generate`
in one process, without Ray; what the full job takes, with the start of Ray and of the worker, is
printed too. The peer gets the same ids in its best batch size, which is found first, sorted by the
length of the prompts. Both have the same number of threads and a loaded model, and take turns.
Exit status 1: an answer differs where transformers' two most likely tokens are not equally likely.
"""

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness.endpoint import DEMO_MODEL
from harness.serve_material import LICENCE, load_reference
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from raytune_llama.chat.conversations import Conversation, Turn
from raytune_llama.config.settings import from_dict
from raytune_llama.generate.config import GenerateConfig
from raytune_llama.generate.prompts import PromptedRow
from raytune_llama.generate.worker import Generator, describe_model
from raytune_llama.serve.generation.model import ServedModel

TARGET = 1.5
TIE = 1e-4
"""Difference of two logits below which either token may be chosen."""

QUESTIONS = (
    "Say in one sentence what this is about: {}",
    "Which word of this text is the longest? {}",
    "Explain this: {}",
    "What is the first word of this text? {}",
)
WORDS = (4, 8, 16, 30, 60, 120)
BATCH_SIZES = (32, 64, 128)
NEEDS = """needs: the demo's model (`make demo`); 4 GB of memory.
takes: about 20 minutes on two quiet cores; --quick about one."""


@dataclass(frozen=True)
class Answers:
    """One side in one round."""

    seconds: float
    texts: list[str]
    num_tokens: int
    """Generated tokens of all answers, with the tokens that end them."""

    @property
    def tokens_per_second(self) -> float:
        """Throughput."""
        return self.num_tokens / self.seconds


def make_questions(count: int) -> list[str]:
    """Return different questions whose lengths go round the given ones, in a mixed order."""
    text = LICENCE.read_text(encoding="utf-8").split()
    questions: list[str] = []
    for number in range(count):
        start = number * 37 % (len(text) - max(WORDS))
        words = text[start : start + WORDS[number * 5 % len(WORDS)]]
        questions.append(QUESTIONS[number % len(QUESTIONS)].format(" ".join(words)))
    return questions


def make_config(folder: Path, questions: Sequence[str], options: argparse.Namespace) -> Any:  # noqa: ANN401
    """Return our job on the questions, a line each."""
    file = folder / "questions.txt"
    file.write_text("\n".join(questions), encoding="utf-8")
    data: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(DEMO_MODEL), "precision": "fp32"},
        "input": {"path": str(file)},
        "sampling": {"max_new_tokens": options.tokens},
        "scale": {"cpus_per_worker": options.cpus, "engine": "transformers"},
    }
    if options.slots is not None:
        data["scale"]["slots"] = options.slots
    if options.prefill_tokens is not None:
        data["scale"]["prefill_tokens"] = options.prefill_tokens
    return from_dict(GenerateConfig, data)


class Peer:
    """transformers with a loaded model."""

    def __init__(self, described: ServedModel, questions: Sequence[str], num_new: int) -> None:
        self.model: PreTrainedModel = load_reference(DEMO_MODEL)
        self.tokenizer: PreTrainedTokenizerFast = described.tokenizer
        chat = described.chat
        assert chat is not None, "the demo's model has a chat template"
        self.prompts = [
            chat.encode_prompt(Conversation((Turn("user", question),))).tolist()
            for question in questions
        ]
        self._num_new, self._ends = num_new, sorted(described.stop_ids)

    def answer(self, batch_size: int) -> tuple[Answers, list[list[int]]]:
        """Answer all prompts in batches of similar length; return the ids too."""
        order = sorted(range(len(self.prompts)), key=lambda n: -len(self.prompts[n]))
        ids: dict[int, list[int]] = {}
        start = time.perf_counter()
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            made = self._generate([self.prompts[number] for number in batch])
            ids.update(zip(batch, made, strict=True))
        listed = [ids[number] for number in range(len(self.prompts))]
        texts = [self.decode(answer) for answer in listed]
        seconds = time.perf_counter() - start
        return Answers(seconds, texts, sum(map(len, listed))), listed

    def _generate(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        longest = max(map(len, prompts))
        ids_BT = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts])
        mask_BT = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        with torch.inference_mode():
            made = self.model.generate(  # pyright: ignore[reportCallIssue]
                ids_BT,
                attention_mask=mask_BT,
                max_new_tokens=self._num_new,
                do_sample=False,
                repetition_penalty=1.0,
                eos_token_id=self._ends,
                pad_token_id=0,
            )
        return [self._without_padding(row) for row in made[:, longest:].tolist()]

    def _without_padding(self, ids: list[int]) -> list[int]:
        end = next((place for place, token in enumerate(ids, 1) if token in self._ends), len(ids))
        return ids[:end]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of an answer, without control tokens."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    @torch.inference_mode()
    def is_tie(self, number: int, ids: Sequence[int], text: str) -> bool:
        """Whether the first token in which a text differs from an answer was a tie."""
        same = 0
        while same < len(ids) and text.startswith(self.decode(ids[: same + 1]).rstrip("\ufffd")):
            same += 1
        prompt = self.prompts[number]
        logits_TV = self.model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 :]
        top = logits_TV.float().topk(2).values
        gaps = (top[:, 0] - top[:, 1]).tolist()
        # A character of several tokens differs in text only with its last one.
        return min(gaps[max(0, same - 3) : same + 1]) < TIE


def run_ours(generator: Generator, rows: Sequence[PromptedRow], loop: asyncio.Runner) -> Answers:
    """Answer all rows in one call of our worker."""
    start = time.perf_counter()
    records = loop.run(generator.answer(rows))
    seconds = time.perf_counter() - start
    num_tokens = sum(record["num_output_tokens"] for record in records)
    return Answers(seconds, [record["output"] for record in records], num_tokens)


def run_job(config: GenerateConfig) -> tuple[float, list[str]]:
    """Run the full job on a Ray cluster of its own; return its seconds and answers."""
    import json

    from raytune_llama.generate.batch import generate

    start = time.perf_counter()
    lines = generate(config).output.read_bytes().split(b"\n")[:-1]
    return time.perf_counter() - start, [json.loads(line)["output"] for line in lines]


def count_differences(peer: Peer, ids: Sequence[Sequence[int]], texts: Sequence[str]) -> int:
    """Print how many answers are the same, and return how many differ without a tie."""
    wanted = [peer.decode(answer) for answer in ids]
    differing = [n for n, text in enumerate(texts) if text != wanted[n]]
    wrong = [n for n in differing if not peer.is_tie(n, ids[n], texts[n])]
    print(
        f"answers: {len(texts) - len(differing)} of {len(texts)} are the same, "
        f"{len(differing) - len(wrong)} differ after a tie, {len(wrong)} differ otherwise"
    )
    for number in wrong[:3]:
        print(f"  {number}: ours {texts[number]!r}\n  {number}: peer {wanted[number]!r}")
    return len(wrong)


def main() -> int:
    """Run the benchmark; return 1 where answers differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=NEEDS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=64, help="most new ones of an answer")
    parser.add_argument("--cpus", type=int, default=os.cpu_count() or 1, help="threads a side")
    parser.add_argument("--slots", type=int, help="ours; default: the job's")
    parser.add_argument("--prefill-tokens", type=int, help="ours; default: the job's")
    parser.add_argument("--no-job", action="store_true", help="leave out the job on Ray")
    parser.add_argument("--quick", action="store_true", help="try out; the figures mean little")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.prompts, options.tokens = 1, 24, 16
    questions = make_questions(options.prompts)
    with tempfile.TemporaryDirectory() as name, asyncio.Runner() as loop:
        config = make_config(Path(name), questions, options)
        described = describe_model(config)
        rows = [
            PromptedRow(number, conversation=Conversation((Turn("user", question),)))
            for number, question in enumerate(questions)
        ]
        peer = Peer(described, questions, options.tokens)
        with closing(Generator(config, cpus=options.cpus)) as generator:
            lengths = [len(prompt) for prompt in peer.prompts]
            print(
                f"{options.cpus} threads a side, {len(rows)} prompts of {min(lengths)} to "
                f"{max(lengths)} tokens, {options.tokens} new ones at most"
            )
            wrong, best = compare(peer, generator, rows, loop, options.rounds)
        if not options.no_job:
            seconds, texts = run_job(config)
            print(f"the job, with the start of Ray and of one worker: {seconds:.1f} s")
            wrong += count_differences(peer, best, texts)
    return int(wrong > 0)


def compare(
    peer: Peer,
    generator: Generator,
    rows: Sequence[PromptedRow],
    loop: asyncio.Runner,
    num_rounds: int,
) -> tuple[int, list[list[int]]]:
    """Measure both sides; return how many answers are wrong, and the peer's ids."""
    loop.run(generator.answer(rows[:4]))
    sizes = [size for size in BATCH_SIZES if size <= max(32, len(rows))]
    tried: dict[int, tuple[Answers, list[list[int]]]] = {}
    for size in sizes:
        answers, _ = tried[size] = peer.answer(size)
        print(
            f"transformers, batches of {size}: {answers.tokens_per_second:.1f} tokens/s", flush=True
        )
    best = min(tried, key=lambda size: tried[size][0].seconds)
    ids = tried[best][1]
    ratios: list[float] = []
    wrong = 0
    for number in range(num_rounds):
        if number % 2:
            theirs, ours = peer.answer(best)[0], run_ours(generator, rows, loop)
        else:
            ours, theirs = run_ours(generator, rows, loop), peer.answer(best)[0]
        ratios.append(theirs.seconds / ours.seconds)
        print(
            f"round {number + 1}: ours {ours.seconds:.1f} s, {ours.tokens_per_second:.1f} tokens/s;"
            f" transformers, batches of {best}: {theirs.seconds:.1f} s, "
            f"{theirs.tokens_per_second:.1f} tokens/s: {ratios[-1]:.2f} times",
            flush=True,
        )
        wrong += count_differences(peer, ids, ours.texts) if not number else 0
    print(f"ours / transformers, median: {statistics.median(ratios):.2f}, target {TARGET}")
    return wrong, ids


if __name__ == "__main__":
    sys.exit(main())
