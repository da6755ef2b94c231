"""Promise: a task run through lm-eval scores as a plain computation by hand does."""

# ruff: noqa: ANN401, RUF001  # models as untyped as lm-eval leaves them; Chinese punctuation

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.model import LM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import from_dict
from raytune_llama.evaluate.tasks.config import TaskConfig
from raytune_llama.evaluate.tasks.harness import run_task
from raytune_llama.evaluate.tasks.loading import load_tasks
from raytune_llama.evaluate.tasks.outcome import build_submission, outcome_from_json
from raytune_llama.evaluate.tasks.task import EvaluationTask
from raytune_llama.storage.hashes import hash_bytes
from tests.evaluate.tasks.conftest import CREDIT, LAW, make_lm, task_config


class ScriptedModel(LM):
    """A model whose answers are given, in the order of the requests."""

    def __init__(self, answers: list[str]) -> None:
        super().__init__()
        self.answers = answers
        self.prompts: list[str] = []

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        self.prompts += [request.args[0] for request in requests]
        return [(-float(number), False) for number, _ in enumerate(requests)]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise NotImplementedError

    def generate_until(self, requests: list[Any]) -> list[str]:
        self.prompts += [request.args[0] for request in requests]
        return self.answers


def load(*configs: TaskConfig) -> EvaluationTask:
    return load_tasks(configs)[0]


def plain_score(lm: Any, context: str, continuation: str) -> float:
    """Log-likelihood of a continuation, one forward pass without any batching."""
    tokenizer: Any = lm.tokenizer
    before = tokenizer(context)["input_ids"]
    ids = tokenizer(context + continuation)["input_ids"]
    with torch.no_grad():
        logits = lm.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logits[at - 1, ids[at]]) for at in range(len(before), len(ids)))


def test_ceval_scores_equal_a_plain_computation(ceval_dir: Path, tiny_lm: Any) -> None:
    task = load(task_config(ceval_dir, "ceval", shots=1))
    outcome = run_task(task, tiny_lm)
    first = LAW[0]
    example = "\n".join(
        f"{letter}. {text}" for letter, text in zip("ABCD", first[1:5], strict=True)
    )
    second = LAW[1]
    listed = "\n".join(
        f"{letter}. {text}" for letter, text in zip("ABCD", second[1:5], strict=True)
    )
    prompt = (
        "以下是关于法学的单项选择题，每题只有一个正确答案，请给出它的字母。\n\n"
        f"{first[0]}\n{example}\n答案：B\n\n{second[0]}\n{listed}\n答案："
    )
    expected = [
        math.log(sum(math.exp(plain_score(tiny_lm, prompt, form + letter)) for form in ("", " ")))
        for letter in "ABCD"
    ]
    sample = outcome.samples[1]
    assert sample.scores == pytest.approx(expected, abs=1e-4)
    assert sample.answer == "ABCD"[expected.index(max(expected))]
    assert (sample.gold, sample.correct) == ("C", sample.answer == "C")
    rights = [float(bool(one.correct)) for one in outcome.samples]
    accuracy = sum(rights) / 4
    assert outcome.metrics["acc"].value == accuracy
    spread = sum((right - accuracy) ** 2 for right in rights) / 3
    assert outcome.metrics["acc"].stderr == pytest.approx(math.sqrt(spread / 4))
    assert (outcome.num_questions, outcome.num_missing, outcome.num_truncated) == (4, 0, 0)


def test_run_is_the_same_twice_and_survives_json(ceval_dir: Path, tiny_lm: Any) -> None:
    task = load(task_config(ceval_dir, "ceval"))
    first, second = run_task(task, tiny_lm), run_task(task, tiny_lm)
    assert first.samples == second.samples
    assert outcome_from_json(json.loads(json.dumps(first.to_json()))) == first


def test_chat_template_is_the_models_and_its_hash_is_kept(ceval_dir: Path, tiny_lm: Any) -> None:
    outcome = run_task(load(task_config(ceval_dir, "ceval", shots=1, chat_template=True)), tiny_lm)
    tokenizer: Any = tiny_lm.tokenizer
    assert outcome.template_hash == hash_bytes(tokenizer.chat_template.encode())
    assert outcome.first_prompt.startswith("<user>以下是关于法学的")
    assert "答案：\n<assistant>B\n<user>中国的根本法" in outcome.first_prompt
    assert outcome.first_prompt.endswith("答案：\n<assistant>")


def test_chat_template_that_is_missing_is_refused(ceval_dir: Path) -> None:
    task = load(task_config(ceval_dir, "ceval", chat_template=True))
    with pytest.raises(UserError, match="ceval/law: chat_template is true, but the model has no"):
        run_task(task, ScriptedModel([]))


def test_options_as_texts_are_scored_whole_and_by_length(tmp_path: Path, tiny_lm: Any) -> None:
    pairs = [("four", "a number near seventeen"), ("my dog runs home", "it"), ("no", "yes, often")]
    rows = [
        {"question": f"What is {number} + {number}?", "choices": choices, "answer": 0}
        for number, choices in enumerate(pairs)
    ]
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    task = load(task_config(path, "choices", options="texts", answer_forms=[" {}"]))
    outcome = run_task(task, tiny_lm)
    whole: list[bool] = []
    by_length: list[bool] = []
    for question, sample in zip(task.questions, outcome.samples, strict=True):
        prompt = f"{question.text}\nAnswer:"
        scores = [plain_score(tiny_lm, prompt, f" {option}") for option in question.options]
        assert sample.scores == pytest.approx(scores, abs=1e-4)
        relative = [
            score / len(option) for score, option in zip(scores, question.options, strict=True)
        ]
        whole.append(scores[0] > scores[1])
        by_length.append(relative[0] > relative[1])
    assert whole != by_length, "the options have to differ in length enough"
    assert outcome.metrics["acc"].value == pytest.approx(sum(whole) / 3)
    assert outcome.metrics["acc_norm"].value == pytest.approx(sum(by_length) / 3)


