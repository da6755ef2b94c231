"""Build a token store from corpora: plan on the driver, encode on Ray Data actors, publish.

    inputs = open_data(config.data, Path(config.tokenizer))    # lists and inspects files, once
    store = prepare_data(config.data, inputs)

The work is split into units (`unit_encoder.py`). Running the same command again after a crash
resumes after the finished units and publishes the same bytes as an uninterrupted run.
"""

import contextlib
import errno
import fcntl
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerFast

from raytune_llama.config.settings import ConfigError, override
from raytune_llama.data.batches.config import source_names
from raytune_llama.data.build.actors import run_units
from raytune_llama.data.build.chat_checks import count_shared_answers
from raytune_llama.data.build.chat_corpus import open_chat_corpus
from raytune_llama.data.build.duplicates_pass import TextReader, mark_duplicates
from raytune_llama.data.build.file_hashes import SourceHashes, hash_files
from raytune_llama.data.build.publication import build_manifest, check_counts, publish
from raytune_llama.data.build.text_corpus import (
    TextCorpus,
    check_document_ends,
    describe_document_ends,
    document_ends,
    keep_store_bos,
)
from raytune_llama.data.build.unit_encoder import UnitReader, UnitRecord
from raytune_llama.data.build.units import BuildPlan, WorkUnit, plan_units
from raytune_llama.data.config import AnyDataConfig, ChatDataConfig, DataConfig
from raytune_llama.data.readers.examples import log_documents
from raytune_llama.data.readers.rows import SourceError
from raytune_llama.data.readers.sources import SourceFile, discover_files
from raytune_llama.data.store.manifest import (
    MANIFEST_NAME,
    STORE_FORMAT_VERSION,
    check_fingerprint,
    fingerprint_of,
    read_revisions,
    token_dtype,
)
from raytune_llama.data.store.token_store import TokenStore, open_store
from raytune_llama.storage.directories import pin_source
from raytune_llama.storage.hub import SCHEME
from raytune_llama.storage.place import Place, check_place
from raytune_llama.tokenizer.loader import fingerprint_loaded, load_tokenizer
from raytune_llama.tokenizer.reference import TextEncoder
from raytune_llama.tokenizer.selection import select_encoder

logger = logging.getLogger(__name__)

_MIB = 1 << 20


class Corpus(Protocol):
    """Source documents of a store, listed and inspected on the driver."""

    @property
    def files(self) -> list[SourceFile]:
        """All source files, in store order."""
        ...

    def fingerprint_inputs(self, like: str | None = None) -> dict[str, Any]:
        """Return the inputs that decide the documents, besides the files and the tokenizer.

        Args:
            like: Recorded hash whose algorithm to use; see `storage.hashes`.
        """
        ...

    def sample_texts(self) -> list[str]:
        """Read some text, to select an encoder."""
        ...

    @property
    def read_texts(self) -> TextReader:
        """Reader of the texts among which duplicates are searched."""
        ...

    def build_reader(self, encoder: TextEncoder) -> UnitReader:
        """Build the unit reader for the workers."""
        ...


@dataclass(frozen=True)
class DataInputs:
    """Opened inputs of a token store."""

    tokenizer: PreTrainedTokenizerFast
    """Tokenizer that defines the ids."""
    corpus: Corpus
    """Listed source files, with the format and encoding detected from the head of each."""


def pin_sources(config: AnyDataConfig) -> AnyDataConfig:
    """Return a config whose datasets on the hub are those of one commit.

    It is the commit that an existing store was built from, or else what their revisions are now.

    Raises:
        ConfigError: The hub has no such dataset or revision, or can't be reached.
    """
    pinned: dict[str, str] = {}
    problems: list[str] = []
    for name in ("sources", "validation"):
        for number, source in enumerate(getattr(config, name, ())):
            if not source.path.startswith(SCHEME):
                continue
            field = f"{name}.{number}.path"
            try:
                recorded = read_revisions(Place.parse(config.store_dir, "data.store_dir"))
                pinned[field] = pin_source(source.path, f"data.{field}", recorded)
            except ValueError as error:
                problems.append(str(error))
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return override(config, pinned)


def list_revisions(files: Sequence[SourceFile]) -> list[str]:
    """Return the datasets on the hub, each at its commit, that some of the files are part of."""
    found = {
        str(Place(place.scheme, "/".join(place.key.split("/")[:3]), place.options))
        for place in (file.place for file in files)
        if f"{place.scheme}://" == SCHEME
    }
    return sorted(found)


