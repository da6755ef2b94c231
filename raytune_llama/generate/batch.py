"""Batch inference on Ray Data: answers to a file of prompts, in its order.

    summary = generate(config)

Each worker is an actor with the model; it takes blocks of rows, several at a time, and runs
serving's continuous batching over all of them. Finished rows are kept in part files, see `parts`,
so that the same command resumes a job without generating a row twice. A line of the output:

    index, id                            place in the input, from 0; its id if it has one
    messages, tools | prompt             what was asked
    output, finish_reason                the answer and why it ended: stop or length; without an
                                         answer null, and too_long or unusable, with an error
    num_prompt_tokens, num_output_tokens lengths, in tokens; the latter with the end token
    reference                            the answer that the row had, if it had one
"""

import contextlib
import logging
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import pyarrow as pa
import ray

from raytune_llama.capacity import WorkerNeeds, limit_workers
from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import ConfigError, identity, override, to_dict
from raytune_llama.connection import connect_to_ray
from raytune_llama.data.filters.tasks import quiet_ray_data
from raytune_llama.generate.config import GenerateConfig
from raytune_llama.generate.parts import OUTPUT_FILE, Parts
from raytune_llama.generate.prompts import PromptedRow, Prompts, log_moved_systems, read_prompts
from raytune_llama.generate.worker import ROWS, RayWorker, describe_model
from raytune_llama.logs import waiting
from raytune_llama.model.adapter import Adapter
from raytune_llama.model.adapter_lineage import fingerprint_model, hash_adapter
from raytune_llama.serve.generation.model import ServedModel
from raytune_llama.storage.directories import (
    fetch_directory,
    fetched,
    parse_source,
    pin_directory,
)
from raytune_llama.storage.files import OUTPUT_MANIFEST
from raytune_llama.storage.hub import SCHEME
from raytune_llama.storage.lease import Fence, Lease
from raytune_llama.storage.place import Place, check_place, check_run_dir
from raytune_llama.tokenizer.loader import hash_tokenizer
from raytune_llama.train.identity import IDENTITY_FILE, check_identity, read_identity

logger = logging.getLogger(__name__)

_LOG_SECONDS: Final = 5.0
_NUM_SHOWN: Final = 10

_CALLS_PER_WORKER: Final = 4
"""Blocks that a worker answers at a time. A block is as large as half of its slots: so there are
twice as many rows as slots, and none is empty while the next block is on its way."""

_MAX_RESTARTS: Final = 3
"""Restarts of a worker that has died, of a lack of memory or with its node; Ray Data alone would
restart it forever."""


@dataclass(frozen=True)
class GenerationSummary:
    """Result of a job."""

    output: Place
    """File with the answers."""
    manifest: Mapping[str, Any]
    """Manifest of the job's directory."""

    @property
    def line(self) -> str:
        """Counts of rows and tokens, in words."""
        counts = self.manifest["counts"]
        listed = [f"{counts['rows']} rows", f"{counts['output_tokens']} tokens generated"]
        listed += [f"{counts['too_long']} too long"] if counts["too_long"] else []
        listed += [f"{counts['unusable']} unusable"] if counts["unusable"] else []
        return ", ".join(listed)


def generate(config: GenerateConfig) -> GenerationSummary:
    """Run or resume a job; progress is logged.

    Raises:
        ConfigError: the model, the input or the cluster does not allow it, or the directory has a
            job with other settings or inputs; raised before a worker starts.
        SourceError: the input can't be read, or none of its rows can be used.
    """
    config = resolve_paths(config)
    assert config.input is not None, "checked by the config"
    assert config.run_dir is not None, "checked by the config"
    run_dir = Place.parse(config.run_dir, "run_dir")
    served = describe_model(config)
    prompts = read_prompts(config.input, with_prompt=config.with_prompt, system=config.system)
    if config.with_prompt and served.chat is not None:
        log_moved_systems(prompts, allows_system=served.chat.template.allows_system)
    known = identify(config, served, prompts, read_identity(run_dir))
    check_identity(run_dir, known)
    if (run_dir / OUTPUT_MANIFEST).exists():
        if not (run_dir / IDENTITY_FILE).exists():
            raise ConfigError([f"run_dir: {run_dir} has the output of another job; use another"])
        logger.info("run_dir: %s is complete; nothing is left to generate", run_dir)
        return GenerationSummary(run_dir / OUTPUT_FILE, (run_dir / OUTPUT_MANIFEST).read_json())
    started = time.monotonic()
    with Lease(run_dir) as lease:
        fence = lease.confirm()
        (run_dir / IDENTITY_FILE).write_json(known)
        parts = Parts(run_dir)
        left = [row for row in prompts.rows if row.index not in parts.finished]
        if parts.finished:
            logger.info("%d of %d rows are finished", len(parts.finished), len(prompts.rows))
        if left:
            with connect_to_ray():
                _run(config, left, parts, fence)
        seconds = time.monotonic() - started
        manifest = _publish(config, prompts, parts, known, fence, seconds=seconds)
    summary = GenerationSummary(run_dir / OUTPUT_FILE, manifest)
    logger.info("%s: %s in %.0f s", summary.output, summary.line, seconds)
    return summary


