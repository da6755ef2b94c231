"""Promise: tasks in a run have the scores of a plain computation, on any workers and engine."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from raytune_llama.chat.conversations import Conversation, Turn
from raytune_llama.chat.encoding import build_chat_encoder
from raytune_llama.config.settings import ConfigError, from_dict
from raytune_llama.data.store.token_store import TokenStore
from raytune_llama.evaluate.tasks.harness import run_task
from raytune_llama.evaluate.tasks.outcome import TaskOutcome
from raytune_llama.tokenizer.loader import encode_text, leading_ids, load_tokenizer
from raytune_llama.train.config import PretrainConfig, SftConfig
from raytune_llama.train.identity import read_identity
from raytune_llama.train.loop import open_session
from raytune_llama.train.monitoring.metrics import (
    EVAL_LOSS,
    EVAL_SECONDS,
    read_metrics,
)
from raytune_llama.train.preflight import open_inputs
from raytune_llama.train.process_group import ProcessGroup
from raytune_llama.train.run_files import EVALUATED_KEY
from raytune_llama.train.task_model import score_pairs
from raytune_llama.train.tasks import TaskEvaluator, open_tasks
from raytune_llama.train.trainer import prepare_run
from tests.train.conftest import (
    MakeConfig,
    curve,
    fields_of,
    make_texts,
    problems_of,
    run_here,
    stage_fields,
    write_store,
)
from tests.train.group import Group
from tests.train.test_sft import CHAT, write_chat_store

QUESTIONS = [
    ("store of a run", ["holds", "lost nothing"], 0),
    ("every token", ["once", "twice", "never"], 1),
    ("人民", ["日报", "钟声"], 0),
    ("nothing is", ["lost", "the run and"], 1),
    ("新年 the", ["钟声", "holds every", "run"], 2),
]
ACCURACY = "eval/quiz/accuracy"


def write_quiz(path: Path, questions: list[tuple[str, list[str], int]] = QUESTIONS) -> Path:
    rows = [
        {"id": f"q{n}", "question": question, "choices": choices, "answer": answer}
        for n, (question, choices, answer) in enumerate(questions)
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@pytest.fixture
def quiz(tmp_path: Path) -> dict[str, Any]:
    """A task that scores the texts of its options."""
    path = write_quiz(tmp_path / "quiz.jsonl")
    return {"path": str(path), "format": "choices", "options": "texts"}


def open_evaluator(config: PretrainConfig | SftConfig) -> TaskEvaluator:
    evaluator = open_session(config, ProcessGroup.single_process()).tasks
    assert evaluator is not None
    return evaluator


def outcome_of(config: PretrainConfig | SftConfig) -> TaskOutcome:
    evaluator = open_evaluator(config)
    (task,) = evaluator.tasks
    return run_task(task, evaluator.model)


def plain_score(model_dir: Path, context: list[int], continuation: list[int]) -> float:
    """Return a log-likelihood from the model's own logits, in float64."""
    model = AutoModelForCausalLM.from_pretrained(model_dir).double()
    ids = torch.tensor([context + continuation])
    with torch.no_grad():
        logs = model(ids).logits[0].log_softmax(-1)
    return sum(logs[at - 1, ids[0, at]].item() for at in range(len(context), ids.shape[1]))


def test_pairs_are_scored_as_the_models_own_logits_say(
    make_config: MakeConfig, model_dir: Path
) -> None:
    session = open_session(make_config(), ProcessGroup.single_process())
    pairs = [
        ((5, 6, 7), (8,)),
        ((9,), (10, 11, 12, 13)),
        (tuple(range(20, 70)), (5, 6)),
        ((3,), (4,)),
    ]
    for batch_tokens in (1, 24, 4096):
        found = score_pairs(session.engine, session.process_group, pairs, batch_tokens=batch_tokens)
        wanted = [plain_score(model_dir, list(a), list(b)) for a, b in pairs]
        assert found == pytest.approx(wanted, rel=1e-6)
    assert score_pairs(session.engine, session.process_group, [], batch_tokens=8) == []


