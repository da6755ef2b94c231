"""Evaluate models side by side: plan units of work, run what is not done yet, write the report.

    summary = evaluate(config)          # results.json, samples.jsonl and report.html in its run_dir

A unit is one subject of a task, a block of text or all prompts, with one model. Its result is a
file in `parts/`, named by the hash of all that decides it, so that a killed evaluation resumes and
a changed model, question or setting is evaluated again.
"""

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from dataclasses import field as member
from pathlib import Path
from typing import Any, Final

from raytune_llama.capacity import WorkerNeeds, limit_workers
from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import ConfigError, override, renamed_fields
from raytune_llama.connection import connect_to_ray
from raytune_llama.data.build.preparation import open_current_store, open_data, prepare_data
from raytune_llama.data.config import DataConfig
from raytune_llama.evaluate.config import EvaluateConfig, EvaluatedModelConfig
from raytune_llama.evaluate.endpoint import check_endpoint
from raytune_llama.evaluate.models import MERGED_PREFIX, check_models, identify_model
from raytune_llama.evaluate.report import write_report
from raytune_llama.evaluate.results import (
    EvaluatedModel,
    EvaluationResults,
    GeneratedAnswer,
    ModelOutcome,
    build_results,
    write_results,
)
from raytune_llama.evaluate.tasks.loading import load_tasks
from raytune_llama.evaluate.tasks.outcome import outcome_from_json
from raytune_llama.evaluate.tasks.task import EvaluationTask
from raytune_llama.evaluate.texts import (
    TextBlock,
    combine_blocks,
    plan_text_blocks,
    text_store_config,
)
from raytune_llama.evaluate.worker import AnswersUnit, EvaluationWorker, TaskUnit, Unit, api_key
from raytune_llama.model.vocab import has_tokenizer
from raytune_llama.storage.directories import fetch_directory, fetched, pin_directory
from raytune_llama.storage.files import json_bytes, read_json, write_json_atomic
from raytune_llama.storage.hashes import hash_bytes, hash_hex
from raytune_llama.storage.lease import Lease
from raytune_llama.storage.place import Place, check_run_dir, local_path
from raytune_llama.tokenizer.loader import hash_tokenizer

logger = logging.getLogger(__name__)

PARTS: Final = "parts"
"""Folder of the results of finished units."""

_TEXT_FIELDS = {"data.sources": "texts.sources", "data.store_dir": "run_dir"}
"""Fields of a token store in the messages of its builder, and those that the user has set."""

_PROGRESS_SECONDS = 10.0
_MAX_RESTARTS = 3
"""Restarts of a worker that has died; its unit is run again."""

_VERSION = 2
"""Increased when the same unit would give another result."""


@dataclass(frozen=True)
class _PlannedUnit:
    unit: Unit
    file: Path
    """Where its result is kept."""


@dataclass(frozen=True)
class _PlannedModel:
    """A model with its units of work."""

    config: EvaluatedModelConfig
    field: str
    identity: dict[str, Any]
    units: list[_PlannedUnit] = member(default_factory=list)

    @property
    def open_units(self) -> list[_PlannedUnit]:
        return [planned for planned in self.units if not planned.file.is_file()]


def evaluate(config: EvaluateConfig) -> EvaluationResults:
    """Evaluate models and write the results to `run_dir`.

    Raises:
        ConfigError: something is wrong with models, texts, questions or prompts; all problems are
            listed. Or another process is evaluating into the same directory.
        UserError: a model can't be asked what a task asks.
    """
    config = _resolve(config)
    problems = check_models(config.models)
    tasks, prompts = _read_questions(config, problems)
    for number, model in enumerate(config.models):
        if model.base_url is not None:
            problems += check_endpoint(model, api_key(), f"models.{number}")
    problems += [] if problems else _check_texts(config)
    if problems:
        raise ConfigError(problems)
    target = Path(config.run_dir)
    (target / PARTS).mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        lease = stack.enter_context(Lease(Place.local(target)))
        start_ray = _RayOnce(stack)
        planned = _plan(config, tasks, prompts, target, start_ray)
        lease.confirm()
        for left in target.glob(f"{MERGED_PREFIX}*"):
            logger.info("deleting %s, which a killed evaluation has left", left)
            shutil.rmtree(left)
        num_open = sum(len(model.open_units) for model in planned)
        num_units = sum(len(model.units) for model in planned)
        if num_open < num_units:
            logger.info("%d of %d parts are done already", num_units - num_open, num_units)
        progress = _Progress(num_open)
        for model in planned:
            _run(config, model, target, progress, start_ray)
        outcomes = [_collect(model) for model in planned]
        results = build_results(config, outcomes)
        write_results(results, outcomes, target)
        write_report(results, target)
        return results


