"""Load tasks: read and check all questions of all benchmarks before any model is loaded."""

import difflib
import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import ConfigError
from raytune_llama.data.readers.listing import ListedFile, list_files
from raytune_llama.data.readers.side_files import is_side_file
from raytune_llama.evaluate.tasks.config import TaskConfig
from raytune_llama.evaluate.tasks.exam_files import read_exam_file
from raytune_llama.evaluate.tasks.question_rows import read_question_rows
from raytune_llama.evaluate.tasks.subjects import describe_subject
from raytune_llama.evaluate.tasks.task import EvaluationTask, Question
from raytune_llama.storage.directories import parse_source
from raytune_llama.storage.hashes import hash_bytes
from raytune_llama.storage.place import Place

logger = logging.getLogger(__name__)


def load_tasks(
    configs: Sequence[TaskConfig], field: str = "tasks", *, need_answers: bool = False
) -> list[EvaluationTask]:
    """Read the questions of all benchmarks, one task per subject or file.

    Args:
        configs: Settings of the benchmarks.
        field: Config field that holds them, for error messages.
        need_answers: Whether a split without right answers is refused, because accuracy is needed.

    Raises:
        ConfigError: Everything that is wrong with the settings and the files, by field path.
        UserError: lm-evaluation-harness is not installed.
    """
    check_installed(field)
    tasks: list[EvaluationTask] = []
    problems: list[str] = []
    for number, config in enumerate(configs):
        loading = _Loading(config, f"{field}.{number}")
        try:
            loading.load()
        except UserError as error:  # such as a path that matches no file
            loading.problems.append(str(error))
        names = {task.name for task in tasks}
        if repeated := [task.name for task in loading.tasks if task.name in names]:
            loading.add("name", f"another task is also named {repeated[0]}; set different names")
        if need_answers and not all(task.has_answers for task in loading.tasks):
            loading.add("split", f"{config.format} {config.effective_split} has no answers")
        tasks += loading.tasks
        problems += loading.problems
    if problems:
        raise ConfigError(problems)
    return tasks


