"""Settings of a task: where its questions are, and how a model is asked."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from raytune_llama.config.settings import PLACEMENT, ConfigError, settings

TaskFormat = Literal["ceval", "cmmlu", "calm", "choices"]
"""Formats of files with questions."""
Split = Literal["val", "test", "dev"]
"""Parts of a benchmark; `dev` holds the examples that are shown before a question."""

SPLITS: dict[TaskFormat, tuple[Split, ...]] = {
    "ceval": ("val", "test", "dev"),
    "cmmlu": ("test", "dev"),
    "calm": (),
    "choices": (),
}
"""Splits of each format, its default first."""

_FILE_FIELDS = (
    "format",
    "split",
    "subjects",
    "shots_path",
    "options",
    "positive",
    "answer_forms",
    "description",
    "prompt",
    "ignore_fields",
)
"""Fields that only apply to tasks from files; null or empty by default."""


@settings
class TaskConfig:
    """Settings of one benchmark: files of questions, or a task of lm-evaluation-harness."""

    path: Annotated[Annotated[str, Field(min_length=1)] | None, PLACEMENT] = None
    """Local or `s3://...`, `gs://...`. For `ceval` and `cmmlu`: the folder that holds the folders
    of the splits (`dev`, `val`, `test`) with one CSV file per subject. For `calm` and `choices`: a
    JSON or JSON Lines file, or a folder or glob of them, one task per file. Null: set `task`."""

    format: TaskFormat | None = None
    """Format of the files at `path`. `ceval`, `cmmlu`: CSV with the columns `question`, `A` to `D`
    and `answer`. `calm`: objects with `id`, `query`, `choices` and `gold` or `answer`. `choices`:
    objects with `question`, `choices` and `answer`, which is an index, a letter or the text of an
    option. Required with `path`."""

    task: Annotated[str, Field(min_length=1)] | None = None
    """Name of a task or group of lm-evaluation-harness (`lm-eval ls tasks` lists them), or of one
    in `include`. Its data set is a local file, or in the cache of `datasets`, or it is downloaded
    unless HF_HUB_OFFLINE=1 is set. Null: set `path`."""

    include: Annotated[Annotated[str, Field(min_length=1)] | None, PLACEMENT] = None
    """Folder of YAML files in lm-evaluation-harness's format, for `task`."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None = None
    """Unique name in results. Null: `task`, or `format`, or for a single `calm` or `choices` file
    its name without suffix."""

    shots: Annotated[int, Field(ge=0, le=5)] | None = None
    """Number of examples with answers before each question: the first rows of the `dev` split or of
    `shots_path`. Null: 0, or the number that an lm-eval task sets."""

    shots_path: Annotated[Annotated[str, Field(min_length=1)] | None, PLACEMENT] = None
    """File of examples in the same format, for `calm` and `choices`; required there if `shots` is
    above 0. `ceval` and `cmmlu` take them from their `dev` split."""

    split: Split | None = None
    """Split to evaluate. Null: `val` for `ceval`, `test` for `cmmlu`. The test split of `ceval` has
    no answers: it yields a `submission.json` instead of an accuracy."""

    subjects: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Subjects to evaluate, such as `[law, logic]`; `ceval` and `cmmlu` only. Null: all that have a
    file."""

    ignore_fields: tuple[str, ...] = ()
    """Fields of `calm` and `choices` rows that are known and not used; others are refused."""

    limit: Annotated[int, Field(ge=1)] | None = None
    """Maximum number of questions per subject or file, in file order. Null: all."""

    method: Literal["likelihood", "generation"] = "likelihood"
    """How an answer is found. `likelihood`: the option with the highest log-likelihood, so that
    every question has one. `generation`: from a greedily generated text, in which a missing answer
    counts as wrong and is counted. An lm-eval task sets its own: leave the default."""

    options: Literal["letters", "texts"] | None = None
    """How a question shows its options; `choices` only. `letters`: all options are listed with
    letters, and a letter is the answer. `texts`: none is listed, the texts themselves are scored,
    also normalized by length (`acc_norm`). Null: `letters`; `texts` for `calm`."""

    answer_forms: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Continuations of the prompt that count as an option, `{}` being the letter or text. An
    option's likelihood is the sum over its forms, which are different tokens in most tokenizers.
    Null: `['{}', ' {}']`."""

    positive: Annotated[str, Field(min_length=1)] | None = None
    """Option whose F1, precision and recall are reported beside the macro average, such as `bad`;
    `calm` and `choices` with `options: texts`. Null: only the macro average."""

    description: str | None = None
    """Text before the first example or question, `{subject}` being the subject's Chinese name; with
    a chat template, at the start of the first user turn. Null: one sentence in Chinese for `ceval`
    and `cmmlu`, nothing for others."""

    prompt: Annotated[str, Field(min_length=1)] | None = None
    """Text of a question: `{question}` is replaced, and `{options}`, the options with their letters
    (not with `options: texts`). Null: the usual form of each benchmark, which ends with a cue such
    as `Answer:`."""

    chat_template: bool = False
    """Whether prompts go through the model's own chat template, examples as earlier turns. Its hash
    is part of the results."""

    truncate: Literal["left", "refuse"] = "left"
    """What happens to prompts that are longer than the model's context: `left` cuts their start and
    counts them; `refuse` fails and names them."""

    max_answer_tokens: Annotated[int, Field(ge=1)] = 64
    """Maximum number of generated tokens per answer; `generation` only."""

    @model_validator(mode="after")
    def _check(self) -> "TaskConfig":
        if (self.path is None) == (self.task is None):
            raise ConfigError(
                ["path: set either path (with format) or task, and the other to null"]
            )
        problems = self._check_harness() if self.path is None else self._check_files()
        if problems:
            raise ConfigError(problems)
        return self

    def _check_harness(self) -> list[str]:
        given = [name for name in _FILE_FIELDS if getattr(self, name)]
        problems = [f"{name}: only for tasks from files (path); remove it" for name in given]
        if self.method != "likelihood":
            problems.append("method: an lm-eval task sets its own; remove it")
        return problems

    def _check_files(self) -> list[str]:
        if self.format is None:
            return ["format: required with path; set ceval, cmmlu, calm or choices"]
        problems = self._check_splits(self.format)
        if self.include is not None:
            problems.append("include: only for task; remove it")
        if self.options is not None and self.format != "choices":
            problems.append(f"options: only for format choices, got format {self.format}")
        if self.positive is not None and self.option_style != "texts":
            problems.append("positive: only where options are texts, not letters; remove it")
        problems += self._check_prompt()
        return problems

    def _check_splits(self, task_format: TaskFormat) -> list[str]:
        splits, problems = SPLITS[task_format], list[str]()
        if self.split is not None and self.split not in splits:
            wanted = " or ".join(splits) or "null"
            problems.append(f"split: got {self.split}, wanted {wanted} for format {task_format}")
        if not splits and self.subjects is not None:
            problems.append("subjects: only for formats ceval and cmmlu; remove it")
        if splits and self.ignore_fields:
            problems.append("ignore_fields: only for formats calm and choices; remove it")
        if self.subjects is not None and len(set(self.subjects)) < len(self.subjects):
            problems.append("subjects: a subject is named more than once; remove it")
        if splits and self.shots_path is not None:
            problems.append(
                f"shots_path: {task_format} takes examples from its dev split; remove it"
            )
        if not splits and bool(self.shots) != (self.shots_path is not None):
            problems.append("shots_path: set it if and only if shots is above 0")
        if self.split == "dev" and self.shots:
            problems.append("shots: the examples are the dev split, which is evaluated; set 0")
        return problems

    def _check_prompt(self) -> list[str]:
        problems: list[str] = []
        if self.prompt is not None and "{question}" not in self.prompt:
            problems.append("prompt: contains no {question}")
        lists_options = self.option_style == "letters"
        if self.prompt is not None and ("{options}" in self.prompt) != lists_options:
            wanted = (
                "contains no {options}" if lists_options else "contains {options}, but no letter"
            )
            problems.append(f"prompt: {wanted}; see options")
        forms = self.answer_forms or ()
        if self.answer_forms is not None and self.method == "generation":
            problems.append("answer_forms: only for method likelihood; remove it")
        if any(form.count("{}") != 1 for form in forms) or len(set(forms)) < len(forms):
            problems.append(
                f"answer_forms: got {list(forms)}, wanted different texts with one {{}}"
            )
        return problems

    @property
    def option_style(self) -> Literal["letters", "texts"]:
        """Effective `options`: what the answer is, a letter or the text of an option."""
        return self.options or ("texts" if self.format == "calm" else "letters")

    @property
    def effective_split(self) -> Split | None:
        """Split to evaluate; None for formats and tasks without splits of their own."""
        splits = SPLITS[self.format] if self.format else ()
        return self.split or next(iter(splits), None)

    @property
    def forms(self) -> tuple[str, ...]:
        """Effective `answer_forms`."""
        return self.answer_forms or ("{}", " {}")
