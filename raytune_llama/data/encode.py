"""Build a token store from corpora: plan on the driver, encode in Ray Data actors, publish.

    store = prepare_data(config.data, Path(config.tokenizer))

The work is done file by file (`units.py`). Running the same command again after any crash skips
the files that are done, and publishes the same bytes as an undisturbed run.
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pydantic
import ray
import ray.data
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from raytune_llama.config import PLACEMENT, ConfigError, settings
from raytune_llama.data.documents import SourceError
from raytune_llama.data.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    SPLITS,
    Manifest,
    SplitManifest,
    compare_fingerprint,
    fingerprint_of,
    token_dtype,
    write_manifest,
)
from raytune_llama.data.sources import SourceConfig, check_sources, discover_files
from raytune_llama.data.store import TokenStore
from raytune_llama.data.units import (
    EncodePlan,
    Unit,
    UnitRecord,
    UnitStoppedError,
    encode_unit,
    finished_record,
)
from raytune_llama.files import move_directory, sha256_file
from raytune_llama.model.tokenizer import load_tokenizer, tokenizer_sha256
from raytune_llama.storage import Place, local_path

logger = logging.getLogger(__name__)

_LOG_SECONDS = 5.0


@settings
class DataConfig:
    """A token store and the corpora it is made from."""

    sources: tuple[SourceConfig, ...]
    """The corpora, in the order of the store."""
    store_dir: Annotated[str, PLACEMENT]
    """Directory of the token store; it must not exist, or hold the store that would be built. All
    nodes must see it. Beside it, `<store_dir>.partial-...` keeps unfinished work."""
    bos: bool = True
    """Whether each document begins with the tokenizer's beginning-of-text id."""
    eos: bool = True
    """Whether each document ends with the tokenizer's end-of-text id."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the documents that go to the validation split, chosen by a hash of their text."""
    cache_dir: Annotated[str | None, PLACEMENT] = None
    """Folder on each node's own disk where training keeps copies of the shards of a store in
    object storage, for the next run too; it may be deleted when none runs. Null: `raytune_llama`
    in the user's cache folder."""
    num_workers: Annotated[Annotated[int, Field(ge=1)] | None, PLACEMENT] = None
    """Encoding processes, one CPU each. Null: one for each CPU that is free at the start."""


@settings
class PrepareDataConfig:
    """A token store to build, and the tokenizer for it."""

    tokenizer: str
    """Directory of a tokenizer, or of a model with its tokenizer."""
    data: DataConfig
    """What to encode, and where to."""


def prepare_data(config: DataConfig, tokenizer_path: Path) -> TokenStore:
    """Return the token store that a config describes; build it if it is not there.

    Ray must be initialised. Nothing appears at `store_dir` before all of it is there.

    Args:
        config: What to encode, and where to.
        tokenizer_path: Directory of the tokenizer.

    Returns:
        The store, open.

    Raises:
        ConfigError: Problems of the config, all of them; found before any work.
        StoreError: There is a store already, made from other inputs, or damaged.
        SourceError: A file cannot be read as configured, or there is too little text.
    """
    problems = check_data(config, tokenizer_path)
    if problems:
        raise ConfigError(problems)
    tokenizer = load_tokenizer(tokenizer_path)
    store_dir = local_path(config.store_dir, "data.store_dir")
    files = discover_files(config.sources)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        hashes = threads.map(lambda file: sha256_file(file.path), files)
        units = [Unit(index, *pair) for index, pair in enumerate(zip(files, hashes, strict=True))]
    encoding = _encoding_inputs(config, tokenizer, tokenizer_path)
    inputs = encoding | {"sources": [unit.inputs for unit in units]}
    if os.path.lexists(store_dir):
        return _reuse(store_dir, inputs)
    # The work directory is named by what all units share: mending one file keeps the others' work.
    work_dir = store_dir.with_name(f"{store_dir.name}.partial-{fingerprint_of(encoding)[:12]}")
    plan = EncodePlan(
        work_dir=work_dir,
        bos_id=encoding["tokenizer"]["bos_id"],
        eos_id=encoding["tokenizer"]["eos_id"],
        dtype=token_dtype(encoding["tokenizer"]["vocabulary_size"]),
        validation_fraction=config.validation_fraction,
    )
    with _exclusive(plan):
        records = _encode_units(units, plan, tokenizer_path, config.num_workers)
        manifest = _manifest(inputs, plan, records)
        _check_counts(manifest, config.validation_fraction)
        _publish(manifest, plan, store_dir)
    return TokenStore.open(store_dir)


