"""What may be deleted below some directories, and its deletion: `raytune runs prune`.

Nothing is deleted that is not named. What a driver may be using, or what an unfinished run needs to
resume, is refused: while files of a run are deleted, its lease is held.
"""

import fcntl
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from raytune_llama.config.settings import ConfigError
from raytune_llama.runs.entries import RUN_KINDS, Entry
from raytune_llama.runs.lineage import find_results
from raytune_llama.runs.recognition import WORK_FOLDER
from raytune_llama.runs.survey import Survey, is_leftover
from raytune_llama.runs.text import render_table, show_age, show_bytes, show_place
from raytune_llama.runs.tree import Folder, read_folder
from raytune_llama.storage.files import OUTPUT_MANIFEST
from raytune_llama.storage.lease import LEASE_FOLDER, Lease
from raytune_llama.storage.place import Place
from raytune_llama.storage.transfers import default_cache_dir
from raytune_llama.train.checkpoint.layout import (
    CHECKPOINT_MANIFEST,
    CHECKPOINT_NAME,
    DAMAGED_SUFFIX,
)

logger = logging.getLogger(__name__)

QUIET_SECONDS: Final = 3600.0
"""Seconds without a write after which what has no lease counts as left by a killed process."""

_COPIES: Final = "folders"
"""Folder of the cache with copies of models, each with a lock that its readers hold."""

_RESULTS_OF_JOBS: Final = ("store", "merge", "vocabulary", "model", "adapter")
"""Kinds that other jobs read and that have no lease."""


@dataclass(frozen=True)
class Candidate:
    """Something that takes space and may not be needed any more."""

    place: Place
    """What to name for deleting it."""

    reason: str
    """Why it may be deleted, and what is lost."""

    num_bytes: int
    """Bytes that deleting it frees."""

    age_seconds: float | None
    """Seconds since its newest write; None if it is empty."""

    owner: Entry | None = None
    """Run or sweep whose lease protects it; None: it has no lease."""

    refusal: str | None = None
    """Why it is not deleted now; None if it may be."""

    def to_json(self) -> dict[str, Any]:
        """Return the facts as plain data."""
        return {
            "place": str(self.place),
            "reason": self.reason,
            "bytes": self.num_bytes,
            "refusal": self.refusal,
        }


def find_candidates(survey: Survey) -> list[Candidate]:
    """Return what may be deleted of a survey, and this node's cache; the largest first."""
    found: list[Candidate] = []
    for entry in survey.entries:
        found += _find_checkpoints(entry, survey)
    found += _find_unused(survey)
    for root in survey.roots:
        found += _find_leftovers(root, survey)
    found += _find_cache(survey)
    return sorted(found, key=lambda candidate: -candidate.num_bytes)


def _candidate(
    folder: Folder, reason: str, owner: Entry | None = None, refusal: str | None = None
) -> Candidate:
    age = None if folder.modified is None else time.time() - folder.modified
    if refusal is None and owner is not None and owner.state == "running":
        refusal = f"in use by {show_place(owner.place)}, which runs ({owner.note})"
    return Candidate(folder.place, reason, folder.num_bytes, age, owner, refusal)


def _owner_of(entry: Entry, survey: Survey) -> Entry:
    """Return the entry that has the lease of an entry: of a trial, its sweep."""
    if not entry.is_trial:
        return entry
    sweep = entry.place.parent.parent
    return next((other for other in survey.entries if other.place == sweep), entry)


def _find_checkpoints(entry: Entry, survey: Survey) -> Iterator[Candidate]:
    """Yield the checkpoints of a run that no resume needs."""
    owner = _owner_of(entry, survey)
    for checkpoint in entry.checkpoints:
        if not entry.is_resumable:
            best = ", the best one" if checkpoint.is_best else ""
            yield _candidate(
                checkpoint.folder,
                f"checkpoint of a run that is {entry.state}{best}: needed only to export its step",
                owner,
            )
        elif not checkpoint.is_newest and not checkpoint.is_best:
            yield _candidate(
                checkpoint.folder, "older checkpoint, neither the newest nor the best", owner
            )


def _find_unused(survey: Survey) -> Iterator[Candidate]:
    """Yield token stores that no entry refers to."""
    unread = sum(entry.state == "damaged" and entry.kind != "store" for entry in survey.entries)
    doubt = f" (but {unread} damaged directories cannot say what they use)" if unread else ""
    for entry in survey.entries:
        if entry.kind != "store" or WORK_FOLDER.fullmatch(entry.place.name):
            continue
        if entry.state == "damaged":
            yield _candidate(entry.folder, f"damaged store: {entry.note}", refusal=_young(entry))
        elif not find_results(entry, survey.entries):
            reason = f"store that no run found here refers to{doubt}"
            yield _candidate(entry.folder, reason, refusal=_young(entry))


def _young(entry: Entry) -> str | None:
    return _describe_young(entry.folder)


