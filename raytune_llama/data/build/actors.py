"""Encode work units on Ray Data actors, and log progress."""

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pydantic

from raytune_llama.data.build.unit_encoder import (
    UnitReader,
    UnitRecord,
    encode_unit,
    finished_record,
)
from raytune_llama.data.build.units import BuildPlan, UnitStoppedError, WorkUnit
from raytune_llama.data.filters.tasks import quiet_ray_data
from raytune_llama.data.readers.documents import read_head_rows
from raytune_llama.data.readers.rows import SourceError
from raytune_llama.data.readers.sources import SourceFile

if TYPE_CHECKING:
    import ray

logger = logging.getLogger(__name__)

_LOG_SECONDS = 5.0
_SAMPLE_FILES = 32
_SAMPLE_BYTES = 4 << 20


class EncodingActor:
    """Ray Data actor that encodes one unit per call and returns source-file problems as data.

    An exception would reach the driver wrapped in Ray's own, indistinguishable from a bug of this
    package, and the problems of other files would be lost.
    """

    def __init__(
        self, reader: "ray.ObjectRef[UnitReader]", plan: BuildPlan, units: list[WorkUnit]
    ) -> None:
        # In Ray's object store, so that a node holds a fast engine's tables only once.
        import ray

        self._reader = ray.get(reader)
        self._plan = plan
        self._units = units

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Encode the unit whose index is the only row of the column `unit`."""
        unit = self._units[batch.column("unit")[0].as_py()]
        record, problem = finished_record(unit, self._plan), None
        reused = record is not None
        try:
            record = record or encode_unit(unit, self._plan, self._reader)
        except SourceError as error:
            problem = str(error)
            self._stop()
        except UnitStoppedError:
            pass
        row = {
            "unit": unit.index,
            "record": json.dumps(asdict(record)) if record else None,
            "problem": problem,
            "reused": reused,
        }
        return pa.Table.from_pylist([row], schema=_RESULT_SCHEMA)

    def _stop(self) -> None:
        try:
            self._plan.stop_file.write_bytes(b"")
        except OSError as error:  # a full disk: the problem says so, and other units hit it too
            logger.warning("%s cannot be written: %s", self._plan.stop_file, error)


_RESULT_SCHEMA = pa.schema(
    {"unit": pa.int64(), "record": pa.string(), "problem": pa.string(), "reused": pa.bool_()}
)


def run_units(
    units: list[WorkUnit],
    plan: BuildPlan,
    reader: UnitReader,
    *,
    num_workers: int,
    num_free: int,
) -> list[UnitRecord]:
    """Encode all units on actors and return their records in unit order.

    Args:
        units: Units to encode.
        plan: Build plan shared by all units.
        reader: Turns rows into token ids.
        num_workers: Maximum number of actors, one CPU each.
        num_free: CPUs free now; more actors start as the cluster grows.

    Raises:
        SourceError: Units have failed; lists the problems of all of them.
    """
    logger.info(
        "encoding %d files in %d units with %d workers in %s",
        len(plan.files),
        len(units),
        num_workers,
        plan.work_dir,
    )
    records: dict[int, UnitRecord] = {}
    problems: dict[int, str] = {}
    progress = _Progress(units)
    import ray

    kwargs = {"reader": ray.put(reader), "plan": plan, "units": units}
    try:
        for row in _run_actors(len(units), kwargs, num_workers, num_free):
            if row["problem"]:
                problems[row["unit"]] = row["problem"]
            elif row["record"]:
                record = pydantic.TypeAdapter(UnitRecord).validate_json(row["record"])
                records[row["unit"]] = record
                progress.add(units[row["unit"]], record, reused=row["reused"])
    except KeyboardInterrupt:
        kept = sum(place.name.endswith(".json") for place in plan.units_dir.files())
        logger.info("%d of %d units are encoded and kept in %s", kept, len(units), plan.work_dir)
        raise
    if problems:
        # A full disk stops every unit with the same message.
        raise SourceError("\n".join(dict.fromkeys(line for _, line in sorted(problems.items()))))
    assert len(records) == len(units), "a unit was lost"
    return [records[unit.index] for unit in units]


def _run_actors(
    num_units: int, kwargs: dict[str, Any], num_workers: int, num_free: int
) -> Iterator[dict[str, Any]]:
    """Yield the result row of each unit as it finishes."""
    with quiet_ray_data():
        import ray.data

        dataset = ray.data.from_items(
            [{"unit": number} for number in range(num_units)], override_num_blocks=num_units
        ).map_batches(
            EncodingActor,
            fn_constructor_kwargs=kwargs,
            # Start no more actors than free CPUs; the pool grows if the cluster autoscales.
            compute=ray.data.ActorPoolStrategy(
                min_size=min(num_workers, num_free), max_size=num_workers
            ),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=1,
        )
        yield from dataset.iter_rows()


def read_sample_texts(files: list[SourceFile]) -> list[str]:
    """Read up to 4 MiB of documents from the heads of files spread evenly over the corpus."""
    step = max(1, len(files) // _SAMPLE_FILES)
    chosen = files[::step]
    texts: list[str] = []
    for file in chosen:
        left = _SAMPLE_BYTES // len(chosen)
        for batch in read_head_rows(file):
            for text, num_bytes in zip(batch.texts, batch.num_bytes, strict=True):
                if left > 0:
                    texts.append(text)
                    left -= num_bytes
            if left <= 0:
                break
    return texts


class _Progress:
    """Progress logger, rate-limited to one line per `_LOG_SECONDS`."""

    def __init__(self, units: list[WorkUnit]) -> None:
        self._num_units = len(units)
        self._left_bytes = self._total_bytes = sum(unit.num_bytes for unit in units)
        self._done = self._reused = self._tokens = self._bad = self._new_bytes = 0
        self._started = self._logged = time.monotonic()

    def add(self, unit: WorkUnit, record: UnitRecord, *, reused: bool) -> None:
        """Count a finished unit."""
        self._done += 1
        self._reused += reused
        self._left_bytes -= unit.num_bytes
        self._new_bytes += 0 if reused else unit.num_bytes
        self._tokens += sum(shard.tokens for shard in record.shards.values() if shard)
        self._bad += record.rows.num_quarantined
        now = time.monotonic()
        if self._done == self._num_units or now - self._logged >= _LOG_SECONDS:
            self._logged = now
            seconds = max(now - self._started, 1e-9)
            speed = self._new_bytes / seconds
            logger.info(
                "%d/%d units (%d from an earlier run), %.1f of %.1f MB, %d tokens, %d rows in "
                "quarantine, %.2f MB/s, %s",
                self._done,
                self._num_units,
                self._reused,
                (self._total_bytes - self._left_bytes) / 1e6,
                self._total_bytes / 1e6,
                self._tokens,
                self._bad,
                speed / 1e6,
                f"{self._left_bytes / speed:.0f} s left" if speed else "time left unknown",
            )