def check_installed(field: str) -> None:
    """Raise a UserError that names the extra, if lm-evaluation-harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            f"{field}: needs lm-evaluation-harness; install it: pip install 'raytune_llama[eval]'"
        )


@dataclass
class _Loading:
    """Loads the tasks of one benchmark and collects what is wrong."""

    config: TaskConfig
    where: str
    tasks: list[EvaluationTask] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, name: str, problem: str) -> None:
        """Add a problem of a field."""
        self.problems.append(f"{self.where}.{name}: {problem}")

    def load(self) -> None:
        """Load all tasks of the benchmark."""
        if self.config.task is not None:
            self._load_harness()
        elif self.config.format in ("ceval", "cmmlu"):
            self._load_exams()
        else:
            self._load_rows()

    def _load_exams(self) -> None:
        assert self.config.path is not None
        assert self.config.format is not None
        root = parse_source(self.config.path, f"{self.where}.path")
        split = self.config.effective_split
        assert split is not None
        files = self._list_subjects(root, split)
        examples = self._list_subjects(root, "dev") if self.config.shots and files else {}
        wanted = self.config.subjects or tuple(files)
        for subject in [one for one in wanted if files and one not in files]:
            close = difflib.get_close_matches(subject, files, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it has {len(files)} others"
            self.add("subjects", f"{root} has no file of {subject!r} in {split}; {hint}")
        for subject in [one for one in wanted if one in files]:
            if self.config.shots and subject not in examples:
                self.add("shots", f"{root / 'dev'} has no file of {subject!r}; set shots=0")
                continue
            self._load_subject(root, subject, files[subject], examples.get(subject))

    def _list_subjects(self, root: Place, split: str) -> dict[str, Place]:
        """Return the CSV file of each subject in the folder of a split, by subject."""
        subjects: dict[str, Place] = {}
        for place in (root / split).files():
            name = place.name
            if name.startswith(".") or not name.lower().endswith(".csv"):
                continue
            subject = name[: -len(".csv")].removesuffix(f"_{split}")
            if subject in subjects:
                self.add("path", f"{subjects[subject]} and {place} are of the same subject")
            subjects[subject] = place
        if not subjects:
            found = ", ".join(folder.name for folder in root.folders()) or "no folder"
            self.add("path", f"no CSV file in {root / split}; {root} has {found}")
        return subjects

    def _load_subject(
        self, root: Place, subject: str, file: Place, example_file: Place | None
    ) -> None:
        assert self.config.format is not None
        questions, file_hash = self._read(file)
        hashes = {file.relative_to(root): file_hash}
        shots: tuple[Question, ...] = ()
        if example_file is not None:
            examples, hashes[example_file.relative_to(root)] = self._read(example_file)
            shots = self._take_shots(examples, example_file)
        may_lack_answers = self.config.format == "ceval" and self.config.effective_split == "test"
        if questions and questions[0].gold is None and not may_lack_answers:
            self.add("path", f"{file}: no column answer")
        group, title = describe_subject(self.config.format, subject)
        benchmark = self.config.name or self.config.format
        questions = tuple(questions[: self.config.limit])
        self.tasks.append(
            EvaluationTask(
                name=f"{benchmark}/{subject}",
                benchmark=benchmark,
                subject=subject,
                group=group,
                config=self.config,
                num_questions=len(questions),
                questions=questions,
                shots=shots,
                title=title,
                file_hashes=hashes,
            )
        )

    def _read(self, file: Place) -> tuple[list[Question], str]:
        data = file.read_bytes()
        if self.config.format in ("ceval", "cmmlu"):
            questions, problems = read_exam_file(data)
        else:
            questions, problems = read_question_rows(data, self.config)
        for problem in problems:
            self.add("path", f"{file}: {problem}")
        empty = sum(not option for question in questions for option in question.options)
        if empty:
            logger.warning("%s: %d options are empty", file, empty)
        return questions, hash_bytes(data)

    def _take_shots(self, examples: Sequence[Question], file: Place) -> tuple[Question, ...]:
        wanted = self.config.shots or 0
        if examples and len(examples) < wanted:
            self.add("shots", f"got {wanted}, but {file} has {len(examples)} rows")
        if any(example.gold is None for example in examples):
            self.add("shots", f"{file} has no answers, so it holds no examples")
        return tuple(examples[:wanted])

    def _load_rows(self) -> None:
        config = self.config
        assert config.path is not None
        place = parse_source(config.path, f"{self.where}.path")
        listed = list_files(place, f"{self.where}.path")
        is_single = len(listed) == 1 and listed[0][0] == place
        if not is_single:
            listed = [one for one in listed if not is_side_file(one[0], one[2], "json")]
        hashes: dict[str, str] = {}
        shots: tuple[Question, ...] = ()
        if config.shots_path is not None:
            file = parse_source(config.shots_path, f"{self.where}.shots_path")
            if not file.exists() or file.is_dir():
                self.add("shots_path", f"{file} is no file")
            else:
                examples, hashes[file.name] = self._read(file)
                shots = self._take_shots(examples, file)
                listed = [one for one in listed if one[0] != file]
        for one in listed:
            self._load_row_file(one, hashes, shots, is_single=is_single)

    def _load_row_file(
        self,
        listed: ListedFile,
        hashes: dict[str, str],
        shots: tuple[Question, ...],
        *,
        is_single: bool,
    ) -> None:
        file, relative, _ = listed
        stem = PurePosixPath(relative).with_suffix("").as_posix()
        benchmark = self.config.name or (stem if is_single else str(self.config.format))
        questions, file_hash = self._read(file)
        selected = tuple(questions[: self.config.limit])
        self.tasks.append(
            EvaluationTask(
                name=benchmark if is_single else f"{benchmark}/{stem}",
                benchmark=benchmark,
                subject=None if is_single else stem,
                group=None,
                config=self.config,
                num_questions=len(selected),
                questions=selected,
                shots=shots,
                title=stem.replace("_", " "),
                file_hashes={relative: file_hash, **hashes},
            )
        )

    def _load_harness(self) -> None:
        # Only here, as it imports torch and datasets.
        from raytune_llama.evaluate.tasks.harness_tasks import (
            find_problem,
            hash_documents,
            load_harness_tasks,
        )

        name = self.config.task
        assert name is not None
        if self.config.include is not None:
            folder = Place.parse(self.config.include, f"{self.where}.include")
            if not (folder.is_local and folder.is_dir()):
                self.add("include", f"{folder} is no local folder")
                return
        loaded, problem = load_harness_tasks(self.config)
        if problem:
            self.add("task", problem)
        for leaf, task in loaded.items():
            if wrong := find_problem(task):
                self.add("task", f"{leaf}: {wrong}")
                continue
            benchmark = self.config.name or name
            total = len(task.eval_docs)
            self.tasks.append(
                EvaluationTask(
                    name=benchmark if len(loaded) == 1 else f"{benchmark}/{leaf}",
                    benchmark=benchmark,
                    subject=None if len(loaded) == 1 else leaf,
                    group=None,
                    config=self.config,
                    num_questions=min(total, self.config.limit or total),
                    harness_task=leaf,
                    file_hashes=hash_documents(self.config, leaf, task),
                )
            )