def test_task_has_the_scores_and_the_accuracy_of_lm_evals_own_model(
    make_config: MakeConfig, quiz: dict[str, Any], model_dir: Path
) -> None:
    shots = write_quiz(Path(quiz["path"]).with_name("shots.jsonl"), QUESTIONS[:2])
    config = make_config(eval__tasks=[{**quiz, "shots": 2, "shots_path": str(shots)}], max_steps=1)
    ours = outcome_of(config)
    make_theirs: Any = HFLM
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    theirs = run_task(
        open_tasks(config)[0],
        make_theirs(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=2, device="cpu"
        ),
    )
    for own, other in zip(ours.samples, theirs.samples, strict=True):
        assert own.scores == pytest.approx(other.scores, abs=1e-4)
        assert own.answer == other.answer
    right = [sample.correct for sample in theirs.samples]
    assert 0 < sum(map(bool, right)) < len(right)
    run_here(config)
    assert curve(config, ACCURACY)[0] == sum(map(bool, right)) / len(right)


def test_prompt_that_is_too_long_is_cut_and_counted_or_refused(
    make_config: MakeConfig, tmp_path: Path, model_dir: Path
) -> None:
    long = ("every token " * 80, ["once", "twice"], 0)
    path = write_quiz(tmp_path / "long.jsonl", [QUESTIONS[0], long])
    task = {"path": str(path), "format": "choices", "options": "texts", "answer_forms": ["{}"]}
    outcome = outcome_of(make_config(eval__tasks=[task]))
    assert (outcome.num_truncated, outcome.samples[1].truncated) == (1, True)
    tokenizer = load_tokenizer(model_dir)
    prompt = f"{long[0].strip()}\nAnswer:"
    context = [*leading_ids(tokenizer), *encode_text(tokenizer, [prompt])[0]]
    whole = [*leading_ids(tokenizer), *encode_text(tokenizer, [f"{prompt}once"])[0]]
    option = whole[len(context) :]
    wanted = plain_score(model_dir, context[-(128 + 1 - len(option)) :], option)
    assert outcome.samples[1].scores[0] == pytest.approx(wanted, rel=1e-5)
    refusing = make_config(eval__tasks=[{**task, "truncate": "refuse"}])
    with pytest.raises(ValueError, match=r"truncate: .*1 questions.*q1"):
        outcome_of(refusing)


def test_task_of_a_tuning_run_goes_through_its_chat_template(
    quiz: dict[str, Any], model_dir: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "chats").mkdir()
    write_chat_store(tmp_path / "chats", tokenizer_dir)
    config = from_dict(
        SftConfig,
        {
            "run_dir": str(tmp_path / "run"),
            "model": {"path": str(model_dir)},
            "data": {
                "sources": [{"path": "/rows.jsonl"}],
                "store_dir": str(tmp_path / "chats"),
                "chat": {"template": "belle"},
            },
            "lora": {},
            "batch": {"sequence_tokens": 64},
            "engine": {"precision": "fp32", "strategy": "ddp"},
            "max_steps": 1,
            "eval": {"tasks": [{**quiz, "chat_template": True, "answer_forms": ["{}"]}]},
        },
    )
    outcome = outcome_of(config)
    tokenizer = load_tokenizer(model_dir)
    encoder = build_chat_encoder(tokenizer, CHAT)
    assert outcome.template_hash is not None
    question, options, _ = QUESTIONS[1]
    turn = Turn("user", f"{question}\nAnswer:")
    context = encoder.encode_prompt(Conversation((turn,))).tolist()
    wanted = [
        plain_score(model_dir, context, encode_text(tokenizer, [option])[0]) for option in options
    ]
    assert outcome.samples[1].scores == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        stage_fields(0),
        pytest.param(stage_fields(2), marks=pytest.mark.slow),
        pytest.param(stage_fields(3), marks=pytest.mark.slow),
        pytest.param({"engine__strategy": "fsdp"}, marks=pytest.mark.slow),
    ],
)
def test_tasks_on_two_workers_have_the_accuracies_of_one(
    make_config: MakeConfig, quiz: dict[str, Any], two: Group, fields: dict[str, Any]
) -> None:
    tasks = {"eval__tasks": [quiz], "lora__dropout": 0.0}
    one, config = make_config("one", **tasks), make_config("two", **tasks, **fields)
    run_here(one)
    two.run(config)
    assert len(curve(one, ACCURACY)) == 3
    assert curve(config, ACCURACY) == curve(one, ACCURACY)
    assert curve(config, EVAL_LOSS) == pytest.approx(curve(one, EVAL_LOSS), rel=1e-5)


