"""EleutherAI's lm-evaluation-harness: the endpoint's scores are those of the model in-process.

Its own quick start for a server is

    lm_eval --model local-completions --tasks TASK \
        --model_args model=NAME,base_url=http://127.0.0.1:8000/v1/completions,tokenizer=MODEL_DIR

`simple_evaluate` is what that command calls. The tasks are in `tasks/`, with their data.
"""

import os
from functools import cache
from pathlib import Path
from typing import Any

os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import lm_eval
from lm_eval.tasks import TaskManager
from steps import Endpoint, run

FOLDER = Path(__file__).with_name("tasks")
TASKS = ("raytune_choice", "raytune_perplexity", "raytune_answer")
TOLERANCE = 1e-4


def evaluate(task: str, model: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics of a task, and for each sample what the model said."""
    os.chdir(FOLDER)  # where the tasks' data is
    simple_evaluate: Any = lm_eval.simple_evaluate  # a decorator hides its arguments
    found = simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=[task],
        task_manager=TaskManager(include_path=str(FOLDER), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
        batch_size=4,
        device="cpu" if model == "hf" else None,
    )
    metrics = {
        name: value for name, value in found["results"][task].items() if isinstance(value, float)
    }
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return {"metrics": metrics, "answers": [sample["filtered_resps"] for sample in samples]}


@cache
def evaluate_here(task: str, model_dir: str) -> dict[str, Any]:
    return evaluate(task, "hf", {"pretrained": model_dir, "dtype": "float32"})


def compare(endpoint: Endpoint, task: str, **arguments: Any) -> object:
    """Evaluate a task at the endpoint and in this process; return the metrics.

    Raises:
        AssertionError: they differ.
    """
    os.environ["OPENAI_API_KEY"] = endpoint.key
    there = evaluate(
        task,
        "local-completions",
        {
            "model": endpoint.model,
            "base_url": f"{endpoint.url}/completions",
            "tokenizer": endpoint.model_dir,
            "max_length": 4096,
            **arguments,
        },
    )
    here = evaluate_here(task, endpoint.model_dir)
    assert there["metrics"].keys() == here["metrics"].keys()
    for name, value in here["metrics"].items():
        assert abs(value - there["metrics"][name]) <= TOLERANCE * max(1, abs(value)), (here, there)
    assert len(here["answers"]) == len(there["answers"])
    for ours, theirs in zip(_flat(here["answers"]), _flat(there["answers"]), strict=True):
        same = ours == theirs if isinstance(ours, str | bool) else abs(ours - theirs) <= TOLERANCE
        assert same, f"{task}: {ours} in this process, {theirs} at the endpoint"
    return there["metrics"]


def _flat(value: Any) -> list[Any]:
    """Return the numbers, texts and flags in nested lists."""
    if isinstance(value, list | tuple):
        return [part for one in value for part in _flat(one)]
    return [value]


def choice(endpoint: Endpoint) -> object:
    return compare(endpoint, "raytune_choice")


def choice_several_at_a_time(endpoint: Endpoint) -> object:
    return compare(endpoint, "raytune_choice", num_concurrent=2, max_retries=3)


def choice_with_prompts_as_text(endpoint: Endpoint) -> object:
    return compare(endpoint, "raytune_choice", tokenized_requests=False)


def perplexity(endpoint: Endpoint) -> object:
    return compare(endpoint, "raytune_perplexity")


def generation(endpoint: Endpoint) -> object:
    return compare(endpoint, "raytune_answer")


if __name__ == "__main__":
    run(choice, choice_several_at_a_time, choice_with_prompts_as_text, perplexity, generation)
