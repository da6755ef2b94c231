"""Settings of an evaluation: models, and what they are evaluated on."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from raytune_llama.chat.config import TemplateName
from raytune_llama.config.node_selection import NodeSelection, check_node_selection
from raytune_llama.config.paths import path_name
from raytune_llama.config.settings import ConfigError, settings
from raytune_llama.data.readers.config import SourceConfig
from raytune_llama.evaluate.tasks.config import TaskConfig


@settings
class EvaluatedModelConfig:
    """A model to evaluate: a directory, a base with adapters, or a running endpoint."""

    path: Annotated[str, Field(min_length=1)] | None = None
    """Model directory, local, `s3://...` or `gs://...`, or a model on the hub,
    `hf://org/name[@revision]`; null: an endpoint."""

    adapters: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Adapter directories on top of `path`, where that may be, in the order in which they were
    trained. One is applied as it is served; several are merged first, in a temporary directory in
    `run_dir`."""

    base_url: Annotated[str, Field(pattern=r"^https?://")] | None = None
    """Address of a running endpoint with OpenAI's API, such as http://127.0.0.1:8000/v1; its key is
    read from OPENAI_API_KEY. Null: a model directory."""

    model: Annotated[str, Field(min_length=1)] | None = None
    """Name of the model at the endpoint, such as `model:adapter`."""

    tokenizer: Annotated[str, Field(min_length=1)] | None = None
    """Directory of the endpoint's tokenizer, which tasks need to take log-likelihoods apart; null:
    the endpoint is only asked for generated answers."""

    name: Annotated[str, Field(pattern=r"^[\w.:+@ -]+$")] | None = None
    """Unique name in the report; null: the last part of the path, with those of the adapters."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Data type of the weights; auto: as stored, but fp32 on CPUs."""

    template: TemplateName | None = None
    """Chat template; null: the one the model was tuned with, or else the tokenizer's own."""

    allow_other_template: bool = False
    """Whether the template may differ from the one that the model was tuned with."""

    max_context: Annotated[int, Field(ge=2)] | None = None
    """Maximum tokens per sequence, prompt and answer; null: the model's number of positions."""

    @model_validator(mode="after")
    def _check(self) -> "EvaluatedModelConfig":
        problems: list[str] = []
        if (self.path is None) == (self.base_url is None):
            problems.append("path: set either path, or base_url of a running endpoint")
        if self.base_url is not None:
            if self.model is None:
                problems.append("model: required with base_url; `curl BASE_URL/models` lists them")
            wanted = {"adapters": (), "precision": "auto", "template": None, "max_context": None}
            problems += [
                f"{name}: got {getattr(self, name)!r}, but the endpoint decides it; remove it"
                for name, value in wanted.items()
                if getattr(self, name) != value
            ]
        else:
            problems += [
                f"{name}: got {getattr(self, name)!r}, which is only for base_url; remove it"
                for name in ("model", "tokenizer")
                if getattr(self, name) is not None
            ]
        if problems:
            raise ConfigError(problems)
        return self

    @property
    def label(self) -> str:
        """Name in the report."""
        if self.name is not None:
            return self.name
        if self.path is None:
            return str(self.model)
        return " + ".join(path_name(path) for path in (self.path, *self.adapters))


@settings
class TextsConfig:
    """Evaluation on plain text: bits per byte and perplexity."""

    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    """Text corpora, as a token store takes them; each gets its own result. Weights must be null."""

    sequence_tokens: Annotated[int, Field(ge=2)] | None = None
    """Tokens per sequence, which limits how much text before it a token is predicted from; null:
    1024, or the model's number of positions if that is less."""

    isolate_documents: bool = True
    """Whether documents do not attend to each other."""

    @model_validator(mode="after")
    def _check(self) -> "TextsConfig":
        problems = [
            f"sources.{number}.weight: got {source.weight}, but all text is evaluated; remove it"
            for number, source in enumerate(self.sources)
            if source.weight is not None
        ]
        if problems:
            raise ConfigError(problems)
        return self


@settings
class AnswersConfig:
    """Greedily generated answers to prompts, for reading side by side."""

    prompts: Annotated[str, Field(min_length=1)]
    """UTF-8 text file with one prompt per line; empty lines are skipped."""

    max_prompts: Annotated[int, Field(ge=1)] | None = 20
    """Number of prompts to answer, from the start of the file; null: all."""

    with_prompt: bool = True
    """Whether each line is sent as a user's message with the chat template; false: the model
    continues the line."""

    max_tokens: Annotated[int, Field(ge=1)] = 200
    """Maximum tokens of an answer."""


@settings
class EvaluationScale(NodeSelection):
    """Where models are evaluated."""

    num_workers: Annotated[int, Field(ge=0)] = 0
    """Ray actors that share the work, each with a copy of the model; 0: this process, without Ray.
    Results do not depend on it."""

    use_gpu: bool = False
    """Whether models run on GPUs, one per worker."""

    cpus_per_worker: Annotated[int, Field(ge=1)] = 1
    """CPUs reserved per worker, and its number of compute threads. Without workers, all CPUs of the
    machine are used."""

    @model_validator(mode="after")
    def _check(self) -> "EvaluationScale":
        problems = check_node_selection(self, use_gpu=self.use_gpu)
        if self.num_workers == 0:
            problems += [
                f"{field}: set, but with num_workers=0 models are evaluated in this process; set "
                "num_workers, or remove it"
                for field in ("accelerator_type", "label_selector")
                if getattr(self, field)
            ]
        if problems:
            raise ConfigError(problems)
        return self


@settings
class EvaluateConfig:
    """An evaluation of one or several models, side by side."""

    run_dir: Annotated[str, Field(min_length=1)]
    """Directory of the results. The same command with the same directory resumes; what is done is
    evaluated again only if the model, the questions or the settings have changed."""

    models: Annotated[tuple[EvaluatedModelConfig, ...], Field(min_length=1)]
    """Models to evaluate; the report shows the others' difference to the first."""

    texts: TextsConfig | None = None
    """Plain text to evaluate on; null: none."""

    tasks: tuple[TaskConfig, ...] = ()
    """Questions with known answers."""

    answers: AnswersConfig | None = None
    """Prompts to answer; null: none."""

    scale: EvaluationScale = EvaluationScale()
    """Where models are evaluated."""

    @model_validator(mode="after")
    def _check(self) -> "EvaluateConfig":
        problems: list[str] = []
        if self.texts is None and not self.tasks and self.answers is None:
            problems.append("tasks: nothing to evaluate on; set texts, tasks or answers")
        labels = [model.label for model in self.models]
        problems += [
            f"models.{number}.name: {label!r} is also the name of models.{labels.index(label)}; "
            "set another one"
            for number, label in enumerate(labels)
            if labels.index(label) != number
        ]
        for number, model in enumerate(self.models):
            if model.base_url is None:
                continue
            if self.texts is not None:
                problems.append(
                    f"models.{number}.base_url: texts are evaluated on model directories only; "
                    "set path, or leave texts out"
                )
            if self.answers is not None and not self.answers.with_prompt:
                problems.append(
                    f"models.{number}.base_url: an endpoint answers messages only; set "
                    "answers.with_prompt=true"
                )
            if model.tokenizer is None and any(task.method == "likelihood" for task in self.tasks):
                problems.append(
                    f"models.{number}.tokenizer: required for log-likelihoods at an endpoint; give "
                    "the directory of its tokenizer, or set method=generation for all tasks"
                )
        if problems:
            raise ConfigError(problems)
        return self