def _describe_young(folder: Folder) -> str | None:
    """Return why something without a lease may be in use; None if nothing has written to it."""
    age = QUIET_SECONDS if folder.modified is None else time.time() - folder.modified
    if age >= QUIET_SECONDS:
        return None
    quiet = show_age(QUIET_SECONDS)
    return f"written {show_age(age)} ago: a job may use it; nothing must have written for {quiet}"


def _find_leftovers(root: Folder, survey: Survey) -> Iterator[Candidate]:
    """Yield what killed processes have left."""
    owners = [
        (entry.place, _owner_of(entry, survey))
        for entry in survey.entries
        if LEASE_FOLDER in entry.folder.folders or entry.is_trial
    ]
    pending = [root]
    while pending:
        folder = pending.pop()
        reason = _describe_leftover(folder)
        inner = max(
            (pair for pair in owners if folder.place.is_below(pair[0])),
            key=lambda pair: len(pair[0].key),
            default=None,
        )
        owner = None if inner is None else inner[1]
        if reason is None:
            pending += folder.folders.values()
            yield from _find_files(folder, owner)
        elif WORK_FOLDER.fullmatch(folder.place.name):
            yield _candidate(folder, reason, refusal=_find_builder(folder))
        else:
            refusal = None if owner is not None else _describe_young(folder)
            yield _candidate(folder, reason, owner, refusal)


def _describe_leftover(folder: Folder) -> str | None:
    name = folder.place.name
    if is_leftover(folder):
        return "left by a process that was killed while it wrote"
    if WORK_FOLDER.fullmatch(name):
        return "unfinished work of a token store: the same command would continue it"
    if CHECKPOINT_NAME.fullmatch(name) and CHECKPOINT_MANIFEST not in folder.files:
        return "checkpoint whose write was not finished"
    if name.endswith(DAMAGED_SUFFIX) and CHECKPOINT_NAME.fullmatch(
        name.removesuffix(DAMAGED_SUFFIX)
    ):
        return "damaged checkpoint, which is never loaded"
    if name == "packs" and folder.place.with_name("trials").exists():
        return "working files of the packs of a sweep"
    return None


def _find_files(folder: Folder, owner: Entry | None) -> Iterator[Candidate]:
    """Yield the temporary files of a folder."""
    for name, facts in folder.files.items():
        if name.startswith(".") and name.endswith(".tmp"):
            alone = Folder(folder.place / name, {name: facts})
            refusal = None if owner is not None else _describe_young(alone)
            reason = "left by a process that was killed while it wrote"
            yield _candidate(alone, reason, owner, refusal)


def _find_builder(folder: Folder) -> str | None:
    """Return why the work of a token store is in use; None if no job builds it."""
    if folder.place.is_local and _is_locked(folder.place.path / "lock"):
        return "in use: a job is building this store"
    # The lock does not say so of a job on another machine, if the disk is shared without locks.
    return _describe_young(folder)


def _is_locked(file: Path) -> bool:
    """Whether a process of this machine holds a lock file."""
    try:
        with file.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _find_cache(survey: Survey) -> Iterator[Candidate]:
    """Yield this machine's cache of object storage, and each copy of a model's folder in it."""
    path = default_cache_dir()
    if not path.is_dir():
        return
    cache = read_folder(Place.local(path))
    running = next((entry for entry in survey.entries if entry.state == "running"), None)
    refusal = None
    if running is not None:
        refusal = f"{show_place(running.place)} runs and may read it"
    copies = cache.folders.get(_COPIES)
    for name, copy in copies.folders.items() if copies is not None else ():
        used = None
        if _is_locked(path / _COPIES / ".locks" / f"{name}.use"):
            used = f"in use: a process of this machine reads the copy {name}"
        yield _candidate(copy, "copy of a folder in object storage: fetched again", None, used)
        refusal = refusal or used
    if cache.num_bytes:
        reason = "all of this machine's copies of object storage: they are fetched again"
        yield _candidate(cache, reason, None, refusal or _describe_young(cache))


def render_candidates(candidates: Sequence[Candidate], width: int) -> str:
    """Return what may be deleted as a table, with the total and how to delete."""
    if not candidates:
        return "nothing to delete"
    rows = [
        (
            show_place(candidate.place),
            f"{candidate.reason}; kept: {candidate.refusal}"
            if candidate.refusal
            else candidate.reason,
            show_age(candidate.age_seconds),
            show_bytes(candidate.num_bytes),
        )
        for candidate in candidates
    ]
    total = _count_bytes(candidates)
    free = _count_bytes([candidate for candidate in candidates if candidate.refusal is None])
    return "\n".join(
        [
            render_table(("path", "what it is", "age", "size"), rows, width, num_left=2),
            "",
            f"{show_bytes(total)} in {len(candidates)} places, {show_bytes(free)} of it may be "
            "deleted; nothing was. Name what to delete: --delete PATH ...",
        ]
    )


def candidates_json(candidates: Sequence[Candidate]) -> str:
    """Return what may be deleted as a JSON document, for programs."""
    return json.dumps([candidate.to_json() for candidate in candidates], indent=1)


