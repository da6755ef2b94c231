"""Recognize a directory by the files that jobs write, and read what is known of it.

    entry = read_entry(read_folder(Place.parse("runs/demo", "RUN")))
    entry.kind, entry.state, entry.step        # "pretrain", "interrupted", 40

A directory that cannot be read is an entry with the state `damaged`, and its note says why.
"""

import csv
import io
import json
import math
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import pyarrow as pa

from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import from_dict
from raytune_llama.config.yaml12 import parse_mapping
from raytune_llama.data.store.manifest import read_manifest as read_store_manifest
from raytune_llama.evaluate.results import RESULTS_FILE
from raytune_llama.runs.entries import (
    WEIGHT_SUFFIXES,
    Checkpoint,
    Entry,
    Kind,
    Links,
    State,
)
from raytune_llama.runs.tree import Folder, read_folder
from raytune_llama.storage.files import OUTPUT_MANIFEST
from raytune_llama.storage.lease import LEASE_FOLDER, LeaseTimes, read_lease
from raytune_llama.storage.place import Place
from raytune_llama.train.checkpoint.layout import CHECKPOINT_MANIFEST, CHECKPOINT_NAME
from raytune_llama.train.monitoring.metrics import EVAL_LOSS, LOSS, METRICS_FILE, read_records
from raytune_llama.train.run_files import EVALUATED_KEY, IDENTITY_FILE, RUN_CONFIG_FILE, RUN_KEY
from raytune_llama.tune.config import SweepConfig
from raytune_llama.tune.journal import JOURNAL_FILE, TrialRecord, read_trials
from raytune_llama.tune.results import LEADERBOARD_FILE, RESOLVED_SWEEP_FILE
from raytune_llama.tune.space import build_grid

WORK_FOLDER: Final = re.compile(r"(.+)\.partial-[0-9a-f]{12}")
"""Name of the folder in which a token store is built: the store's name comes first."""

READ_ERRORS: Final = (
    ValueError,
    OSError,
    pa.ArrowException,
    # Of JSON that has another form than this release writes.
    LookupError,
    TypeError,
    AttributeError,
)
"""Errors of files that are damaged, foreign, half-written, or cannot be reached."""

_SHARD: Final = re.compile(r"(train|validation)-\d{5}\.arrow")
_ANSWERS_FILE: Final = "outputs.jsonl"
_REQUESTS_FILE: Final = "requests.jsonl"
_PARTS: Final = "parts"
_TAIL_BYTES: Final = 1 << 19


def recognize(folder: Folder) -> Kind | None:
    """Return what a folder holds, by the names of its files; None: nothing that a job wrote.

    A folder with a manifest is `model` until `read_entry` has read what it is.
    """
    files, folders = folder.files, folder.folders
    is_begun = METRICS_FILE in files or "checkpoints" in folders
    is_claimed = IDENTITY_FILE in files or LEASE_FOLDER in folders
    is_shard = any(map(_SHARD.fullmatch, files))
    signs: dict[Kind, bool] = {
        "sweep": RESOLVED_SWEEP_FILE in files or (JOURNAL_FILE in files and "trials" in folders),
        "pretrain": (is_begun or is_claimed)
        and (RUN_CONFIG_FILE in files or (is_begun and is_claimed)),
        "instructions": _REQUESTS_FILE in files,
        "answers": _ANSWERS_FILE in files or _holds(folder, _PARTS, ".jsonl"),
        "evaluation": RESULTS_FILE in files or (_PARTS in folders and is_claimed),
        "store": is_shard or WORK_FOLDER.fullmatch(folder.place.name) is not None,
        "model": OUTPUT_MANIFEST in files,
        "job": is_claimed,
    }
    return next((kind for kind, is_met in signs.items() if is_met), None)


def _holds(folder: Folder, name: str, suffix: str) -> bool:
    below = folder.folders.get(name)
    return below is not None and any(file.endswith(suffix) for file in below.files)


@dataclass(frozen=True)
class Driver:
    """What a lease says of the driver of a directory."""

    state: State
    """State of the directory, if it is not complete."""

    note: str = ""
    """Which process runs it, or why it has ended."""


@dataclass(frozen=True)
class Trial:
    """What a sweep says of one of its trials, which has no lease of its own."""

    record: TrialRecord
    """The trial in the sweep's journal."""

    driver: Driver
    """Driver of the sweep."""