def resolve_paths(config: GenerateConfig) -> GenerateConfig:
    """Return a config with absolute paths.

    Raises:
        ConfigError: a path is of the wrong kind, can't be reached, or is an output in the folder of
            a submitted job, which is temporary.
    """
    problems: list[str] = []
    resolved: dict[str, str] = {}

    def resolve(
        field: str, text: str | None, *, is_directory: bool = False, is_source: bool = False
    ) -> None:
        if text is None:
            return
        try:
            if is_directory:
                resolved[field] = pin_directory(text, field)
                fetch_directory(resolved[field], field)
                return
            place = parse_source(text, field) if is_source else Place.parse(text, field)
            problem = None if text.startswith(SCHEME) else check_place(place, field)
        except UserError as error:
            problems.append(str(error))
            return
        problems.extend([problem] if problem else [])
        resolved[field] = str(place)

    resolve("model.path", config.model.path, is_directory=True)
    resolve("model.adapter", config.model.adapter, is_directory=True)
    if not config.interactive:
        resolve("run_dir", config.run_dir)
        resolve("input.path", config.input and config.input.path, is_source=True)
    problems += check_run_dir(config.run_dir) if config.run_dir else []
    if problems:
        raise ConfigError(problems)
    return override(config, resolved)


def identify(
    config: GenerateConfig, served: ServedModel, prompts: Prompts, then: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what decides the answers: the settings, and model and input by hash.

    Args:
        config: config of the job, with absolute paths.
        served: the model, with the adapter's tokenizer and template.
        prompts: the input.
        then: recorded identity to compare with, whose hash algorithms to use; may be empty.
    """
    path, adapter = fetched(config.model.path), None
    if config.model.adapter is not None:
        adapter = hash_adapter(Adapter.open(fetched(config.model.adapter), field="model.adapter"))
    template = None
    if config.with_prompt and served.chat is not None:
        template = {"name": served.chat.template.name, "hash": served.chat.template.hash()}
    settings = identity(config)
    # By content, wherever they are.
    for section, name in (("model", "path"), ("model", "adapter"), ("input", "path")):
        settings[section].pop(name, None)
    return {
        "config": settings,
        "sampling": to_dict(config.resolved_sampling),
        "engine": config.scale.engine,
        "template": template,
        "model": fingerprint_model(path, then.get("model")),
        "adapter": adapter,
        "tokenizer": hash_tokenizer(path, then.get("tokenizer")),
        "input": prompts.files,
    }


def _run(config: GenerateConfig, rows: Sequence[PromptedRow], parts: Parts, fence: Fence) -> None:
    """Answer rows on workers and keep the answers.

    Raises:
        ConfigError: no worker fits on a node of the cluster.
        UserError: a worker can't use the model.
    """
    cpus, num_workers = _plan_workers(config)
    # Longest first: rows of similar length in a batch need less padding.
    ordered = sorted(rows, key=lambda row: (-row.num_characters, row.index))
    size = max(1, config.scale.slots * 2 // _CALLS_PER_WORKER)
    blocks = [
        pa.table({"row": [ROWS.dump_json(row).decode() for row in ordered[first : first + size]]})
        for first in range(0, len(ordered), size)
    ]
    num_workers = min(num_workers, len(blocks))
    logger.info("%d rows to answer with %d workers of %d CPUs", len(rows), num_workers, cpus)
    progress = _Progress(len(rows), parts)
    start = contextlib.ExitStack()
    start.enter_context(
        waiting(logger, "starting the workers, which load the model", usually="10 to 60 s")
    )
    try:
        answers = _answers(blocks, config, cpus=cpus, num_workers=num_workers)
        with contextlib.closing(answers):
            for records in answers:
                start.close()
                parts.add(records, fence)
                progress.log()
    finally:
        start.close()
        # Also what is finished when the job is interrupted.
        parts.flush(fence)


def _plan_workers(config: GenerateConfig) -> tuple[int, int]:
    """Return a worker's CPUs, and the number of workers that the cluster can hold.

    Raises:
        ConfigError: it can hold none.
    """
    scale, nodes = config.scale, [node for node in ray.nodes() if node["Alive"]]
    cpus = scale.cpus_per_worker
    if cpus is None:
        owned = [int(node["Resources"].get("CPU", 0)) for node in nodes]
        share = sum(owned) // scale.num_workers
        cpus = 1 if scale.use_gpu else max(1, min(share, max(owned, default=1)))
    needs = WorkerNeeds.of(scale, cpus=cpus, gpus=int(scale.use_gpu))
    return cpus, limit_workers(scale.num_workers, needs, nodes)


def _answers(
    blocks: Sequence[pa.Table],
    config: GenerateConfig,
    *,
    cpus: int,
    num_workers: int,
) -> Generator[list[str]]:
    """Yield the outputs of each block's rows, in JSON, as the block is finished."""
    with quiet_ray_data():
        import ray.data

        dataset = ray.data.from_arrow(list(blocks)).map_batches(
            RayWorker,
            fn_constructor_kwargs={"config": to_dict(config), "cpus": cpus},
            compute=ray.data.ActorPoolStrategy(
                size=num_workers,
                max_concurrent_calls_per_actor=_CALLS_PER_WORKER,
                max_tasks_in_flight_per_actor=_CALLS_PER_WORKER,
            ),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=cpus,
            num_gpus=int(config.scale.use_gpu),
            accelerator_type=config.scale.accelerator_type,
            label_selector=config.scale.label_selector or None,
            max_restarts=_MAX_RESTARTS,
        )
        # With prefetching, a block would be held until the next one is finished.
        finished: Any = dataset.iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=0
        )
        for table in finished:
            problems = [text for text in table.column("problem").to_pylist() if text]
            if problems:
                raise UserError(problems[0])
            yield table.column("record").to_pylist()