def open_data(config: AnyDataConfig, tokenizer_path: Path) -> DataInputs:
    """List the source files and inspect the head of each; needs no Ray.

    Args:
        config: Data settings of the job.
        tokenizer_path: Directory of the tokenizer, needed on the driver's node only.

    Raises:
        ConfigError: The config has problems; lists all of them with their field paths.
    """
    tokenizer, corpus, problems = _look(config, tokenizer_path)
    if tokenizer is None or corpus is None or problems:
        raise ConfigError(problems)
    return DataInputs(tokenizer, corpus)


def open_current_store(config: AnyDataConfig, inputs: DataInputs) -> TokenStore | None:
    """Open the existing store after checking that it is the one that would be built.

    Needs no Ray, so a job calls it before Ray starts. Files that are not as they were when they
    were last hashed are hashed again.

    Args:
        config: Data settings of the job.
        inputs: Result of `open_data` for this config.

    Returns:
        The open store; None if there is none yet.

    Raises:
        StoreError: The store is damaged, or stale: names each field and file that differs.
    """
    place = Place.parse(config.store_dir, "data.store_dir")
    if not (place / MANIFEST_NAME).exists():
        return None
    store = open_store(config)
    before = SourceHashes.read(place)
    recorded = store.manifest.fingerprint
    wanted, seen = _hash_inputs(config, inputs, place, before, like=recorded)
    check_fingerprint(place, store.manifest.inputs, wanted)
    if seen != before:  # a store may be on a disk that is read only
        seen.write(place)
    return store


def describe_inputs(
    config: AnyDataConfig, inputs: DataInputs, like: str | None = None
) -> dict[str, Any]:
    """Return the inputs that a store built now would record, whether or not there is one.

    Its `fingerprint_of` says whether data and settings are those of an earlier store. Files that
    the existing store has not hashed as they are now are hashed: without a store, all of them.

    Args:
        config: Data settings of the job.
        inputs: Result of `open_data` for this config.
        like: Fingerprint of the store to compare with, whose algorithm to use; None: a new store.
    """
    place = Place.parse(config.store_dir, "data.store_dir")
    return _hash_inputs(config, inputs, place, SourceHashes.read(place), like)[0]


def _hash_inputs(
    config: AnyDataConfig,
    inputs: DataInputs,
    store: Place,
    before: SourceHashes,
    like: str | None,
) -> tuple[dict[str, Any], SourceHashes]:
    """Return the inputs that a store built now would record, and the hashes of its files."""
    config = keep_store_bos(config, inputs.tokenizer, store)
    encoding = _encoding_inputs(config, inputs.tokenizer, like)
    encoding |= inputs.corpus.fingerprint_inputs(like)
    files = inputs.corpus.files
    seen = hash_files(files, before, like)
    return encoding | {"sources": seen.fingerprint_inputs(files)}, seen


def prepare_data(
    config: AnyDataConfig, inputs: DataInputs, start_ray: Callable[[], object] | None = None
) -> TokenStore:
    """Return the token store that a config describes; build it if it does not exist.

    `store_dir` does not count as a store until it is complete.

    Args:
        config: Data settings of the job.
        inputs: Result of `open_data` for this config.
        start_ray: Initializes Ray; called only if there is something to build, while the encoder is
            being selected. None: Ray is already initialized.

    Returns:
        The open store.

    Raises:
        ConfigError: `store_dir` holds something else, or another job is building there.
        StoreError: A store exists that is damaged or was built from other inputs.
        SourceError: A file cannot be read as configured, too many rows are bad, there is too
            little text, or a disk is full (free space and run the same command to resume).
    """
    if (store := open_current_store(config, inputs)) is not None:
        logger.info("token store %s is complete: nothing to do", store.place)
        return store
    tokenizer, corpus = inputs.tokenizer, inputs.corpus
    if isinstance(config, DataConfig):
        logger.info("each document %s", describe_document_ends(config, tokenizer))
    store_dir = Place.parse(config.store_dir, "data.store_dir")
    encoding = _encoding_inputs(config, tokenizer) | corpus.fingerprint_inputs()
    plan = _plan(config, encoding, corpus.files, store_dir)
    units = plan_units(corpus.files, config.range_mib * _MIB)
    with _exclusive(plan):
        with ThreadPoolExecutor(max_workers=1) as pool:
            choice = pool.submit(select_encoder, tokenizer, corpus.sample_texts(), config.engine)
            if start_ray is not None:
                start_ray()  # not on the pool's thread: Ray's processes would exit with it
        mark_duplicates(units, plan, corpus.read_texts, config.num_workers)
        reader = corpus.build_reader(choice.result().encoder)
        records = _run(units, plan, reader, config.num_workers)
        seen = SourceHashes.from_records(corpus.files, units, records)
        sources = {"sources": seen.fingerprint_inputs(corpus.files)}
        with _space_for(plan):
            manifest = build_manifest(encoding | sources, units, plan, records)
            if isinstance(config, ChatDataConfig):
                manifest = count_shared_answers(manifest, plan)
            manifest = replace(manifest, revisions=list_revisions(corpus.files))
            check_counts(manifest, plan, config)
            publish(manifest, seen, plan, store_dir, list(source_names(config.all_sources)))
    return open_store(config)