def _resolve(config: EvaluateConfig) -> EvaluateConfig:
    """Return the config with absolute paths, for workers that run elsewhere.

    Raises:
        ConfigError: a model can't be fetched, another path is in object storage, or the run
            directory is relative in a submitted job, whose folder is temporary.
    """
    problems: list[str] = []
    resolved: dict[str, str] = {}

    def resolve(field: str, text: str | None, *, is_directory: bool = False) -> None:
        if text is None:
            return
        try:
            if not is_directory:
                resolved[field] = str(local_path(text, field))
                return
            resolved[field] = pin_directory(text, field)
            fetch_directory(resolved[field], field, weights=not field.endswith(".tokenizer"))
        except UserError as error:
            problems.append(str(error))

    resolve("run_dir", config.run_dir)
    problems += check_run_dir(config.run_dir)
    for number, model in enumerate(config.models):
        resolve(f"models.{number}.path", model.path, is_directory=True)
        resolve(f"models.{number}.tokenizer", model.tokenizer, is_directory=True)
        for place, adapter in enumerate(model.adapters):
            resolve(f"models.{number}.adapters.{place}", adapter, is_directory=True)
    if config.answers is not None:
        resolve("answers.prompts", config.answers.prompts)
    if problems:
        raise ConfigError(problems)
    return override(config, resolved)


class _RayOnce:
    """Connects to Ray at the first call; the stack disconnects."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack, self._is_connected = stack, False

    def __call__(self) -> None:
        if not self._is_connected:
            self._stack.enter_context(connect_to_ray())
            self._is_connected = True


def _read_questions(
    config: EvaluateConfig, problems: list[str]
) -> tuple[list[EvaluationTask], tuple[str, ...]]:
    """Read tasks and prompts; add what is wrong with them to `problems`."""
    tasks: list[EvaluationTask] = []
    try:
        tasks = load_tasks(config.tasks)
    except ConfigError as error:
        problems += error.problems
    prompts: tuple[str, ...] = ()
    if config.answers is not None:
        file = Path(config.answers.prompts)
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
            prompts = tuple(line for line in lines if line.strip())[: config.answers.max_prompts]
            if not prompts:
                problems.append(f"answers.prompts: {file} has no line that is not empty")
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"answers.prompts: {file} can't be read: {error}")
    return tasks, prompts


def _plan(
    config: EvaluateConfig,
    tasks: Sequence[EvaluationTask],
    prompts: tuple[str, ...],
    target: Path,
    start_ray: Callable[[], None],
) -> list[_PlannedModel]:
    """List the units of every model."""
    planned: list[_PlannedModel] = []
    for number, model in enumerate(config.models):
        one = _PlannedModel(model, f"models.{number}", identify_model(model))
        units: list[Unit] = []
        if config.texts is not None:
            units += _plan_texts(config, model, target, start_ray)
        units += [TaskUnit(task) for task in tasks]
        if config.answers is not None:
            units.append(AnswersUnit(config.answers, prompts))
        for unit in units:
            key = {"model": one.identity, "unit": unit.identity(), "version": _VERSION}
            name = hash_hex(hash_bytes(json_bytes(key)))[:32]
            one.units.append(_PlannedUnit(unit, target / PARTS / f"{name}.json"))
        planned.append(one)
    return planned


def _plan_texts(
    config: EvaluateConfig,
    model: EvaluatedModelConfig,
    target: Path,
    start_ray: Callable[[], None],
) -> list[TextBlock]:
    """Encode the texts with a model's tokenizer, unless that is done, and list their blocks."""
    assert config.texts is not None
    assert model.path is not None
    tokenizer = _tokenizer_dir(model)
    name = hash_hex(hash_tokenizer(tokenizer))[:16]
    data = text_store_config(config.texts, target / "texts" / name)
    _build_store(data, tokenizer, start_ray)
    return plan_text_blocks(config.texts, data, _num_positions(model))


def _build_store(data: DataConfig, tokenizer: Path, start_ray: Callable[[], None]) -> None:
    with renamed_fields(_TEXT_FIELDS):
        inputs = open_data(data, tokenizer)
        if open_current_store(data, inputs) is None:
            prepare_data(data, inputs, start_ray)


def _check_texts(config: EvaluateConfig) -> list[str]:
    """Return what is wrong with the files of the texts; needs a model's tokenizer."""
    folders = [_tokenizer_dir(model) for model in config.models if model.path is not None]
    if config.texts is None or not folders:
        return []
    try:
        with renamed_fields(_TEXT_FIELDS):
            open_data(text_store_config(config.texts, Path(config.run_dir, "texts")), folders[0])
    except ConfigError as error:
        return error.problems
    except UserError as error:
        return [str(error)]
    return []


def _tokenizer_dir(model: EvaluatedModelConfig) -> Path:
    """Return the directory with a model's tokenizer: its last adapter's, or its own."""
    folders = [fetched(folder) for folder in (str(model.path), *model.adapters)]
    found = [folder for folder in folders if has_tokenizer(folder)]
    return (found or folders)[-1 if found else 0]


