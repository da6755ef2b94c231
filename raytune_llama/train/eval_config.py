"""Settings of evaluation and early stopping."""

from typing import Annotated

from pydantic import Field, model_validator

from raytune_llama.config.settings import FINGERPRINTED, PLACEMENT, ConfigError, settings
from raytune_llama.data.batches.config import source_names
from raytune_llama.data.readers.config import SourceConfig
from raytune_llama.evaluate.tasks.config import TaskConfig


@settings
class EvalConfig:
    """Evaluation on validation documents, texts and tasks, before, during and after training."""

    every_steps: Annotated[int, Field(ge=1)] | None = 100
    """Optimizer steps between evaluations; null: before the first and after the last only."""

    patience: Annotated[int, Field(ge=1)] | None = None
    """Evaluations in a row without a lower loss that stop the run early; null: never."""

    max_sequences: Annotated[int, Field(ge=1)] | None = 256
    """Sequences per evaluation, in proportion to the sources' sizes, evenly spaced; null: all. The
    sequences of `texts` are chosen apart, up to the same number."""

    texts: Annotated[tuple[SourceConfig, ...], FINGERPRINTED] = ()
    """Held-out text that every evaluation reads too, in runs on conversations as well: how much of
    it tuning makes the model forget, as `eval/text/bits_per_byte`. It is packed as in pre-training,
    it must have no weights, and it does not affect which step is the best."""

    store_dir: Annotated[Annotated[str, Field(min_length=1)] | None, PLACEMENT] = None
    """Directory of the token store of `texts`, which is built like the one in `data.store_dir`;
    null: `data.store_dir` with `-texts` added to its name."""

    tasks: Annotated[tuple[TaskConfig, ...], FINGERPRINTED] = ()
    """Tasks with right answers that the model in training is asked, by the log-likelihoods of their
    options: `eval/NAME/accuracy` is the share of right answers of all questions, NAME being the
    benchmark. Each option is a forward pass of its whole prompt, so keep the sets small (`limit`).
    They do not affect which step is the best."""

    tasks_every: Annotated[int, Field(ge=1)] = 1
    """Evaluations between two that include `tasks`; the ones before the first step and after the
    last always do."""

    @model_validator(mode="after")
    def _check(self) -> "EvalConfig":
        problems: list[str] = []
        if self.tasks_every > 1 and not self.tasks:
            problems.append(f"tasks_every: got {self.tasks_every}, but tasks is empty; remove it")
        problems += [
            f"tasks.{number}.method: got generation, but a training run generates no answers; set "
            "likelihood, or evaluate the task after training"
            for number, task in enumerate(self.tasks)
            if task.method == "generation"
        ]
        if self.patience is not None and self.every_steps is None:
            problems.append(
                f"patience: got {self.patience}, but every_steps is null; set both, or neither"
            )
        if self.store_dir is not None and not self.texts:
            problems.append(
                f"store_dir: got {self.store_dir}, but texts is empty; set both, or neither"
            )
        problems += [
            f"texts.{number}.weight: got {text.weight}, but texts are not trained on; remove it"
            for number, text in enumerate(self.texts)
            if text.weight is not None
        ]
        names = source_names(self.texts)
        problems += [
            f"texts.{number}.name: {name!r} is also the name of texts.{names.index(name)}; give "
            "one of them another name"
            for number, name in enumerate(names)
            if names.index(name) < number
        ]
        if problems:
            raise ConfigError(problems)
        return self
