"""Build a token store from corpora: plan on the driver, encode in Ray Data actors, publish.

    inputs = open_data(config.data, Path(config.tokenizer))    # lists and looks at files, once
    store = prepare_data(config.data, inputs)

The work is done unit by unit (`unit_encoder.py`). Running the same command again after any crash
skips the units that are done, and publishes the same bytes as an undisturbed run.
"""

import contextlib
import errno
import fcntl
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import ray
from transformers import PreTrainedTokenizerFast

from raytune_llama.config.settings import ConfigError
from raytune_llama.data.batches.mixture import source_names
from raytune_llama.data.build.actors import read_sample_texts, run_units
from raytune_llama.data.build.chat_corpus import open_chat_corpus
from raytune_llama.data.build.duplicates_pass import mark_duplicates
from raytune_llama.data.build.file_hashes import SourceHashes, hash_files
from raytune_llama.data.build.publication import build_manifest, check_counts, publish
from raytune_llama.data.build.text_corpus import TextUnitReader
from raytune_llama.data.build.unit_encoder import UnitReader, UnitRecord
from raytune_llama.data.build.units import BuildPlan, WorkUnit, plan_units
from raytune_llama.data.config import AnyDataConfig, DataConfig
from raytune_llama.data.readers.rows import SourceError
from raytune_llama.data.readers.sources import SourceFile, discover_files
from raytune_llama.data.store.config import StoreConfig
from raytune_llama.data.store.manifest import (
    MANIFEST_NAME,
    STORE_FORMAT_VERSION,
    check_fingerprint,
    fingerprint_of,
    token_dtype,
)
from raytune_llama.data.store.token_store import TokenStore, open_store
from raytune_llama.storage.place import Place, check_place
from raytune_llama.tokenizer.loader import fingerprint_loaded, load_tokenizer
from raytune_llama.tokenizer.reference import TextEncoder
from raytune_llama.tokenizer.selection import select_encoder

logger = logging.getLogger(__name__)

_MIB = 1 << 20


class Corpus(Protocol):
    """What a store is made from, found and looked into on the driver."""

    @property
    def files(self) -> list[SourceFile]:
        """All source files, in the order of the store."""
        ...

    @property
    def fingerprint_inputs(self) -> dict[str, Any]:
        """All but files and tokenizer that decides the documents."""
        ...

    def sample_texts(self) -> list[str]:
        """Return some of its text, for the choice of an encoder."""
        ...

    def build_reader(self, encoder: TextEncoder) -> UnitReader:
        """Return what reads units on the workers."""
        ...


@dataclass(frozen=True)
class TextCorpus:
    """Documents of plain text; see `Corpus`."""

    config: DataConfig
    """What was asked for."""
    files: list[SourceFile]
    """All source files."""

    @property
    def fingerprint_inputs(self) -> dict[str, Any]:
        """All but files and tokenizer that decides the documents."""
        config = self.config
        return {
            "cleaning": config.cleaning.fingerprint_inputs,
            "duplicates": config.duplicates.fingerprint_inputs,
        }

    def sample_texts(self) -> list[str]:
        """Read the beginning of some files."""
        return read_sample_texts(self.files)

    def build_reader(self, encoder: TextEncoder) -> TextUnitReader:
        """Return what reads units on the workers."""
        return TextUnitReader(encoder)


@dataclass(frozen=True)
class DataInputs:
    """What a token store is made from, opened."""

    tokenizer: PreTrainedTokenizerFast
    """What defines the ids."""
    corpus: Corpus
    """The files, listed, and what the beginning of each says of it."""


def open_data(config: AnyDataConfig, tokenizer_path: Path) -> DataInputs:
    """List the sources and look at the beginning of each file; needs no Ray.

    Args:
        config: What to encode, and where to.
        tokenizer_path: Directory of the tokenizer, needed on the driver's node only.

    Raises:
        ConfigError: Problems of the config, all of them, with field paths.
    """
    tokenizer, corpus, problems = _look(config, tokenizer_path)
    if tokenizer is None or corpus is None or problems:
        raise ConfigError(problems)
    return DataInputs(tokenizer, corpus)


