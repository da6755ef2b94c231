"""Inputs wherever they are kept: directories of models, tokenizers and adapters, and data sources.

    text = pin_directory("org/name", "model.path")     # on the driver, once
    folder = fetched(text)                             # in each process that opens the directory

A config's directory is a local one, `s3://...` or `gs://...`, or a model on the hub:
`hf://org/name[@revision]`, or `org/name[@revision]` where nothing local can be meant. A local
directory always wins, and so does a name in a local folder that exists: with ./demo there,
`demo/modle` is a misspelled path and not a model that a stranger may have published under that
name. `hf://` has one meaning everywhere. Sources are also `hf://datasets/org/name[@revision]/path`.
"""

import logging
import re
import threading
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from raytune_llama.config.errors import UserError
from raytune_llama.storage import hub
from raytune_llama.storage.node_cache import NodeCache
from raytune_llama.storage.place import Place, is_url

logger = logging.getLogger(__name__)

_fetched: dict[str, Path] = {}
_PAGE = re.compile(r"(?:https?://[^/]+/|(?i:hf)://)(?P<repo>[^/?#]+/[^/?#]+)")
_lock = threading.Lock()


def pin_directory(text: str, field: str, recorded: Iterable[str] = ()) -> str:
    """Return a configured directory so that it means the same in every process and at any time.

    A local path becomes absolute, a model on the hub gets the commit of its revision.

    Args:
        text: Path in the config.
        field: Config field that holds it, for messages.
        recorded: Pinned paths of an earlier start, whose commits are kept; see `hub.pin`.

    Raises:
        ValueError: The path is of an unknown kind, or the hub has no such model or can't be
            reached. Nothing local and no bucket is looked into.
    """
    if text.startswith(hub.SCHEME):
        return str(hub.pin(_parse(text, field, "model"), field, recorded))
    if page := _PAGE.match(text):
        raise UserError(f"{field}: got {text!r}; for a model on the hub give hf://{page['repo']}")
    place = Place.parse(text, field)
    is_elsewhere = not place.is_local or place.exists() or place.parent.exists()
    if is_elsewhere or not hub.is_bare_id(text):
        return str(place)
    try:
        pinned = hub.pin(_parse(f"{hub.SCHEME}{text}", field, "model"), field, recorded)
    except UserError as error:
        reason = str(error).removeprefix(f"{field}: ")
        raise UserError(f"{field}: there is no local directory {text}, and {reason}") from error
    logger.info("%s: there is no local directory %s: using the hub's %s", field, text, pinned)
    return str(pinned)


def fetch_directory(text: str, field: str, *, weights: bool = True) -> Path:
    """Return the local directory of a pinned path; fetch to this node what is not there yet.

    Args:
        text: Path from `pin_directory`.
        field: Config field that holds it, for messages.
        weights: Whether to fetch weights too.

    Raises:
        ValueError: It can't be fetched; says why and what to do.
    """
    if text.startswith(hub.SCHEME):
        model = hub.pin(_parse(text, field, "model"), field)
        folder = hub.fetch(model, field, weights=weights)
    elif is_url(text):
        cache = NodeCache.from_environment()
        folder = cache.fetch(Place.parse(text, field), field, weights=weights)
    else:
        return Path(text)
    _fetched[text] = folder
    return folder


def fetched(text: str, field: str = "path", *, weights: bool = True) -> Path:
    """Return the local directory of a pinned path, as this process has fetched it before.

    If it has not, it is fetched now. A local path is returned as it is.

    Args:
        text: Path from `pin_directory`.
        field: Config field that holds it, for messages.
        weights: Whether to fetch weights too, if it has to be fetched.

    Raises:
        ValueError: It can't be fetched; says why and what to do.
    """
    if not is_url(text):
        return Path(text)
    with _lock:
        return _fetched.get(text) or fetch_directory(text, field, weights=weights)


def published_name(text: str) -> str:
    """Return the name under which others know a directory: `org/name` on the hub, else its path."""
    return hub.HubPath.parse(text, "path").repo if text.startswith(hub.SCHEME) else text


def pin_source(text: str, field: str, recorded: Iterable[str] = ()) -> str:
    """Return the path of a source; of a dataset on the hub, at the commit of its revision.

    Args:
        text: File, folder or glob in the config.
        field: Config field that holds it, for messages.
        recorded: Pinned paths of an earlier start, whose commits are kept; see `hub.pin`.

    Raises:
        ValueError: It is of an unknown kind, or the hub has no such dataset or revision.
    """
    if not text.startswith(hub.SCHEME):
        return str(Place.parse(text, field))
    return str(hub.pin(_parse(text, field, "dataset"), field, recorded))


def pin_source_fields(paths: Iterable[str], field: str) -> dict[str, str]:
    """Return the pinned paths of a list of sources by config field; see `pin_source`."""
    named = ((f"{field}.{number}.path", path) for number, path in enumerate(paths))
    return {name: pin_source(path, name) for name, path in named}


@lru_cache(maxsize=1024)
def parse_source(text: str, field: str) -> Place:
    """Return the place of a source, a dataset on the hub at one commit.

    Args:
        text: File, folder or glob in the config, or from `pin_source`; without a commit, the one
            that the revision is now is used for as long as this process runs.
        field: Config field that holds it, for messages.

    Raises:
        ValueError: As `pin_source`.
    """
    if not text.startswith(hub.SCHEME):
        return Place.parse(text, field)
    path = hub.pin(_parse(text, field, "dataset"), field)
    key = str(replace(path, ref=None)).removeprefix(hub.SCHEME)
    return Place("hf", key, "" if path.ref is None else f"ref={path.ref}")


def _parse(text: str, field: str, kind: hub.Kind) -> hub.HubPath:
    path = hub.HubPath.parse(text, field)
    if path.kind != kind:
        wanted = "hf://org/name" if kind == "model" else "hf://datasets/org/name/path"
        raise UserError(f"{field}: got {text!r}, a {path.kind}; wanted a {kind}, {wanted}")
    return path