def read_entry(folder: Folder, trial: Trial | None = None) -> Entry | None:
    """Return what is known of a folder; None if it holds nothing that a job wrote.

    Args:
        folder: the folder.
        trial: what its sweep says of it, if it is a trial.
    """
    kind = recognize(folder)
    if kind is None:
        return None
    entry = Entry(folder, kind, "damaged", is_trial=trial is not None)
    if folder.problem is not None:
        return replace(entry, note=folder.problem)
    readers = {"sweep": _read_sweep, "store": _read_store, "model": _read_manifest}
    try:
        return (
            _read_run(entry, trial) if kind == "pretrain" else readers.get(kind, _read_job)(entry)
        )
    except READ_ERRORS as error:
        return replace(entry, note=describe_error(error))


def describe_error(error: Exception) -> str:
    """Return why files cannot be read, on one line."""
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())


def read_driver(folder: Folder) -> Driver:
    """Return what the lease of a folder says of its driver.

    A driver on another machine counts as running while its heartbeats are less old than the lease
    protocol's limit, by this machine's clock. That is enough for people, not for deleting.

    Raises:
        UserError: the lease is of another form than this release writes.
        OSError: it cannot be read.
    """
    claims = folder.folders.get(LEASE_FOLDER)
    lease = read_lease(folder.place) if claims is not None else None
    if lease is None or claims is None:
        return Driver("interrupted")
    is_held = lease.is_held
    if is_held is None:
        is_held = time.time() - (claims.modified or 0) < LeaseTimes().stale_seconds
    if is_held:
        return Driver("running", str(lease.process))
    if lease.cause is not None:
        return Driver("failed", " ".join(lease.cause.split()))
    return Driver("interrupted", "" if lease.released else f"{lease.process} was killed")


def _read_json(folder: Folder, name: str) -> dict[str, Any]:
    """Return a JSON file of a folder; empty if it has none."""
    if name not in folder.files:
        return {}
    content = (folder.place / name).read_json()
    if not isinstance(content, dict):
        raise UserError(f"{name} is a {type(content).__name__}, wanted an object")
    return content


def read_config(folder: Folder) -> dict[str, Any]:
    """Return the config of a run as plain data, as `run.yaml` holds it; empty if there is none.

    Raises:
        UserError: the file is not YAML.
        OSError: it cannot be read.
    """
    if RUN_CONFIG_FILE not in folder.files:
        return {}
    text = (folder.place / RUN_CONFIG_FILE).read_bytes().decode()
    data, problems = parse_mapping(text, RUN_CONFIG_FILE)
    if data is None or problems:
        raise UserError("; ".join(problems))
    return data


def read_result(folder: Folder) -> tuple[Folder, dict[str, Any]] | None:
    """Return the folder of a run's result and its manifest; None if it has none yet."""
    for below in folder.folders.values():
        if OUTPUT_MANIFEST in below.files and below.place.name != "initial":
            manifest = _read_json(below, OUTPUT_MANIFEST)
            if RUN_KEY in manifest or "step" in manifest:
                return below, manifest
    return None


def _read_run(entry: Entry, trial: Trial | None) -> Entry:
    folder = entry.folder
    config, identity = read_config(folder), _read_json(folder, IDENTITY_FILE)
    found = read_result(folder)
    manifest = found[1] if found is not None else {}
    records = _read_newest(folder)
    best = manifest.get(RUN_KEY, {}).get("best_step")
    checkpoints = _read_checkpoints(folder, best)
    step = max(
        [int(record["step"]) for record in records if LOSS in record]
        + [checkpoint.step for checkpoint in checkpoints]
        + [int(manifest.get(RUN_KEY, {}).get("last_step", manifest.get("step", 0)))],
    )
    state, note = _find_state(entry, config, trial, is_exported=found is not None, records=records)
    resumes = checkpoints[-1].step if checkpoints else 0
    if state in ("interrupted", "failed"):
        note = "; ".join(filter(None, [note, f"resumes from step {resumes}"]))
    if not config:
        note = "; ".join(filter(None, [note, f"no {RUN_CONFIG_FILE}"]))
    num_steps = config.get("stop_step") or config.get("max_steps")
    return replace(
        entry,
        kind="sft" if "chat" in config.get("data", {}) else "pretrain",
        state=state,
        note=note,
        step=step,
        num_steps=step if state == "finished" and num_steps is None else num_steps,
        train_loss=_newest(records, LOSS),
        eval_loss=_newest(records, EVAL_LOSS),
        trained=describe_trained(config),
        model=_name(config.get("model", {}).get("path")),
        checkpoints=checkpoints,
        links=_link_run(config, identity, manifest),
    )


