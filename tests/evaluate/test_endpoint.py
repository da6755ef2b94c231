"""An endpoint is evaluated as the model directory behind it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import ConfigError, from_dict
from raytune_llama.evaluate.config import EvaluateConfig
from raytune_llama.evaluate.evaluation import evaluate
from raytune_llama.serve.backend import LoadedModel
from raytune_llama.serve.config import ServeConfig, ServedModelConfig
from raytune_llama.storage.files import read_json
from tests.evaluate.test_evaluation import write_questions
from tests.serve.http.test_routes import Server


@pytest.fixture(scope="module")
def url(model_dir: Path) -> Iterator[str]:
    model = ServedModelConfig(path=str(model_dir), name="tiny")
    loaded = LoadedModel(model, ServeConfig(models=(model,)))
    server = Server({"tiny": loaded})
    yield str(server.client().base_url).rstrip("/")
    loaded.close()
    server.close()


@pytest.fixture
def values(tmp_path: Path, model_dir: Path, url: str) -> dict[str, Any]:
    write_questions(tmp_path / "one.jsonl", 6)
    (tmp_path / "prompts.txt").write_text("the quick\n我们 喜欢\n", encoding="utf-8")
    questions = {"path": str(tmp_path / "one.jsonl"), "format": "choices"}
    return {
        "run_dir": str(tmp_path / "evaluation"),
        "models": [
            {"path": str(model_dir), "name": "directory"},
            {
                "base_url": url,
                "model": "tiny",
                "tokenizer": str(model_dir),
                "name": "endpoint",
            },
        ],
        "tasks": [
            {**questions, "name": "scored"},
            {**questions, "name": "asked", "method": "generation", "chat_template": True},
            {**questions, "name": "continued", "method": "generation"},
        ],
        "answers": {"prompts": str(tmp_path / "prompts.txt"), "max_tokens": 8},
    }


def test_endpoint_has_the_scores_and_answers_of_its_model(values: dict[str, Any]) -> None:
    config = from_dict(EvaluateConfig, values)
    evaluate(config)
    folder = Path(config.run_dir) / "parts"
    results = [read_json(file) for file in folder.glob("*.json")]
    answers = [result["answers"] for result in results if "answers" in result]
    assert len(answers) == 2
    assert answers[0] == answers[1]
    by_task: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        if "task" in result:
            by_task.setdefault(result["task"], []).append(result)
    assert sorted(by_task) == ["asked", "continued", "scored"]
    for one, other in by_task.values():
        pairs = zip(one["samples"], other["samples"], strict=True)
        for sample, peer in pairs:
            assert sample["answer"] == peer["answer"]
            assert sample["output"] == peer["output"]
            assert sample["scores"] == pytest.approx(peer["scores"], abs=1e-3)


def plain_reply(token_logprobs: list[float | None] | None) -> dict[str, Any]:
    logprobs = None
    if token_logprobs is not None:
        tops = [{} for _ in token_logprobs]
        logprobs = {"token_logprobs": token_logprobs, "top_logprobs": tops, "tokens": []}
    return {"choices": [{"index": 0, "text": "x", "logprobs": logprobs}]}


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (plain_reply([-0.5]), "log-probabilities of 1 tokens .* does not support `echo`"),
        (plain_reply(None), r"in another form than OpenAI's \(TypeError"),
        ({"choices": []}, r"in another form than OpenAI's \(IndexError"),
        ({"error": "busy"}, r"in another form than OpenAI's \(KeyError"),
    ],
)
def test_endpoint_without_log_probabilities_of_prompts_is_refused(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, reply: dict[str, Any], error: str
) -> None:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    monkeypatch.setattr(LocalCompletionsAPI, "model_call", lambda *_args, **_fields: reply)
    values |= {"models": [values["models"][1]], "tasks": [values["tasks"][0]], "answers": None}
    with pytest.raises(UserError, match=error):
        evaluate(from_dict(EvaluateConfig, values))


def test_unknown_model_is_named(values: dict[str, Any]) -> None:
    values["models"] = [{**values["models"][1], "model": "other"}]
    values["tasks"] = []
    with pytest.raises(ConfigError, match=r"models\.0\.model: .* has no model 'other'.*tiny"):
        evaluate(from_dict(EvaluateConfig, values))


def test_endpoint_that_is_down_is_named(values: dict[str, Any]) -> None:
    values["models"] = [{**values["models"][1], "base_url": "http://127.0.0.1:9/v1"}]
    with pytest.raises(ConfigError, match=r"models\.0\.base_url: http://127.0.0.1:9/v1 can't be"):
        evaluate(from_dict(EvaluateConfig, values))
