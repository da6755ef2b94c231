"""A task from files as lm-evaluation-harness sees it: prompts, requests and scores."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

from raytune_llama.config.errors import UserError
from raytune_llama.evaluate.tasks.extraction import find_letter, find_text
from raytune_llama.evaluate.tasks.outcome import Sample
from raytune_llama.evaluate.tasks.prompts import (
    answer_label,
    answer_labels,
    render_description,
    render_example,
    render_question,
)
from raytune_llama.evaluate.tasks.task import EvaluationTask, Question

_DELIMITER = "\n\n"
_SPLIT = "questions"
_LOWEST = -1e30
"""Logarithm of a probability of 0: JSON has no infinity."""


class LocalTask(ConfigurableTask):
    """A task whose questions are in memory.

    Its documents are only indices, `{"index": i}` of a question or `{"shot": i}` of an example, so
    that no copy of the texts is made and nothing is written to the cache of `datasets`.

    Args:
        task: Questions and settings.
    """

    def __init__(self, task: EvaluationTask) -> None:
        self._task = task
        self._description = render_description(task)
        is_generation = task.config.method == "generation"
        names = [] if not task.has_answers else ["acc"]
        if names and not is_generation and task.config.option_style == "texts":
            names.append("acc_norm")
        config: dict[str, Any] = {
            "task": task.name,
            "test_split": _SPLIT,
            "num_fewshot": len(task.shots),
            "fewshot_config": {
                "sampler": "first_n",
                "samples": [{"shot": index} for index in range(len(task.shots))],
            },
            "target_delimiter": "",
            "fewshot_delimiter": _DELIMITER,
            "output_type": "generate_until" if is_generation else "multiple_choice",
            # The aggregation and its standard error are lm-eval's; the scores of a question ours.
            "process_results": self.process_results,
            "metric_list": [
                {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names
            ],
        }
        if is_generation:
            config["generation_kwargs"] = {
                "until": [] if task.config.chat_template else [_DELIMITER],
                "do_sample": False,
                "temperature": 0.0,
                "max_gen_toks": task.config.max_answer_tokens,
            }
        super().__init__(config=config)

    # The arguments of the methods below are those that lm-eval calls them with.

    def download(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
        """Put the indices of the questions where lm-eval expects a data set."""
        indices = [{"index": index} for index in range(len(self._task.questions))]
        self.dataset = {_SPLIT: Dataset.from_list(indices)}

    def question(self, doc: Mapping[str, int]) -> Question:
        """Return the question or example of a document."""
        if "shot" in doc:
            return self._task.shots[doc["shot"]]
        return self._task.questions[doc["index"]]

    def doc_to_text(self, doc: dict[str, int], doc_to_text: object = None) -> str:  # noqa: ARG002
        """Return a question as text; the first one of a prompt begins with the description."""
        text = render_question(self._task, self.question(doc))
        is_first = doc.get("shot") == 0 if self._task.shots else True
        return f"{self._description}{_DELIMITER}{text}" if is_first and self._description else text

    def doc_to_target(self, doc: Mapping[str, int], doc_to_target: object = None) -> str:  # noqa: ARG002
        """Return the right answer, for an example as it continues its question; may be empty."""
        question = self.question(doc)
        if "shot" in doc:
            return render_example(self._task, question)[1]
        return "" if question.gold is None else answer_label(self._task, question, question.gold)

    def doc_to_choice(self, doc: dict[str, int], doc_to_choice: object = None) -> list[str]:  # noqa: ARG002
        """Return all forms of the first option, then of the second, and so on."""
        labels = answer_labels(self._task, self.question(doc))
        return [form.format(label) for label in labels for form in self._forms]

    @property
    def _forms(self) -> tuple[str, ...]:
        return self._task.config.forms

    def process_results(self, doc: dict[str, int], results: list[Any]) -> dict[str, float]:
        """Return the scores of one question; none if the right answer is unknown."""
        sample = self.build_sample(doc, results)
        if sample.correct is None:
            return {}
        return {"acc": float(sample.correct), **(sample.metrics or {})}

    def build_sample(self, doc: Mapping[str, int], results: Sequence[Any]) -> Sample:
        """Return what the model answered to a question.

        Args:
            doc: Document of the question.
            results: `(log-likelihood, is greedy)` of each form of each option, or one generated
                text.
        """
        question = self.question(doc)
        scores: tuple[float, ...] = ()
        output: str | None = None
        metrics: dict[str, float] | None = None
        if self._task.config.method == "generation":
            output = str(results[0])
            is_letters = self._task.config.option_style == "letters"
            chosen = (
                find_letter(output, len(question.options))
                if is_letters
                else find_text(output, question.options)
            )
        else:
            scores = self._score_options([float(one[0]) for one in results])
            chosen = scores.index(max(scores))
            if self._task.config.option_style == "texts" and question.gold is not None:
                metrics = {"acc_norm": float(_best_by_length(scores, question) == question.gold)}
        is_known = question.gold is not None
        return Sample(
            id=question.id,
            question=question.text,
            options=question.options,
            scores=scores,
            answer=None if chosen is None else answer_label(self._task, question, chosen),
            gold=self.doc_to_target(doc) if is_known else None,
            correct=chosen == question.gold if is_known else None,
            output=output,
            metrics=metrics,
        )

    def _score_options(self, scores: Sequence[float]) -> tuple[float, ...]:
        """Sum the probabilities of each option's forms; return their logarithms."""
        size = len(self._forms)
        return tuple(
            _log_sum(scores[start : start + size]) for start in range(0, len(scores), size)
        )


def _log_sum(scores: Sequence[float]) -> float:
    if any(math.isnan(score) for score in scores):
        raise UserError("the model's log-likelihoods are not numbers; its weights may be damaged")
    highest = max(scores)
    if highest == -math.inf:
        return _LOWEST
    return highest + math.log(sum(math.exp(score - highest) for score in scores))


def _best_by_length(scores: Sequence[float], question: Question) -> int:
    """Return the option with the highest log-likelihood per character, as lm-eval's `acc_norm`."""
    relative = [
        score / max(len(option), 1) for score, option in zip(scores, question.options, strict=True)
    ]
    return relative.index(max(relative))