def steps_of(config: PretrainConfig, name: str) -> list[float]:
    return [record["step"] for record in read_metrics(config.run_place) if name in record]


def test_tasks_are_part_of_every_nth_evaluation_the_first_and_the_last(
    make_config: MakeConfig, quiz: dict[str, Any]
) -> None:
    fields = {"eval__every_steps": 1, "eval__tasks_every": 3, "max_steps": 8}
    config = make_config(eval__tasks=[quiz], **fields)
    run_here(config, stop_after=4)
    run_here(config)
    assert steps_of(config, ACCURACY) == [0, 3, 6, 8]
    assert steps_of(config, EVAL_LOSS) == list(range(9))
    ends = make_config("ends", eval__tasks=[quiz], eval__every_steps=None, max_steps=4)
    run_here(ends)
    assert steps_of(ends, ACCURACY) == [0, 4]


def test_tasks_are_part_of_the_evaluation_after_which_a_run_stops_early(
    make_config: MakeConfig, quiz: dict[str, Any]
) -> None:
    config = make_config(
        eval__tasks=[quiz],
        eval__tasks_every=50,
        eval__every_steps=1,
        eval__patience=2,
        optim__learning_rate=5.0,
        max_steps=40,
    )
    run_here(config)
    last = steps_of(config, EVAL_LOSS)[-1]
    assert last < 40
    assert steps_of(config, ACCURACY) == [0, last]


def test_tasks_change_neither_the_training_nor_the_losses(
    make_config: MakeConfig, quiz: dict[str, Any]
) -> None:
    plain, config = make_config("plain"), make_config(eval__tasks=[quiz])
    run_here(plain)
    run_here(config)
    for name in ("train/loss", EVAL_LOSS):
        assert curve(config, name) == curve(plain, name)


def test_tasks_are_run_without_any_validation_text(
    make_config: MakeConfig, quiz: dict[str, Any], tokenizer_dir: Path, tmp_path: Path
) -> None:
    write_store(tmp_path / "bare", tokenizer_dir, train=[make_texts(40, seed=1)], validation=[])
    fields = {"data__store_dir": str(tmp_path / "bare"), "eval__tasks": [quiz]}
    zero = make_config("zero", **fields, max_steps=0)
    run_here(zero)
    assert steps_of(zero, ACCURACY) == [0]
    every = make_config(**fields, eval__every_steps=1, eval__tasks_every=2, max_steps=4)
    run_here(every)
    # An evaluation of nothing leaves no record.
    assert steps_of(every, EVAL_SECONDS) == steps_of(every, ACCURACY) == [0, 2, 4]