def _plan(
    config: AnyDataConfig, encoding: dict[str, Any], files: list[SourceFile], store_dir: Place
) -> BuildPlan:
    """Return the plan shared by all units; raise ConfigError if `store_dir` is occupied."""
    # The work directory's name depends on no file: fixing one keeps the units of the others.
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
    plan = replace(plan, duplicates_config=config.duplicates)
    return replace(plan, cleaning=config.cleaning) if isinstance(config, DataConfig) else plan


def _check_free(store_dir: Place, work: Place) -> None:
    """Raise ConfigError if `store_dir` holds something else, which publishing would delete or keep.

    Object storage has no rename, so a store is built in place there: files in `store_dir` are this
    store's own if its work directory exists.
    """
    if store_dir.is_local:
        is_free = not store_dir.exists()
    else:
        is_free = work.exists() or not (store_dir.files() or store_dir.folders())
    if not is_free:
        raise ConfigError(
            [
                f"data.store_dir: {store_dir} exists but is not a token store; delete it or choose "
                "another directory"
            ]
        )


def _look(
    config: AnyDataConfig, tokenizer_path: Path
) -> tuple[PreTrainedTokenizerFast | None, Corpus | None, list[str]]:
    """Open the tokenizer and the corpus, each None if it fails, and list all problems."""
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
        problems += check_document_ends(config, tokenizer)
    return tokenizer, corpus, problems


def _open_text_corpus(config: DataConfig) -> TextCorpus:
    try:
        max_bytes = config.max_document_mib * _MIB
        files = discover_files(config.sources, max_document_bytes=max_bytes)
    except ConfigError as error:
        raise ConfigError([f"data.{problem}" for problem in error.problems]) from error
    log_documents(config.sources, files)
    return TextCorpus(config, files)


def _encoding_inputs(
    config: AnyDataConfig, tokenizer: PreTrainedTokenizerFast, like: str | None = None
) -> dict[str, Any]:
    """Return the fingerprint inputs that text and chat stores have in common."""
    # A chat template writes its own BOS and EOS.
    is_text = isinstance(config, DataConfig)
    bos_id, eos_id = document_ends(config, tokenizer) if is_text else (None, None)
    return {
        "format_version": STORE_FORMAT_VERSION,
        "tokenizer": {
            **fingerprint_loaded(tokenizer, like),
            "bos_id": bos_id,
            "eos_id": eos_id,
            # The length would be too small for a vocabulary with gaps.
            "vocabulary_size": max(tokenizer.get_vocab().values()) + 1,
        },
        "validation_fraction": config.validation_fraction,
    }


def _run(
    units: list[WorkUnit],
    plan: BuildPlan,
    reader: UnitReader,
    num_workers: int | None,
) -> list[UnitRecord]:
    import ray

    free = max(1, int(ray.available_resources().get("CPU", 0)))
    workers = min(len(units), num_workers or free)
    return run_units(units, plan, reader, num_workers=workers, num_free=free)


@contextlib.contextmanager
def _exclusive(plan: BuildPlan) -> Iterator[None]:
    """Create and lock the work directory for this job; it is kept if the block raises.

    Object storage has no locks: two jobs there do the same work twice and write the same bytes.
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
                    [
                        f"data.store_dir: another job is building this store in {plan.work_dir}; "
                        "wait for it to finish"
                    ]
                ) from error
        else:
            # Before the first shard: from now on, the files in `store_dir` are this job's.
            (plan.work_dir / "begun").write_bytes(b"")
        # Attempts and failures are counted per run.
        plan.stop_file.delete()
        for place in plan.units_dir.files():
            if place.name.endswith(".attempts"):
                place.delete()
        yield


@contextlib.contextmanager
def _space_for(plan: BuildPlan) -> Iterator[None]:
    """Turn a full disk (ENOSPC) into a SourceError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise SourceError(
            f"no space left for {error.filename or plan.work_dir} while publishing the store; free "
            "space and run the same command to resume: finished work is kept"
        ) from error