def _find_state(
    entry: Entry,
    config: Mapping[str, Any],
    trial: Trial | None,
    *,
    is_exported: bool,
    records: list[dict[str, Any]],
) -> tuple[State, str]:
    """Return the state of a run, and a note on it."""
    if trial is not None and trial.record.has_ended:
        is_failed = trial.record.state in ("diverged", "failed")
        ended: State = "stopped" if trial.record.state == "stopped" else "finished"
        return "failed" if is_failed else ended, trial.record.cause or ""
    driver = read_driver(entry.folder) if trial is None else trial.driver
    if driver.state == "running":
        return driver.state, driver.note
    if trial is not None:
        return "interrupted", ""  # whatever its sweep has failed with
    if is_exported:
        return "finished", ""
    if config.get("max_steps") == 0 and _newest(records, EVAL_LOSS) is not None:
        return "evaluated", ""
    return driver.state, driver.note


def _read_newest(folder: Folder) -> list[dict[str, Any]]:
    """Return the newest metric records of a run, back to its newest evaluation."""
    file = folder.files.get(METRICS_FILE)
    if file is None:
        return []
    place = folder.place / METRICS_FILE
    if file.num_bytes > _TAIL_BYTES:
        with place.open() as opened:
            opened.seek(file.num_bytes - _TAIL_BYTES)
            # The first line is cut, and the last one may be.
            lines = opened.read(_TAIL_BYTES).split(b"\n")[1:-1]
        records = [json.loads(line) for line in lines]
        if _newest(records, EVAL_LOSS) is not None:
            return records
    return read_records(place)


def _newest(records: list[dict[str, Any]], name: str) -> float | None:
    values = [record[name] for record in records if name in record]
    return None if not values else math.nan if values[-1] is None else float(values[-1])


def _read_checkpoints(folder: Folder, best_step: int | None) -> tuple[Checkpoint, ...]:
    below = folder.folders.get("checkpoints")
    complete = [
        each
        for name, each in (below.folders if below is not None else {}).items()
        if CHECKPOINT_NAME.fullmatch(name) and CHECKPOINT_MANIFEST in each.files
    ]
    if not complete:
        return ()
    if best_step is None:
        state = _read_json(complete[-1], CHECKPOINT_MANIFEST).get("state", {})
        best_step = state.get("best_step")
    found = [Checkpoint(each, int(each.place.name.removeprefix("step-"))) for each in complete]
    return tuple(
        replace(each, is_newest=each is found[-1], is_best=each.step == best_step) for each in found
    )


def describe_trained(config: Mapping[str, Any]) -> str | None:
    """Return what a run trains, in a few words: `lora r8`, `full`; None without a config."""
    lora = config.get("lora")
    if lora:
        kinds = [name for name in ("rslora", "dora") if lora.get(name)]
        kinds += [lora["init"]] if lora.get("init") not in (None, "default") else []
        return " ".join(["lora", f"r{lora.get('rank')}", *kinds])
    if config.get("adapter"):
        return f"further {_name(config['adapter'])}"
    return config.get("train")


def _name(path: object) -> str | None:
    return path.partition("?")[0].rstrip("/").rpartition("/")[2] if isinstance(path, str) else None


def _weights(hashes: object, role: str) -> dict[str, str]:
    """Return the hashes of weight files, each with what it is."""
    files = hashes if isinstance(hashes, dict) else {}
    return {
        digest: role
        for name, digest in files.items()
        if str(name).endswith(WEIGHT_SUFFIXES) and isinstance(digest, str)
    }


def _place(path: object) -> Place | None:
    if not isinstance(path, str) or not path:
        return None
    try:
        return Place.parse(path, "path")
    except UserError:
        return None  # of another release, or a name on a hub


def _places(named: Mapping[str, object]) -> dict[Place, str]:
    found = {role: _place(path) for role, path in named.items()}
    return {place: role for role, place in found.items() if place is not None}


