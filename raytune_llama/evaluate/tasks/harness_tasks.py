"""Tasks that lm-evaluation-harness defines itself, in its package or in a folder of YAML files."""

import difflib
import functools
import json
from collections.abc import Iterable
from typing import Any

from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from raytune_llama.evaluate.tasks.config import TaskConfig
from raytune_llama.evaluate.tasks.task import EvaluationTask
from raytune_llama.storage.hashes import Hasher, hash_file

FEWSHOT_SEED = 1234
"""Seed of the examples that such a task draws; lm-eval's own default."""


@functools.lru_cache(maxsize=4)
def _index(include: str | None) -> TaskManager:
    """Return lm-eval's index of all tasks, which takes seconds to build."""
    return TaskManager(include_path=include)


def load_harness_tasks(config: TaskConfig) -> tuple[dict[str, Any], str]:
    """Load a task, or all tasks of a group, with their data sets.

    Returns:
        lm-eval's `Task` objects by name, and what is wrong, empty if nothing is.
    """
    name = config.task
    assert name is not None
    manager = _index(config.include)
    if name not in manager.all_tasks:
        close = difflib.get_close_matches(name, manager.all_tasks, n=1)
        hint = f"did you mean {close[0]}?" if close else "`lm-eval ls tasks` lists them"
        return {}, f"lm-eval has no task or group {name!r}; {hint}"
    try:
        return dict(manager.load([name])["tasks"]), ""
    except (OSError, ValueError, KeyError, ImportError) as error:
        detail = " ".join(str(error).split())
        return {}, (
            f"its data set or its definition cannot be loaded ({type(error).__name__}: {detail}); "
            "without network it has to be in the cache of `datasets`"
        )


def build_harness_task(task: EvaluationTask) -> Task:
    """Load one of lm-eval's tasks, with the number of examples that the config wants.

    Raises:
        ValueError: Its data set can no longer be loaded.
    """
    assert task.harness_task is not None
    built: Task = _index(task.config.include).load([task.harness_task])["tasks"][task.harness_task]
    if task.config.shots is not None:
        built.set_config("num_fewshot", task.config.shots)
    elif built.get_config("num_fewshot") is None:
        built.set_config("num_fewshot", 0)
    built.set_fewshot_seed(FEWSHOT_SEED)
    return built


def hash_documents(config: TaskConfig, leaf: str, task: Task) -> dict[str, str]:
    """Return hashes of what decides the result: the YAML file, the questions and the examples.

    Args:
        config: Settings.
        leaf: Name of the task.
        task: The loaded task.
    """
    entry = _index(config.include).task_index.get(leaf)
    hashes: dict[str, str] = {}
    if entry is not None and entry.yaml_path is not None:
        hashes[entry.yaml_path.name] = hash_file(entry.yaml_path)
    hashes[f"{leaf}: questions"] = _hash_all(task.eval_docs)
    shots = config.shots if config.shots is not None else task.get_config("num_fewshot")
    if shots:
        hashes[f"{leaf}: examples"] = _hash_all(task.fewshot_docs())
    return hashes


def _hash_all(docs: Iterable[Any]) -> str:
    hasher = Hasher()
    for doc in docs:
        hasher.update(f"{json.dumps(doc, sort_keys=True, default=repr)}\n".encode())
    return hasher.finish()


def find_problem(task: Task) -> str:
    """Return why a task cannot be run here, empty if it can."""
    if getattr(task, "UNSAFE_CODE", False):
        return "it runs generated code; run it with lm-eval itself, in a sandbox"
    if getattr(task, "MULTIMODAL", False):
        return "it needs images or audio, which these models do not read"
    return ""