def test_accuracy_of_several_subjects_is_over_all_their_questions(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    (tmp_path / "sets").mkdir()
    for name, questions in (("a", QUESTIONS[:1]), ("b", QUESTIONS[1:])):
        write_quiz(tmp_path / "sets" / f"{name}.jsonl", questions)
    task = {"path": str(tmp_path / "sets"), "format": "choices", "options": "texts", "name": "quiz"}
    config = make_config(eval__tasks=[task], max_steps=0)
    run_here(config)
    (record,) = [r for r in read_metrics(config.run_place) if ACCURACY in r]
    parts = record[f"{ACCURACY}/a"], record[f"{ACCURACY}/b"]
    assert record[ACCURACY] == pytest.approx((parts[0] + 4 * parts[1]) / 5)


def test_tasks_that_no_run_can_ask_are_reported_together(
    make: MakeConfig, quiz: dict[str, Any], tmp_path: Path
) -> None:
    tasks = [
        {**quiz, "name": "loss"},
        {**quiz, "path": str(tmp_path / "none.jsonl")},
        {"path": quiz["path"], "format": "choices", "shots": 2, "shots_path": str(tmp_path / "no")},
    ]
    problems = problems_of(make(eval__tasks=tasks, lora__targets=["qproj"]))
    assert {"lora.targets", "eval.tasks.2.shots_path"} <= set(fields_of(problems))
    assert any("none.jsonl" in problem for problem in problems)
    (problem,) = problems_of(make(eval__tasks=tasks[:1]))
    assert problem.startswith("eval.tasks.0.name: 'loss' is the name of another metric")


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"method": "generation"}, "eval.tasks.0.method: got generation"),
        ({"chat_template": True}, "eval.tasks.0.chat_template: got true"),
    ],
)
def test_task_that_a_training_run_cannot_do_is_refused_by_its_field(
    make_config: MakeConfig, quiz: dict[str, Any], fields: dict[str, Any], wanted: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(eval__tasks=[{**quiz, **fields}])
    assert [problem.partition(",")[0] for problem in caught.value.problems] == [wanted]


def test_interval_of_tasks_without_tasks_is_refused(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"eval\.tasks_every: got 2, but tasks is empty"):
        make_config(eval__tasks_every=2)


def test_task_of_lm_eval_that_generates_is_refused_by_its_name(
    make: MakeConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "yaml"
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"q": "a", "a": "b"}\n')
    common = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}\n"
    common += "test_split: test\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
    (folder / "writes.yaml").write_text(f"task: writes\noutput_type: generate_until\n{common}")
    config = make(eval__tasks=[{"task": "writes", "include": str(folder)}])
    (problem,) = problems_of(config)
    assert problem.startswith("eval.tasks.0.task: writes is of lm-eval's type generate_until")


def test_tasks_may_be_added_or_left_out_but_not_changed(
    make: MakeConfig, quiz: dict[str, Any]
) -> None:
    def start(config: PretrainConfig) -> None:
        store = TokenStore.open(Path(config.data.store_dir))
        tasks = open_inputs(config).tasks
        prepare_run(config, store, None, tasks=tasks)  # pyright: ignore[reportArgumentType]

    bare, config = make(), make(eval__tasks=[quiz])
    start(bare)
    start(config)
    start(bare)
    assert list(read_identity(bare.run_place)[EVALUATED_KEY]) == ["eval.tasks.quiz"]
    write_quiz(Path(quiz["path"]), QUESTIONS[:3])
    with pytest.raises(ConfigError, match=r"eval\.tasks\.quiz\.files\.quiz\.jsonl: "):
        start(config)
    write_quiz(Path(quiz["path"]))
    start(config)
    with pytest.raises(ConfigError, match=r"eval\.tasks\.quiz\.settings\.limit: None -> 2"):
        start(make(eval__tasks=[{**quiz, "limit": 2}]))


def test_accuracies_are_in_the_log(
    make_config: MakeConfig, quiz: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "raytune_llama")
    config = make_config(eval__tasks=[quiz], max_steps=1)
    run_here(config)
    value = curve(config, ACCURACY)[0]
    assert not math.isnan(value)
    told = [message for message in caplog.messages if message.startswith("evaluation at step 0: ")]
    assert f"; quiz accuracy {value:.4f} (" in told[0]
