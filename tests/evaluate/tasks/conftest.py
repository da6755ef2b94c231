"""Small files of real questions in the forms of the benchmarks, and a tiny real model."""

# ruff: noqa: RUF001  # Chinese punctuation

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from raytune_llama.config.settings import from_dict
from raytune_llama.evaluate.tasks.config import TaskConfig

Row = tuple[str, str, str, str, str, str]

LAW: tuple[Row, ...] = (
    ("中国的根本法是哪一部？", "民法典", "宪法", "刑法", "行政诉讼法", "B"),
    ("完全民事行为能力从几岁开始？", "十六岁", "十四岁", "十八岁", "二十岁", "C"),
    ("下列哪一项属于人身权？", "姓名权", "所有权", "抵押权", "质权", "A"),
    ("法律的“公布”由谁签署？", "总理", "委员长", "院长", "国家主席", "D"),
)
LOGIC: tuple[Row, ...] = (
    ("所有的鱼都会游泳，鲤鱼是鱼，所以？", "鲤鱼会飞", "鲤鱼会游泳", "鱼是鲤鱼", "无法推出", "B"),
    ("“如果下雨，地面就湿”，地面没有湿，所以？", "没下雨", "下雨了", "可能下雨", "下雪了", "A"),
)
CREDIT = (
    {"id": "c1", "query": "Income 900, no debts. Good or bad risk? Answer:", "gold": 0},
    {"id": "c2", "query": "Income 100, three defaults. Good or bad risk? Answer:", "gold": 1},
    {"id": "c3", "query": "Income 700, one late payment. Good or bad risk? Answer:", "gold": 0},
)

WriteExam = Callable[..., Path]
MakeTask = Callable[..., TaskConfig]


def exam_text(
    rows: Sequence[Row], *, answers: bool = True, head: str = "id,question,A,B,C,D"
) -> str:
    """Return rows as a CSV file, with ids from 0."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*head.split(","), *(["answer"] if answers else [])])
    for number, row in enumerate(rows):
        writer.writerow([number, *(row if answers else row[:-1])])
    return buffer.getvalue()


@pytest.fixture
def ceval_dir(tmp_path: Path) -> Path:
    """C-Eval's folders with two subjects; the test split has no answers."""
    root = tmp_path / "ceval"
    for split in ("dev", "val", "test"):
        (root / split).mkdir(parents=True)
        for subject, rows in (("law", LAW), ("logic", LOGIC)):
            text = exam_text(rows, answers=split != "test")
            (root / split / f"{subject}_{split}.csv").write_text(text, encoding="utf-8")
    return root


@pytest.fixture
def calm_file(tmp_path: Path) -> Path:
    """A file in CALM's form."""
    choices = ["good", "bad"]
    rows = [
        {**row, "choices": choices, "answer": choices[int(row["gold"])], "text": "ignored"}
        for row in CREDIT
    ]
    path = tmp_path / "german.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def task_config(path: Path, task_format: str, **fields: Any) -> TaskConfig:  # noqa: ANN401
    """Return settings of a task from files."""
    return from_dict(TaskConfig, {"path": str(path), "format": task_format, **fields})


def make_lm(model: Any, tokenizer: Any, **options: Any) -> Any:  # noqa: ANN401 - untyped in lm-eval
    """Return a model as lm-eval's own `hf` backend."""
    settings = {"backend": "causal", "batch_size": 8, "device": "cpu", **options}
    build: Any = HFLM
    return build(pretrained=model, tokenizer=tokenizer, **settings)


@pytest.fixture(scope="session")
def tiny_lm(tokenizer_dir: Path) -> Any:  # noqa: ANN401 - HFLM, as untyped as lm-eval leaves it
    """A tiny LLaMA as lm-eval runs it: its scores are random, but always the same."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    model: Any = LlamaForCausalLM(config).eval()
    return make_lm(model, tokenizer)