def prepare_data(
    config: AnyDataConfig, inputs: DataInputs, start_ray: Callable[[], object] | None = None
) -> TokenStore:
    """Return the token store that a config describes; build it if it is not there.

    Nothing counts as a store at `store_dir` before all of it is there.

    Args:
        config: What to encode, and where to.
        inputs: What `open_data` returned for it.
        start_ray: Initialises Ray; called once there is something to build, while the encoder is
            chosen beside it. None: Ray is initialised.

    Returns:
        The store, open.

    Raises:
        ConfigError: Other things are at `store_dir`, or another job is building there.
        StoreError: There is a store already, made from other inputs, or damaged.
        SourceError: A file cannot be read as configured, too many rows are bad, or there is too
            little text.
        NoSpaceError: A disk is full; the same command goes on once there is room.
    """
    tokenizer, corpus = inputs.tokenizer, inputs.corpus
    store_dir = Place.parse(config.store_dir, "data.store_dir")
    encoding = _encoding_inputs(config, tokenizer) | corpus.fingerprint_inputs
    if (store_dir / MANIFEST_NAME).exists():
        return _reuse(config, encoding, corpus.files)
    plan = _plan(config, encoding, corpus.files, store_dir)
    units = plan_units(corpus.files, config.range_mib * _MIB)
    with _exclusive(plan):
        with ThreadPoolExecutor(max_workers=1) as pool:
            choice = pool.submit(select_encoder, tokenizer, corpus.sample_texts(), config.engine)
            if start_ray is not None:
                start_ray()  # not on the thread: Ray's processes end with the one that starts them
        mark_duplicates(units, plan, config.num_workers)
        reader = corpus.build_reader(choice.result().encoder)
        records = _run(units, plan, reader, config.num_workers)
        seen = SourceHashes.from_records(corpus.files, units, records)
        sources = {"sources": seen.fingerprint_inputs(corpus.files)}
        with _space_for(plan):
            manifest = build_manifest(encoding | sources, units, plan, records)
            check_counts(manifest, plan, config.validation_fraction, config.max_bad_fraction)
            publish(manifest, seen, plan, store_dir, list(source_names(config.all_sources)))
    return open_store(config)


def _plan(
    config: AnyDataConfig, encoding: dict[str, Any], files: list[SourceFile], store_dir: Place
) -> BuildPlan:
    """Return what all units share; refuse a store directory where other things are."""
    # The work directory is named by what all units share: mending one file keeps the others' work.
    layout = {**encoding, "range_mib": config.range_mib}
    work = store_dir.with_name(f"{store_dir.name}.partial-{fingerprint_of(layout)[:12]}")
    _check_free(store_dir, work)
    plan = BuildPlan(
        work_dir=work,
        store_dir=work / "store" if work.is_local else store_dir,
        files=files,
        bos_id=encoding["tokenizer"]["bos_id"],
        eos_id=encoding["tokenizer"]["eos_id"],
        dtype=token_dtype(encoding["tokenizer"]["vocabulary_size"]),
        validation_fraction=config.validation_fraction,
    )
    if isinstance(config, DataConfig):
        return replace(plan, cleaning=config.cleaning, duplicates_config=config.duplicates)
    return plan


def _check_free(store_dir: Place, work: Place) -> None:
    """Refuse to build a store where other things are: there they would be deleted, or stay.

    In object storage, where nothing can be renamed, a store is built in place: what is there is
    its own once its work directory is.
    """
    if store_dir.is_local:
        is_free = not store_dir.exists()
    else:
        is_free = work.exists() or not (store_dir.files() or store_dir.folders())
    if not is_free:
        raise ConfigError(
            [
                f"data.store_dir: {store_dir} exists and is no token store; delete it or choose "
                "another place"
            ]
        )