def test_generated_answers_that_are_missing_are_counted_not_dropped(calm_file: Path) -> None:
    task = load(task_config(calm_file, "calm", method="generation", positive="bad"))
    model = ScriptedModel(["good", "I do not know", "It is not good, it is bad."])
    outcome = run_task(task, model)
    assert model.prompts == [row["query"] for row in CREDIT]
    assert [sample.answer for sample in outcome.samples] == ["good", None, "bad"]
    assert (outcome.num_questions, outcome.num_missing) == (3, 1)
    assert outcome.metrics["acc"].value == pytest.approx(1 / 3)
    # good: one of two found, nothing else said to be good; bad: missed, and said once wrongly.
    assert outcome.metrics["f1"].value == pytest.approx((2 / 3 + 0) / 2)
    assert outcome.metrics["recall"].value == 0
    assert outcome.num_truncated is None


def test_split_without_answers_yields_a_submission(ceval_dir: Path, tiny_lm: Any) -> None:
    tasks = load_tasks([task_config(ceval_dir, "ceval", split="test")])
    outcomes = [run_task(task, tiny_lm) for task in tasks]
    assert not any(outcome.metrics for outcome in outcomes)
    submission = build_submission(outcomes)
    assert {subject: set(of) for subject, of in submission.items()} == {
        "law": {"0", "1", "2", "3"},
        "logic": {"0", "1"},
    }
    assert set(submission["law"].values()) <= set("ABCD")


def test_prompts_longer_than_the_context_are_counted_or_refused(
    ceval_dir: Path, tiny_lm: Any
) -> None:
    task = load(task_config(ceval_dir, "ceval"))
    encoder: Any = tiny_lm.tok_encode
    lengths = [len(encoder(prompt)) for prompt in _prompts(task)]
    short = make_lm(
        tiny_lm.model,
        tiny_lm.tokenizer,
        # One more, as the form " A" has two tokens, of which the last is not fed.
        max_length=min(lengths) + 1,
    )
    outcome = run_task(task, short)
    too_long = [length > min(lengths) for length in lengths]
    assert [sample.truncated for sample in outcome.samples] == too_long
    assert outcome.num_truncated == sum(too_long) > 0
    refusing = load(task_config(ceval_dir, "ceval", truncate="refuse"))
    with pytest.raises(UserError, match=rf"truncate: the prompts of {sum(too_long)} questions"):
        run_task(refusing, short)


def _prompts(task: EvaluationTask) -> list[str]:
    model = ScriptedModel([])
    run_task(task, model)
    return list(dict.fromkeys(model.prompts))


def test_colon_and_letter_in_one_token_are_scored_as_that_token(tmp_path: Path) -> None:
    letters = [f"：{letter}" for letter in "AB"]
    pieces = [*pre_tokenizers.ByteLevel.alphabet()]
    colon = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("：")[0][0]
    merges = [(colon[0], colon[1]), (colon[:2], colon[2])]
    merges += [(colon, letter) for letter in "AB"]
    vocabulary = [*pieces, colon[:2], colon, *(colon + letter for letter in "AB")]
    tokenizer = Tokenizer(
        models.BPE(vocab={piece: at for at, piece in enumerate(vocabulary)}, merges=merges)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="!")  # noqa: S106
    assert [len(fast(text)["input_ids"]) for text in letters] == [1, 1]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        initializer_range=0.3,
    )
    model: Any = LlamaForCausalLM(config).eval()
    lm = make_lm(model, fast)
    path = tmp_path / "sums.jsonl"
    row = {"question": "1+1", "choices": ["2", "3"], "answer": "A"}
    path.write_text(json.dumps(row), encoding="utf-8")
    prompt = "{question}{options}答案："
    task = load(task_config(path, "choices", prompt=prompt, answer_forms=["{}"]))
    (sample,) = run_task(task, lm).samples
    context = "1+1A. 2\nB. 3答案"
    expected = [plain_score(lm, context, letter) for letter in letters]
    assert sample.scores == pytest.approx(expected, abs=1e-4)


def test_lm_eval_task_of_a_yaml_file_runs(tmp_path: Path, tiny_lm: Any) -> None:
    rows = [{"question": "1+1=", "right": " 2"}, {"question": "2+2=", "right": " 4"}]
    data = tmp_path / "sums.json"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "sums.yaml").write_text(
        "task: own_sums\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {tmp_path / 'cache'}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: '{{question}}'\ndoc_to_choice: [' 2', ' 4']\ndoc_to_target: right\n"
        "target_delimiter: ''\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    config = from_dict(TaskConfig, {"task": "own_sums", "include": str(folder)})
    task = load(config)
    assert (task.name, task.num_questions) == ("own_sums", 2)
    assert set(task.file_hashes) == {"sums.yaml", "own_sums: questions"}
    outcome = run_task(task, tiny_lm)
    expected = [
        [plain_score(tiny_lm, row["question"], one) for one in (" 2", " 4")] for row in rows
    ]
    for sample, scores, row in zip(outcome.samples, expected, rows, strict=True):
        assert sample.scores == pytest.approx(scores, abs=1e-4)
        assert sample.gold == row["right"]
    rights = [one.answer == one.gold for one in outcome.samples]
    assert outcome.metrics["acc"].value == sum(rights) / 2