def open_store(config: DataConfig) -> TokenStore:
    """Open the token store that a config names, as it is.

    Raises:
        StoreError: It is no token store, of another format, or damaged.
        OSError: Its place cannot be reached.
    """
    cache_dir = Path(config.cache_dir) if config.cache_dir is not None else None
    return TokenStore.open(Place.parse(config.store_dir, "data.store_dir"), cache_dir)


class UnitEncoder:
    """Ray Data actor: encodes one unit a call; a problem of the user's files is returned as data.

    An exception would reach the driver wrapped in Ray's own, without the chance to tell it from a
    defect of ours, and the problems of other files would be lost.
    """

    def __init__(self, tokenizer_path: Path, plan: EncodePlan, units: list[Unit]) -> None:
        # One CPU is asked for: the tokenizer's own threads would oversubscribe the machine.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._tokenizer = load_tokenizer(tokenizer_path)
        self._plan = plan
        self._units = units

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Encode the unit whose index is the only row of the column `unit`."""
        unit = self._units[batch.column("unit")[0].as_py()]
        record, problem = finished_record(unit, self._plan), None
        reused = record is not None
        try:
            record = record or encode_unit(unit, self._plan, self._tokenizer)
        except SourceError as error:
            problem = str(error)
            self._plan.stop_file.touch()
        except UnitStoppedError:
            pass
        row = {
            "unit": unit.index,
            "record": json.dumps(asdict(record)) if record else None,
            "problem": problem,
            "reused": reused,
        }
        return pa.Table.from_pylist([row], schema=_RESULT_SCHEMA)


_RESULT_SCHEMA = pa.schema(
    {"unit": pa.int64(), "record": pa.string(), "problem": pa.string(), "reused": pa.bool_()}
)


def check_data(config: DataConfig, tokenizer_path: Path) -> list[str]:
    """Return what is wrong with a config, with field paths; reads no corpus and needs no Ray."""
    problems = [f"data.{problem}" for problem in check_sources(config.sources)]
    try:
        local_path(config.store_dir, "data.store_dir")
    except ValueError as error:
        problems.append(str(error))
    try:
        tokenizer = load_tokenizer(tokenizer_path)
    except (ValueError, OSError) as error:
        return [*problems, str(error)]
    for field, wanted in {"bos": config.bos, "eos": config.eos}.items():
        if wanted and getattr(tokenizer, f"{field}_token_id") is None:
            problems.append(
                f"data.{field}: got true, but the tokenizer {tokenizer_path} has no {field} token; "
                f"set it to false or use another tokenizer"
            )
    return problems


def _encoding_inputs(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, tokenizer_path: Path
) -> dict[str, Any]:
    """Everything but the sources that decides the bytes of a store."""
    return {
        "format_version": FORMAT_VERSION,
        "tokenizer": {
            "sha256": tokenizer_sha256(tokenizer_path),
            "bos_id": tokenizer.bos_token_id if config.bos else None,
            "eos_id": tokenizer.eos_token_id if config.eos else None,
            # The length would be too small for a vocabulary with gaps.
            "vocabulary_size": max(tokenizer.get_vocab().values()) + 1,
        },
        "validation_fraction": config.validation_fraction,
        "versions": {name: version(name) for name in ("tokenizers", "transformers")},
    }


def _reuse(store_dir: Path, inputs: dict[str, Any]) -> TokenStore:
    store = TokenStore.open(store_dir)
    compare_fingerprint(store_dir, store.manifest.inputs, inputs)
    logger.info("token store %s is complete: nothing to do", store_dir)
    return store


@contextlib.contextmanager
def _exclusive(plan: EncodePlan) -> Iterator[None]:
    """Make the work directory ready for this job alone; it stays when the block raises."""
    for folder in (plan.store_dir, plan.units_dir):
        folder.mkdir(parents=True, exist_ok=True)
    with (plan.work_dir / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                [f"data.store_dir: another job is building it in {plan.work_dir}; wait for it"]
            ) from error
        # A new run is a new chance: attempts and failures are those of one run.
        plan.stop_file.unlink(missing_ok=True)
        for file in plan.units_dir.glob("*.attempts"):
            file.unlink()
        yield


def _encode_units(
    units: list[Unit], plan: EncodePlan, tokenizer_path: Path, num_workers: int | None
) -> list[UnitRecord]:
    """Run all units in actors; return their records in unit order.

    Raises:
        SourceError: Units have failed; their problems, all of them.
    """
    free = max(1, int(ray.available_resources().get("CPU", 0)))
    workers = min(len(units), num_workers or free)
    logger.info("encoding %d files with %d workers in %s", len(units), workers, plan.work_dir)
    records: dict[int, UnitRecord] = {}
    problems: dict[int, str] = {}
    progress = _Progress(len(units))
    for row in _run_actors(units, plan, tokenizer_path, workers, free):
        if row["problem"]:
            problems[row["unit"]] = row["problem"]
        elif row["record"]:
            record = pydantic.TypeAdapter(UnitRecord).validate_json(row["record"])
            records[row["unit"]] = record
            progress.add(record, reused=row["reused"])
    if problems:
        raise SourceError("\n".join(problem for _, problem in sorted(problems.items())))
    assert len(records) == len(units), "a unit was lost"
    return [records[unit.index] for unit in units]


def _run_actors(
    units: list[Unit], plan: EncodePlan, tokenizer_path: Path, workers: int, free: int
) -> Iterator[dict[str, Any]]:
    """Yield the result rows of all units as they are done."""
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Ray Data sets its loggers' levels when it is imported: what setup_logging did is undone.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    with ray.data.DataContext.current(context):
        dataset = ray.data.from_items(
            [{"unit": unit.index} for unit in units], override_num_blocks=len(units)
        ).map_batches(
            UnitEncoder,
            fn_constructor_kwargs={"tokenizer_path": tokenizer_path, "plan": plan, "units": units},
            # More workers than CPUs are asked for only where a cluster can grow to them.
            compute=ray.data.ActorPoolStrategy(min_size=min(workers, free), max_size=workers),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=1,
        )
        yield from dataset.iter_rows()


class _Progress:
    """Logs how far the work is, at most every few seconds."""

    def __init__(self, num_units: int) -> None:
        self._num_units = num_units
        self._done = self._reused = self._tokens = self._bytes = self._new_bytes = 0
        self._started = self._logged = time.monotonic()

    def add(self, record: UnitRecord, *, reused: bool) -> None:
        """Count a finished unit."""
        shards = [shard for shard in record.shards.values() if shard]
        text_bytes = sum(shard.text_bytes for shard in shards)
        self._done += 1
        self._reused += reused
        self._tokens += sum(shard.tokens for shard in shards)
        self._bytes += text_bytes
        self._new_bytes += 0 if reused else text_bytes
        now = time.monotonic()
        if self._done == self._num_units or now - self._logged >= _LOG_SECONDS:
            self._logged = now
            logger.info(
                "%d/%d files (%d from an earlier run), %.1f MB of text, %d tokens, %.2f MB/s",
                self._done,
                self._num_units,
                self._reused,
                self._bytes / 1e6,
                self._tokens,
                self._new_bytes / 1e6 / max(now - self._started, 1e-9),
            )


def _manifest(inputs: dict[str, Any], plan: EncodePlan, records: list[UnitRecord]) -> Manifest:
    skipped: Counter[str] = Counter()
    for record in records:
        skipped.update(record.skipped)
    return Manifest(
        format_version=FORMAT_VERSION,
        fingerprint=fingerprint_of(inputs),
        inputs=inputs,
        token_dtype=plan.dtype,
        splits={
            split: SplitManifest.of(shard for record in records if (shard := record.shards[split]))
            for split in SPLITS
        },
        skipped=dict(skipped),
    )


def _check_counts(manifest: Manifest, validation_fraction: float) -> None:
    """Refuse a store that could not be trained on, or not be evaluated as asked."""
    train, validation = manifest.splits["train"], manifest.splits["validation"]
    skipped = ", ".join(f"{count} {reason}" for reason, count in manifest.skipped.items())
    if not train.documents and not validation.documents:
        raise SourceError(f"data.sources: no document has any text (skipped: {skipped})")
    # A missing split is an error, not a warning: it would surface only at the first evaluation, on
    # machines that cost more. It happens to small corpora alone, so that little work is lost.
    for split, name in ((train, "train"), (validation, "validation")):
        if not split.documents and (name == "train" or validation_fraction > 0):
            total = train.documents + validation.documents
            raise SourceError(
                f"data.validation_fraction: {validation_fraction} of {total} documents leaves none "
                f"for {name}; choose another fraction, or split the text into more documents"
            )
    if any(manifest.skipped.values()):
        logger.warning("documents skipped: %s", skipped)


def _publish(manifest: Manifest, plan: EncodePlan, store_dir: Path) -> None:
    """Turn the collected shards into the store."""
    listed = {shard.name for split in manifest.splits.values() for shard in split.shards}
    for file in plan.store_dir.iterdir():
        if file.name not in listed:  # left by a killed worker, or by files no longer configured
            file.unlink()
    write_manifest(plan.store_dir / MANIFEST_NAME, manifest)
    move_directory(plan.store_dir, store_dir)
    shutil.rmtree(plan.work_dir)
    for name, split in manifest.splits.items():
        logger.info(
            "%s: %d documents, %d tokens, %.1f MB of text",
            name,
            split.documents,
            split.tokens,
            split.text_bytes / 1e6,
        )