class _Progress:
    """Logs rows and tokens, at most every few seconds."""

    def __init__(self, num_left: int, parts: Parts) -> None:
        self._counts, self._num_before = parts.counts, parts.counts.rows
        self._total, self._tokens = num_left + self._num_before, parts.counts.output_tokens
        self._started = self._logged = time.monotonic()

    def log(self) -> None:
        """Log a line if it is time, or if all rows are finished."""
        now, counts = time.monotonic(), self._counts
        if now - self._logged < _LOG_SECONDS and counts.rows < self._total:
            return
        self._logged = now
        seconds = max(now - self._started, 1e-9)
        num_new = counts.rows - self._num_before
        logger.info(
            "%d of %d rows, %.1f tokens/s, %d too long, %d unusable, %.0f s left",
            counts.rows,
            self._total,
            (counts.output_tokens - self._tokens) / seconds,
            counts.too_long,
            counts.unusable,
            (self._total - counts.rows) * seconds / max(num_new, 1),
        )


def _publish(
    config: GenerateConfig,
    prompts: Prompts,
    parts: Parts,
    known: Mapping[str, Any],
    fence: Fence,
    *,
    seconds: float,
) -> dict[str, Any]:
    """Write the output and its manifest, delete the parts, and return the manifest."""
    assert len(parts.finished) == len(prompts.rows), "a row was lost"
    fence.check()
    output = parts.publish()
    counts = asdict(parts.counts)
    unanswered = sorted(counts.pop("unanswered"), key=lambda row: row["index"])
    manifest = {
        **known,
        "config": to_dict(config),
        "counts": counts,
        "unanswered": unanswered,
        "blank_lines": prompts.num_blank_lines,
        "seconds_of_last_start": round(seconds, 1),
        "files": {OUTPUT_FILE: output.hash()},
    }
    if unanswered:
        shown = "; ".join(f"row {row['index']}: {row['error']}" for row in unanswered[:_NUM_SHOWN])
        logger.warning("%d rows have no answer: %s", len(unanswered), shown)
    run_dir = output.parent
    (run_dir / OUTPUT_MANIFEST).write_json(manifest)
    parts.delete()
    return manifest