def _num_positions(model: EvaluatedModelConfig) -> int:
    settings = read_json(fetched(str(model.path)) / "config.json")
    positions = settings.get("max_position_embeddings") or settings.get("seq_length") or 2048
    return model.max_context or int(positions)


def _run(
    config: EvaluateConfig,
    model: _PlannedModel,
    target: Path,
    progress: "_Progress",
    start_ray: Callable[[], None],
) -> None:
    """Run the units of a model that have no result yet, and keep each result at once."""
    pending = model.open_units
    if not pending:
        return
    scale = config.scale
    is_shared = scale.num_workers > 0 and model.config.path is not None
    arguments: dict[str, Any] = {
        "field": model.field,
        "scratch": target,
        "use_gpu": scale.use_gpu,
        "num_threads": scale.cpus_per_worker if is_shared else None,
    }
    if is_shared:
        start_ray()
        results = _run_on_ray(config, model.config, arguments, pending)
    else:
        worker = EvaluationWorker(model.config, **arguments)
        results = ((planned, worker.run(planned.unit)) for planned in pending)
    with contextlib.closing(results):
        for planned, result in results:
            write_json_atomic(planned.file, result)
            progress.add(f"{model.config.label}, {planned.unit.name}")


def _run_on_ray(
    config: EvaluateConfig,
    model: EvaluatedModelConfig,
    arguments: dict[str, Any],
    pending: Sequence[_PlannedUnit],
) -> Generator[tuple[_PlannedUnit, dict[str, Any]]]:
    """Yield the results of units as Ray actors compute them; a lost actor's unit is run again."""
    import ray
    from ray.exceptions import RayTaskError
    from ray.util import ActorPool

    scale = config.scale
    needs = WorkerNeeds.of(scale, cpus=scale.cpus_per_worker, gpus=int(scale.use_gpu))
    options: dict[str, Any] = {
        "num_cpus": scale.cpus_per_worker,
        "num_gpus": int(scale.use_gpu),
        "accelerator_type": scale.accelerator_type,
        "label_selector": scale.label_selector or None,
        "max_restarts": _MAX_RESTARTS,
        "max_task_retries": _MAX_RESTARTS,
    }
    actor_class: Any = ray.remote(**options)(EvaluationWorker)
    count = min(limit_workers(scale.num_workers, needs, ray.nodes()), len(pending))
    actors = [actor_class.remote(model, **arguments) for _ in range(count)]
    pool = ActorPool(actors)

    def submit(actor: Any, number: int) -> Any:  # noqa: ANN401  # Ray's handles
        return actor.run_numbered.remote(number, pending[number].unit)

    try:
        for number, result in pool.map_unordered(submit, list(range(len(pending)))):
            yield pending[number], result
    except RayTaskError as error:
        # Its own text is the worker's traceback.
        cause = error.cause
        if isinstance(cause, UserError):
            raise type(cause)(*cause.args) from None
        raise
    finally:
        for actor in actors:
            ray.kill(actor)


class _Progress:
    """Logs how far an evaluation is, and how long it still takes."""

    def __init__(self, num_units: int) -> None:
        self._num_units, self._num_done = num_units, 0
        self._start = self._logged = time.monotonic()

    def add(self, what: str) -> None:
        """Count a finished unit."""
        self._num_done += 1
        now = time.monotonic()
        if now - self._logged < _PROGRESS_SECONDS and self._num_done < self._num_units:
            return
        self._logged = now
        left = (now - self._start) / self._num_done * (self._num_units - self._num_done)
        logger.info(
            "%d of %d parts done (%s); about %d:%02d to go",
            self._num_done,
            self._num_units,
            what,
            *divmod(round(left), 60),
        )


def _collect(model: _PlannedModel) -> ModelOutcome:
    """Return all that a model yielded, from the files of its units."""
    results = [(planned.unit, read_json(planned.file)) for planned in model.units]
    config = model.config
    source = config.path or f"{config.base_url} {config.model}"
    return ModelOutcome(
        EvaluatedModel(config.label, " + ".join([source, *config.adapters]), _flat(model.identity)),
        tasks=tuple(
            outcome_from_json(result) for unit, result in results if isinstance(unit, TaskUnit)
        ),
        texts=combine_blocks([result for unit, result in results if isinstance(unit, TextBlock)]),
        answers=tuple(
            GeneratedAnswer(**answer)
            for unit, result in results
            if isinstance(unit, AnswersUnit)
            for answer in result["answers"]
        ),
    )


def _flat(identity: dict[str, Any]) -> dict[str, str]:
    """Return the hashes of a model's parts, one per line."""
    found: dict[str, str] = {}
    for name, value in identity.items():
        if isinstance(value, dict):
            found |= {f"{name} {file}": str(digest) for file, digest in value.items()}
        elif isinstance(value, list):
            for number, one in enumerate(value):
                found |= {f"{name} {number} {file}": str(digest) for file, digest in one.items()}
        else:
            found[name] = str(value)
    return found