def _look(
    config: AnyDataConfig, tokenizer_path: Path
) -> tuple[PreTrainedTokenizerFast | None, Corpus | None, list[str]]:
    """Open tokenizer and corpus as far as they can be, and list what is wrong."""
    problems: list[str] = []
    try:
        problem = check_place(Place.parse(config.store_dir, "data.store_dir"), "data.store_dir")
    except ValueError as error:
        problem = str(error)
    problems += [problem] if problem else []
    tokenizer: PreTrainedTokenizerFast | None = None
    corpus: Corpus | None = None
    try:
        tokenizer = load_tokenizer(tokenizer_path)
    except (ValueError, OSError) as error:
        problems.append(str(error))
    try:
        if isinstance(config, DataConfig):
            corpus = _open_text_corpus(config)
        elif tokenizer is not None:
            corpus = open_chat_corpus(config, tokenizer)
    except ConfigError as error:
        problems = [*error.problems, *problems]
    if isinstance(config, DataConfig) and tokenizer is not None:
        problems += [
            f"data.{field}: got true, but the tokenizer {tokenizer_path} has no {field} token; "
            f"set it to false or use another tokenizer"
            for field in ("bos", "eos")
            if getattr(config, field) and getattr(tokenizer, f"{field}_token_id") is None
        ]
    return tokenizer, corpus, problems


def _open_text_corpus(config: DataConfig) -> TextCorpus:
    try:
        max_bytes = config.max_document_mib * _MIB
        return TextCorpus(config, discover_files(config.sources, max_document_bytes=max_bytes))
    except ConfigError as error:
        raise ConfigError([f"data.{problem}" for problem in error.problems]) from error


def _encoding_inputs(config: AnyDataConfig, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What decides the documents of a store, of text or of conversations."""
    # A template writes the ends of conversations by itself.
    bos, eos = (config.bos, config.eos) if isinstance(config, DataConfig) else (False, False)
    return {
        "format_version": STORE_FORMAT_VERSION,
        "tokenizer": {
            **fingerprint_loaded(tokenizer),
            "bos_id": tokenizer.bos_token_id if bos else None,
            "eos_id": tokenizer.eos_token_id if eos else None,
            # The length would be too small for a vocabulary with gaps.
            "vocabulary_size": max(tokenizer.get_vocab().values()) + 1,
        },
        "validation_fraction": config.validation_fraction,
    }


def _reuse(config: StoreConfig, encoding: dict[str, Any], files: list[SourceFile]) -> TokenStore:
    """Open a store that is there, if it is the one that would be built."""
    store = open_store(config)
    seen = hash_files(files, SourceHashes.read(store.place))
    inputs = encoding | {"sources": seen.fingerprint_inputs(files)}
    check_fingerprint(store.place, store.manifest.inputs, inputs)
    seen.write(store.place)
    logger.info("token store %s is complete: nothing to do", store.place)
    return store


def _run(
    units: list[WorkUnit],
    plan: BuildPlan,
    reader: UnitReader,
    num_workers: int | None,
) -> list[UnitRecord]:
    free = max(1, int(ray.available_resources().get("CPU", 0)))
    workers = min(len(units), num_workers or free)
    return run_units(units, plan, reader, num_workers=workers, num_free=free)


@contextlib.contextmanager
def _exclusive(plan: BuildPlan) -> Iterator[None]:
    """Make the work directory ready for this job alone; it stays when the block raises.

    Object storage knows no locks: two jobs there do the same work twice, with the same bytes.
    """
    with contextlib.ExitStack() as stack:
        if plan.work_dir.is_local:
            for folder in (plan.store_dir, plan.units_dir):
                folder.path.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((plan.work_dir.path / "lock").open("w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(
                    [f"data.store_dir: another job is building it in {plan.work_dir}; wait for it"]
                ) from error
        else:
            # Before the first shard: from now on, what lies in `store_dir` is this job's.
            (plan.work_dir / "begun").write_bytes(b"")
        # A new run is a new chance: attempts and failures are those of one run.
        plan.stop_file.delete()
        for place in plan.units_dir.files():
            if place.name.endswith(".attempts"):
                place.delete()
        yield


@contextlib.contextmanager
def _space_for(plan: BuildPlan) -> Iterator[None]:
    """Turn a full disk into an error that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise SourceError(
            f"no space left for {error.filename or plan.work_dir} while the store was put together"
            "; make room and run the same command again: what is done is kept"
        ) from error