def _link_run(
    config: Mapping[str, Any], identity: Mapping[str, Any], manifest: Mapping[str, Any]
) -> Links:
    lineage = manifest.get("lineage") or {}
    uses = dict.fromkeys(lineage.get("adapters", ()), "adapter in its base")
    uses |= dict.fromkeys(lineage.get("continues", ()), "adapter that it continues")
    uses |= _weights(identity.get("model") or manifest.get("base"), "model")
    uses |= _weights(identity.get("adapter") or manifest.get("adapter"), "adapter")
    evaluated = identity.get(EVALUATED_KEY, {})
    for role, digest in (
        ("tokenizer", identity.get("tokenizer") or manifest.get("tokenizer_hash")),
        ("texts", evaluated.get("eval.texts")),
        ("store", identity.get("store") or manifest.get("store")),
    ):
        uses |= {digest: role} if isinstance(digest, str) else {}
    model, data = config.get("model", {}), config.get("data", {})
    named = {
        "tokenizer": model.get("tokenizer"),
        "model": model.get("path"),
        "adapter": config.get("adapter"),
        "texts": config.get("eval", {}).get("store_dir"),
        "store": data.get("store_dir"),
    }
    return Links(frozenset(_weights(manifest.get("files"), "")), uses, _places(named))


def _read_sweep(entry: Entry) -> Entry:
    folder = entry.folder
    trials = read_trials(folder.place)
    driver = read_driver(folder)
    text = (folder.place / RESOLVED_SWEEP_FILE).read_bytes().decode()
    data, problems = parse_mapping(text, RESOLVED_SWEEP_FILE)
    if data is None or problems:
        raise UserError("; ".join(problems))
    sweep = from_dict(SweepConfig, data)
    num_trials = sweep.num_trials or len(build_grid(sweep.space))
    num_ended = sum(trial.has_ended for trial in trials.values())
    states = Counter(trial.state for trial in trials.values())
    if driver.state != "running":
        states["interrupted"] = states.pop("running", 0)
    counts = ", ".join(f"{count} {state}" for state, count in states.items() if count)
    best = _read_best(folder, sweep.metric)
    is_over = num_ended >= max(num_trials, len(trials)) and driver.state != "running"
    noted = [driver.note, counts, f"best: trial {best[0]}, {sweep.metric}" if best else ""]
    return replace(
        entry,
        state="finished" if is_over else driver.state,
        note="; ".join(filter(None, noted)),
        step=num_ended,
        num_steps=max(num_trials, len(trials)),
        eval_loss=best[1] if best else None,
        trained=f"{sweep.job} trials",
        links=_link_sweep(folder),
    )


def _link_sweep(folder: Folder) -> Links:
    identity = _read_json(folder, IDENTITY_FILE)
    base = identity.get("base", {})
    shared = {key: identity[key] for key in ("store", EVALUATED_KEY) if key in identity}
    return _link_run({}, {**base, **shared}, {})


def _read_best(folder: Folder, metric: str) -> tuple[int, float] | None:
    """Return the number and the metric of a sweep's best trial, as its leaderboard has it."""
    if LEADERBOARD_FILE not in folder.files:
        return None
    text = (folder.place / LEADERBOARD_FILE).read_bytes().decode()
    for row in csv.DictReader(io.StringIO(text)):
        if row.get("rank") == "1":
            return int(row["trial"]), float(row[metric])
    return None


def read_trial_entries(sweep: Folder) -> Iterator[Entry]:
    """Yield the trials of a sweep."""
    folders = sweep.folders.get("trials")
    if folders is None:
        return
    try:
        records, driver = read_trials(sweep.place), read_driver(sweep)
    except READ_ERRORS:
        return  # the sweep is damaged, and its entry says so
    for name, folder in folders.folders.items():
        number = int(name) if name.isdecimal() else -1
        record = records.get(number, TrialRecord(number, {}))
        entry = read_entry(folder, Trial(record, driver))
        if entry is not None:
            yield entry


def _read_store(entry: Entry) -> Entry:
    folder = entry.folder
    work = WORK_FOLDER.fullmatch(folder.place.name)
    if work is not None:
        return replace(entry, state="interrupted", note=f"unfinished work of {work[1]}")
    if OUTPUT_MANIFEST not in folder.files:
        return replace(entry, note=f"no {OUTPUT_MANIFEST}: being built, or left by a killed job")
    manifest = read_store_manifest(folder.place / OUTPUT_MANIFEST)
    train = manifest.splits["train"]
    tokenizer = manifest.inputs.get("tokenizer", {}).get("hash")
    return replace(
        entry,
        state="finished",
        note=f"{train.documents} documents, {train.tokens} tokens",
        links=Links(
            frozenset([manifest.fingerprint]),
            {tokenizer: "tokenizer"} if isinstance(tokenizer, str) else {},
        ),
    )


