"""Find the directories that jobs wrote, below given ones.

survey = survey_places(["runs", "s3://bucket/runs"])
[entry.state for entry in survey.entries]
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from raytune_llama.config.settings import ConfigError
from raytune_llama.runs.entries import Entry
from raytune_llama.runs.recognition import WORK_FOLDER, read_entry, read_trial_entries
from raytune_llama.runs.tree import PROBE, TEMPORARY, Folder, read_folder
from raytune_llama.storage.files import OUTPUT_MANIFEST
from raytune_llama.storage.lease import LEASE_FOLDER
from raytune_llama.storage.place import Place

DEFAULT_FOLDERS: Final = ("runs", "stores", "models", "made")
"""Folders of the current one in which the default configs of the jobs write."""

_OWN_FOLDERS: Final = frozenset(
    {
        *("checkpoints", "initial", "packs", "parts", "ray", "tensorboard", "texts", "trials"),
        *("pt_lora_model", "pt_model", "sft_lora_model", "sft_model", LEASE_FOLDER),
    }
)
"""Folders that jobs make in their directories, in which no other job writes."""


@dataclass(frozen=True)
class Survey:
    """What was found below some folders."""

    roots: tuple[Folder, ...]
    """The folders, without those that are below others."""

    entries: tuple[Entry, ...]
    """Directories that jobs wrote, each before those below it; trials after their sweep."""

    unlisted: tuple[Folder, ...]
    """Folders that cannot be listed, with the reason."""


def default_places() -> list[str]:
    """Return where jobs write by default, and what a merge has written to the current folder."""
    here = Path()
    found = [name for name in DEFAULT_FOLDERS if (here / name).is_dir()]
    found += [str(file.parent) for file in sorted(here.glob(f"*/{OUTPUT_MANIFEST}"))]
    return found


def survey_places(names: Sequence[str], *, field: str = "DIR") -> Survey:
    """Find all directories that jobs wrote, in given folders and below.

    Args:
        names: folders, local or in object storage.
        field: what an error calls them.

    Raises:
        ConfigError: a folder does not exist, or a bucket cannot be reached.
    """
    if not names:
        folders = ", ".join(f"{name}/" for name in DEFAULT_FOLDERS)
        raise ConfigError(
            [f"{field}: none of {folders} is in {Path.cwd()}; name the directories to look in"]
        )
    places = list(dict.fromkeys(Place.parse(name, field) for name in names))
    outer = [p for p in places if not any(p != other and p.is_below(other) for other in places)]
    roots = tuple(map(read_folder, outer))
    return Survey(
        roots,
        tuple(entry for root in roots for entry in _find_entries(root)),
        tuple(folder for root in roots for folder in root.walk() if folder.problem is not None),
    )


def _find_entries(folder: Folder) -> Iterator[Entry]:
    if is_leftover(folder):
        return
    entry = read_entry(folder)
    if entry is not None:
        yield entry
        if entry.kind == "sweep":
            yield from read_trial_entries(folder)
        if WORK_FOLDER.fullmatch(folder.place.name):
            return
    for name, below in folder.folders.items():
        if entry is None or name not in _OWN_FOLDERS:
            yield from _find_entries(below)


def is_leftover(folder: Folder) -> bool:
    """Whether a folder is being written, or was left by a killed process."""
    name = folder.place.name
    return TEMPORARY.fullmatch(name) is not None or PROBE.fullmatch(name) is not None
