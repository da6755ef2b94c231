"""Computes units of work: loads a model for the first one, and keeps it for the next ones."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from raytune_llama.chat.conversations import Conversation, Turn
from raytune_llama.config.errors import UserError
from raytune_llama.evaluate.config import AnswersConfig, EvaluatedModelConfig
from raytune_llama.evaluate.models import InProcessModel, PromptIds, load_model
from raytune_llama.evaluate.results import GeneratedAnswer
from raytune_llama.evaluate.tasks.task import EvaluationTask
from raytune_llama.evaluate.texts import TextBlock, evaluate_block
from raytune_llama.serve.engine.protocol import SamplingOptions

if TYPE_CHECKING:
    from raytune_llama.evaluate.language_model import ServedLanguageModel


@dataclass(frozen=True)
class TaskUnit:
    """One subject or file of questions; picklable."""

    task: EvaluationTask
    """The task with its questions."""

    @property
    def name(self) -> str:
        """Name in log lines."""
        return f"{self.task.name}, {self.task.num_questions} questions"

    def identity(self) -> dict[str, Any]:
        """Return what decides the result, besides the model."""
        task = self.task
        config = {k: v for k, v in asdict(task.config).items() if k not in ("path", "shots_path")}
        return {
            "task": task.name,
            "config": config,
            "questions": [asdict(question) for question in (*task.questions, *task.shots)],
            # Those of an lm-eval task are in its files only.
            "files": dict(task.file_hashes) if task.harness_task is not None else {},
        }


@dataclass(frozen=True)
class AnswersUnit:
    """Prompts to answer; picklable."""

    config: AnswersConfig
    """How they are answered."""

    prompts: tuple[str, ...]
    """The prompts."""

    @property
    def name(self) -> str:
        """Name in log lines."""
        return f"answers to {len(self.prompts)} prompts"

    def identity(self) -> dict[str, Any]:
        """Return what decides the result, besides the model."""
        config = self.config
        return {
            "prompts": list(self.prompts),
            "with_prompt": config.with_prompt,
            "max_tokens": config.max_tokens,
        }


Unit = TextBlock | TaskUnit | AnswersUnit
"""A unit of work, whose result is kept."""


class EvaluationWorker:
    """Computes the units of one model, in this process or as a Ray actor."""

    def __init__(
        self,
        config: EvaluatedModelConfig,
        *,
        field: str,
        scratch: Path,
        use_gpu: bool,
        num_threads: int | None,
    ) -> None:
        """Remember what to load; nothing is loaded yet.

        Args:
            config: the model.
            field: its config field, for errors.
            scratch: directory for a temporary merge of adapters.
            use_gpu: whether to compute on the GPU.
            num_threads: compute threads; None: PyTorch's own number.
        """
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self._config, self._field = config, field
        self._scratch, self._use_gpu = scratch, use_gpu
        self._model: InProcessModel | None = None
        self._lm: ServedLanguageModel | None = None

    def run(self, unit: Unit) -> dict[str, Any]:
        """Return the result of a unit as JSON data.

        Raises:
            ConfigError: the model can't be loaded.
            UserError: the model can't be asked what the unit asks.
        """
        if isinstance(unit, TextBlock):
            return evaluate_block(self._load(), unit)
        if isinstance(unit, TaskUnit):
            return self._run_task(unit.task)
        return {"answers": [asdict(answer) for answer in self._answer(unit)]}

    def run_numbered(self, number: int, unit: Unit) -> tuple[int, dict[str, Any]]:
        """Return a number with the result of a unit: Ray's results come in any order."""
        return number, self.run(unit)

    def _load(self) -> InProcessModel:
        if self._model is None:
            self._model = load_model(
                self._config, field=self._field, scratch=self._scratch, use_gpu=self._use_gpu
            )
        return self._model

    def _run_task(self, task: EvaluationTask) -> dict[str, Any]:
        # lm-eval's packages are only needed for tasks.
        from raytune_llama.evaluate.tasks.harness import run_task

        if self._config.path is None:
            from raytune_llama.evaluate.endpoint import build_endpoint_lm, failures_named

            with failures_named(self._config):
                return run_task(task, build_endpoint_lm(self._config, task)).to_json()
        from raytune_llama.evaluate.language_model import ServedLanguageModel

        if self._lm is None:
            self._lm = ServedLanguageModel(self._load())
        return run_task(task, self._lm).to_json()

    def _answer(self, unit: AnswersUnit) -> Sequence[GeneratedAnswer]:
        if self._config.path is None:
            from raytune_llama.evaluate.endpoint import answer_prompts, failures_named

            with failures_named(self._config):
                return answer_prompts(self._config, unit.config, unit.prompts, api_key())
        model = self._load()
        requests = [_prepare(model, unit.config, prompt) for prompt in unit.prompts]
        return [
            GeneratedAnswer(prompt, answer.text, answer.finish_reason or "stop")
            for prompt, answer in zip(unit.prompts, model.generate(requests), strict=True)
        ]


def api_key() -> str | None:
    """Return the key of endpoints from the environment; None: there is none."""
    return os.environ.get("OPENAI_API_KEY") or None


def _prepare(model: InProcessModel, config: AnswersConfig, prompt: str) -> PromptIds:
    """Return the ids of a prompt to answer."""
    served = model.served
    if not config.with_prompt:
        ids = served.encode_texts([prompt])[0]
    elif served.chat is None:
        raise UserError(
            f"answers.with_prompt: {served.name} has no chat template; set it to false, or "
            "models.N.template"
        )
    else:
        conversation = Conversation((Turn("user", prompt),))
        ids = served.chat.encode_prompt(conversation).tolist()
    if len(ids) >= served.max_context:
        raise UserError(
            f"answers.prompts: a prompt has {len(ids)} tokens, and {served.name} has "
            f"{served.max_context} positions; shorten it"
        )
    greedy = SamplingOptions(temperature=0)
    return PromptIds(tuple(ids), greedy, config.max_tokens, continues_text=not config.with_prompt)