def _read_manifest(entry: Entry) -> Entry:
    """Read a directory that appeared with its manifest: merges, models, adapters, tokenizers."""
    manifest = _read_json(entry.folder, OUTPUT_MANIFEST)
    offers = _weights(manifest.get("files"), "")
    config = manifest.get("config", {})
    done = replace(entry, state="finished")
    if "merged" in manifest:
        inputs = manifest["merged"]["inputs"]
        uses = {digest: role for role, files in inputs.items() for digest in _weights(files, role)}
        lineage = manifest.get("lineage") or {}
        uses = dict.fromkeys(lineage.get("adapters", ()), "adapter in its base") | uses
        note = f"{manifest['kind']} of a base and {len(inputs) - 1} adapters"
        return replace(done, kind="merge", note=note, links=Links(frozenset(offers), uses))
    if "expanded" in manifest:
        found = manifest.get("tokenizer_hash")
        tokenizer = frozenset([found] if isinstance(found, str) else [])
        places = _places({"model": config.get("model")})
        return replace(done, kind="vocabulary", links=Links(tokenizer, {}, places))
    if "splits" in manifest:
        return _read_store(replace(entry, kind="store"))
    if manifest.get("kind") in ("model", "adapter"):
        uses = _link_run(config, {}, manifest).uses
        kind: Kind = "adapter" if manifest["kind"] == "adapter" else "model"
        return replace(done, kind=kind, links=Links(frozenset(offers), uses))
    raise UserError(f"{OUTPUT_MANIFEST} is not of a job of this package")


def _read_job(entry: Entry) -> Entry:
    """Read a directory of an evaluation, of answers or of made instructions."""
    folder, driver = entry.folder, read_driver(entry.folder)
    done = {"evaluation": RESULTS_FILE}.get(entry.kind, OUTPUT_MANIFEST)
    content = _read_json(folder, done)
    if not content:
        note = driver.note or ("nothing is written yet" if entry.kind == "job" else "")
        return replace(entry, state=driver.state, note=note)
    links = _link_models(content) if entry.kind == "evaluation" else _link_answers(content)
    is_done = content.get("status", "finished") == "finished"
    state: State = "running" if driver.state == "running" else "finished"
    if state == "finished" and not is_done:
        state = driver.state
    return replace(entry, state=state, note=driver.note, links=links)


def _link_models(results: Mapping[str, Any]) -> Links:
    """Return what an evaluation evaluated."""
    uses: dict[str, str] = {}
    for model in results["models"]:
        uses |= _weights(model["model"].get("hashes"), f"model {model['model']['name']}")
    places: dict[Place, str] = {}
    for model in results["settings"]["models"]:
        paths = [model.get("path"), *(model.get("adapters") or ())]
        role = f"model {model.get('name') or _name(model.get('path'))}"
        places |= {place: role for path in paths if (place := _place(path)) is not None}
    return Links(uses=uses, places=places)


def _link_answers(manifest: Mapping[str, Any]) -> Links:
    uses = _weights(manifest.get("model"), "model") | _weights(manifest.get("adapter"), "adapter")
    model = manifest.get("config", {}).get("model")
    if not isinstance(model, dict):  # an endpoint's model has a name only
        return Links(uses=uses)
    named = {"model": model.get("path"), "adapter": model.get("adapter")}
    return Links(uses=uses, places=_places(named))


def find_trial(place: Place) -> Trial | None:
    """Return what a sweep says of a run; None if it is no trial of a sweep.

    Raises:
        ValueError: the sweep's journal or lease is damaged.
        OSError: they cannot be read.
    """
    sweep = place.parent.parent
    if place.parent.name != "trials" or not place.name.isdecimal():
        return None
    if (sweep / JOURNAL_FILE).status() is None:
        return None
    claims = sweep / LEASE_FOLDER
    folders = {LEASE_FOLDER: read_folder(claims)} if claims.exists() else {}
    number = int(place.name)
    record = read_trials(sweep).get(number, TrialRecord(number, {}))
    return Trial(record, read_driver(Folder(sweep, folders=folders)))