def delete_places(survey: Survey, names: Sequence[str]) -> int:
    """Delete what is named, if none of it is in use; return the bytes that this frees.

    Args:
        survey: what was found below the directories that may be deleted from.
        names: candidates, or whole directories of finished jobs.

    Raises:
        ConfigError: something may not be deleted, with the reason; then nothing is.
    """
    candidates = {candidate.place: candidate for candidate in find_candidates(survey)}
    chosen: dict[Place, Candidate] = {}
    problems: list[str] = []
    for name in names:
        place = Place.parse(name, "--delete")
        found = candidates.get(place) or _whole_entry(place, survey)
        if found is None:
            problems.append(f"--delete: {name}: {_explain_unknown(place, survey)}")
        elif found.refusal is not None:
            problems.append(f"--delete: {name}: {found.refusal}")
        else:
            chosen[place] = found
    if problems:
        raise ConfigError([*problems, "nothing was deleted"])
    for candidate in _outermost(list(chosen.values())):
        _delete(candidate)
        logger.info("deleted %s: %s", candidate.place, show_bytes(candidate.num_bytes))
    return _count_bytes(list(chosen.values()))


def _outermost(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates that are not below others."""
    places = [candidate.place for candidate in candidates]
    return [
        candidate
        for candidate in candidates
        if not any(candidate.place != other and candidate.place.is_below(other) for other in places)
    ]


def _count_bytes(candidates: Sequence[Candidate]) -> int:
    """Return the bytes of candidates, of those in others once."""
    return sum(candidate.num_bytes for candidate in _outermost(candidates))


def _whole_entry(place: Place, survey: Survey) -> Candidate | None:
    """Return the directory of a job as something to delete; None if no job wrote the place."""
    entry = next((entry for entry in survey.entries if entry.place == place), None)
    if entry is None:
        return None
    owner = _owner_of(entry, survey) if LEASE_FOLDER in entry.folder.folders else None
    owner = _owner_of(entry, survey) if entry.is_trial else owner
    refusal = _explain_needed(entry, survey)
    if refusal is None and entry.kind in _RESULTS_OF_JOBS and entry.state != "finished":
        refusal = _young(entry)
    return _candidate(entry.folder, "named", owner, refusal)


def _explain_needed(entry: Entry, survey: Survey) -> str | None:
    """Return why a whole directory is still needed; None if it is not."""
    where = show_place(entry.place)
    if entry.state == "running":
        return f"in use: it runs ({entry.note})"
    if entry.is_trial:
        return f"a trial of a sweep, whose journal lists it; name {show_place(entry.place.parent)}"
    if entry.kind in (*RUN_KINDS, "sweep") and entry.is_resumable and entry.step:
        return (
            f"it can be resumed from what it has saved ({entry.state} at {entry.step}); to give "
            f"that up, delete it yourself: rm -r {where}"
        )
    needed = [relative for relative in find_results(entry, survey.entries) if relative.entry]
    needed += [
        relative
        for trial in survey.entries
        if trial.is_trial and trial.place.is_below(entry.place)
        for relative in find_results(trial, survey.entries)
        if relative.entry and not relative.entry.place.is_below(entry.place)
    ]
    users = [relative for relative in needed if relative.entry and relative.entry.is_resumable]
    if not users:
        return None
    user = users[0].entry
    assert user is not None
    return f"{show_place(user.place)} ({user.state}) needs it as its {users[0].role} to resume"


def _explain_unknown(place: Place, survey: Survey) -> str:
    for entry in survey.entries:
        for checkpoint in entry.checkpoints:
            if checkpoint.folder.place == place:
                which = "newest" if checkpoint.is_newest else "best"
                return (
                    f"the {which} checkpoint of {show_place(entry.place)}, which can be resumed "
                    f"({entry.state} at {entry.step})"
                )
    roots = ", ".join(show_place(root.place) for root in survey.roots)
    return f"neither listed by `raytune runs prune` nor a directory of a job, below {roots}"


def _delete(candidate: Candidate) -> None:
    """Delete a candidate, under the lease of its owner if it has one.

    Raises:
        ConfigError: another driver has claimed the owner's directory in the meantime.
    """
    owner = candidate.owner
    if owner is None:
        _delete_tree(candidate.place)
        return
    with Lease(owner.place) as lease:
        lease.confirm()
        if candidate.place != owner.place:
            _delete_tree(candidate.place)
            return
        for folder in candidate.place.folders():
            if folder.name != LEASE_FOLDER:
                folder.delete()
        for file in candidate.place.files():
            file.delete()
    # The lease deletes its own files once nothing else is left.
    candidate.place.delete_empty()


def _delete_tree(place: Place) -> None:
    """Delete a file or a folder; one that is cut off by a crash does not look complete."""
    if place.is_local and Path(place.key).is_dir():
        aside = place.with_name(f".{place.name}.deleted.tmp")
        aside.delete()
        place.path.rename(aside.path)
        aside.delete()
        return
    if place.is_dir():
        (place / OUTPUT_MANIFEST).delete()
    place.delete()
