"""Models and datasets of the Hugging Face Hub, pinned to a commit.

    path = pin(HubPath.parse("hf://org/name@main", "model.path"), "model.path")
    str(path)                            # hf://org/name@<commit>?ref=main
    folder = fetch(path, "model.path")   # the hub library's own cache, shared with other programs

Of a model only weights in safetensors, tokenizers and settings are fetched, never code or pickles.
The token comes from HF_TOKEN alone. HF_ENDPOINT, HF_HOME, HF_HUB_CACHE and HF_HUB_OFFLINE mean what
they mean to `huggingface_hub`.
"""

import contextlib
import glob
import hashlib
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, TypeVar
from urllib.parse import quote, unquote

from raytune_llama.config.errors import UserError
from raytune_llama.logs import waiting
from raytune_llama.storage.buckets import HUB_TOKEN_ENVIRONMENT, hub_token
from raytune_llama.storage.files import read_json, sha256_file, write_json_atomic
from raytune_llama.storage.model_files import is_model_file, is_weights, refuse_pickles
from raytune_llama.storage.node_cache import locked, show_size
from raytune_llama.storage.transfers import default_cache_dir

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

T = TypeVar("T")

Kind = Literal["model", "dataset"]
"""Type of a repository."""

SCHEME = "hf://"
"""Beginning of a path on the hub."""

_DEFAULT_REF = "main"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPO = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_REVISION = r"refs/(?:convert|pr)/[^/?@]+|[^/?@]+"
_PATH = re.compile(
    rf"hf://(?P<datasets>datasets/)?(?P<repo>{_REPO})(?:@(?P<revision>{_REVISION}))?"
    r"(?P<path>/[^?]*)?(?:\?ref=(?P<ref>[^?&]+))?",
    re.ASCII,
)
_BARE = re.compile(rf"{_REPO}(?:@(?:{_REVISION}))?", re.ASCII)
_NUM_ATTEMPTS = 5
_MAX_WAIT_SECONDS = 300.0


@dataclass(frozen=True)
class HubFile:
    """A file of a repository at one commit."""

    name: str
    """Path in the repository."""
    num_bytes: int
    """Size in bytes."""


@dataclass(frozen=True)
class HubPath:
    """A model, or a part of a dataset, on the hub; `str()` gives it as a user writes it."""

    kind: Kind
    """Type of the repository."""
    repo: str
    """`org/name`."""
    revision: str | None
    """Branch, tag or commit; None: the default branch."""
    path: str = ""
    """File, folder or glob in a dataset; empty: all of it."""
    ref: str | None = None
    """What was asked for before the revision was resolved to a commit; None: the commit."""

    @classmethod
    def parse(cls, text: str, field: str) -> Self:
        """Parse `hf://org/name[@revision]` or `hf://datasets/org/name[@revision][/path]`.

        A slash in the name of a branch is written as %2F.

        Args:
            text: The path.
            field: Config field that holds it, for the message.

        Raises:
            ValueError: It is of another form.
        """
        found = _PATH.fullmatch(text)
        path = (found["path"] or "").strip("/") if found else ""
        if found is None or (path and not found["datasets"]):
            raise UserError(
                f"{field}: got {text!r}; wanted hf://org/name, hf://org/name@revision or, for "
                "sources, hf://datasets/org/name@revision/path (a slash in a revision is %2F, and "
                "of wildcards * and ** can be used)"
            )
        revision, ref = found["revision"], found["ref"]
        return cls(
            "dataset" if found["datasets"] else "model",
            found["repo"],
            None if revision is None else unquote(revision),
            path,
            None if ref is None else unquote(ref),
        )

    def __str__(self) -> str:
        datasets = "datasets/" if self.kind == "dataset" else ""
        safe = "/" if (self.revision or "").startswith("refs/") else ""
        revision = "" if self.revision is None else f"@{quote(self.revision, safe=safe)}"
        path = f"/{self.path}" if self.path else ""
        ref = "" if self.ref is None else f"?ref={quote(self.ref, safe='')}"
        return f"{SCHEME}{datasets}{self.repo}{revision}{path}{ref}"

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a full commit hash."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    @property
    def commit(self) -> str:
        """Hash of the commit; the path must be pinned."""
        assert self.is_pinned, f"{self} is not pinned"
        return str(self.revision)


def pin(path: HubPath, field: str, recorded: Iterable[str] = ()) -> HubPath:
    """Return a path at the commit that its revision is now, or was when it was recorded.

    Args:
        path: Path to pin; a pinned one stays as it is.
        field: Config field that holds it, for messages.
        recorded: Pinned paths of an earlier start; the commit of one with the same repository and
            revision is used again, even if the branch has moved.

    Raises:
        ValueError: There is no such repository or revision, it is not readable, the hub can't be
            reached, or the model's weights are pickles.
    """
    pinned = path
    if not path.is_pinned:
        commit = _find_recorded(path, recorded)
        if commit is None:
            with _named_errors(path, field):
                commit = _retry(lambda: _resolve(path))
        logger.info("%s: %s is commit %s", field, path, commit)
        pinned = replace(path, revision=commit, ref=path.revision or _DEFAULT_REF)
    if pinned.kind == "model" and not _is_offline():
        with _named_errors(path, field):
            names = [file.name for file in list_files(pinned)]
        refuse_pickles(names, f"{field}: {path}")
    return pinned


def check_readable(text: str, field: str) -> None:
    """Raise if the repository of a path is missing or private, or lacks the revision.

    Args:
        text: Path on the hub.
        field: Config field that holds it, for messages.

    Raises:
        ValueError: Says what to do.
    """
    path = HubPath.parse(text, field)

    def ask() -> None:
        _api().repo_info(path.repo, repo_type=path.kind, revision=path.revision)

    with _named_errors(path, field):
        _retry(ask)


def _resolve(path: HubPath) -> str:
    found = _api().resolve_revision(path.repo, repo_type=path.kind, revision=path.revision)
    return found.resolved


def _find_recorded(path: HubPath, recorded: Iterable[str]) -> str | None:
    wanted = (path.kind, path.repo, path.revision or _DEFAULT_REF)
    for text in recorded:
        one = HubPath.parse(text, "recorded")
        if one.is_pinned and (one.kind, one.repo, one.ref) == wanted:
            return one.commit
    return None


def find_hub_paths(text: str) -> list[str]:
    """Return the pinned paths on the hub that a text, such as a run's `run.yaml`, contains."""
    found = (one[0] for one in re.finditer(r"hf://[^\s'\",\]}]+", text))
    return [one for one in found if _PATH.fullmatch(one)]


def may_be_on_hub(text: str) -> bool:
    """Whether a configured path names something on the hub, or could."""
    return text.startswith(SCHEME) or is_bare_id(text)


def is_bare_id(text: str) -> bool:
    """Whether a text has the form `org/name[@revision]`, which relative paths can have too."""
    return _BARE.fullmatch(text) is not None


def fetch(path: HubPath, field: str, *, weights: bool = True) -> Path:
    """Return the local folder with a model's files, whole and checked; fetch what is missing.

    Args:
        path: Pinned path of a model.
        field: Config field that holds it, for messages.
        weights: Whether to fetch the weights, which are most of the bytes.

    Raises:
        ValueError: The files can't be fetched, are damaged, or the disk has no room.
    """
    name = f"{path.repo.replace('/', '--')}@{path.commit}"
    record = default_cache_dir() / "hub" / f"{name}.json"
    with (
        _named_errors(path, field),
        locked(record.with_suffix(".lock"), f"another process fetches {path}"),
    ):
        listed = _list_or_none_offline(path)
        if listed is None:
            return _find_unlisted(path, field)
        files = {
            file.name: file
            for file in listed
            if is_model_file(file.name) and (weights or not is_weights(file.name))
        }
        if not files:
            raise UserError(f"{field}: {path} has none of a model's files")
        checked = set(read_json(record)) if record.is_file() else set()
        missing = {name: file for name, file in files.items() if not _is_cached(path, name)}
        _check_room(path, missing, field)
        folder = Path(_retry(lambda: _download(path, files, missing, field)))
        for name in sorted(files.keys() - (checked - missing.keys())):
            _check_content(folder / name, f"{field}: {path}")
        write_json_atomic(record, sorted(checked | files.keys()))
        return folder


def _list_or_none_offline(path: HubPath) -> tuple[HubFile, ...] | None:
    """Return the files of a model; None if the cache does not know them and requests are off."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        return list_files(path)
    except OfflineModeIsEnabled:
        return None


def _find_unlisted(path: HubPath, field: str) -> Path:
    """Return what another program has fetched of a model whose list of files is not known."""
    from huggingface_hub import snapshot_download

    folder = snapshot_download(path.repo, revision=path.commit, local_files_only=True)
    logger.warning("%s: HF_HUB_OFFLINE=1, so that the files in %s are not checked", field, folder)
    return Path(folder)


def _download(
    path: HubPath, files: Mapping[str, HubFile], missing: Mapping[str, HubFile], field: str
) -> str:
    from huggingface_hub import snapshot_download

    num_bytes = sum(file.num_bytes for file in missing.values())
    what = f"{field}: fetching {len(missing)} files, {show_size(num_bytes)}, of {path}"
    if missing:
        logger.info("%s", what)
    with waiting(logger, what, usually="10 to 60 s per GB"):
        return snapshot_download(
            path.repo,
            revision=path.commit,
            allow_patterns=[glob.escape(name) for name in files],
            token=hub_token(),
            local_files_only=not missing,
        )


@lru_cache(maxsize=64)
def list_files(path: HubPath) -> tuple[HubFile, ...]:
    """Return all files of a repository at a commit, from the hub or the cache.

    Raises:
        OSError: The hub can't be reached or refuses.
    """
    from huggingface_hub import RepoFile, get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        found: Iterable[object] = get_cached_repo_tree(
            path.repo, repo_type=path.kind, revision=path.commit
        )
    except CachedRepoTreeNotFoundError:
        found = _retry(
            lambda: list(
                _api().list_repo_tree(
                    path.repo, repo_type=path.kind, revision=path.commit, recursive=True
                )
            )
        )
    files = [file for file in found if isinstance(file, RepoFile)]
    return tuple(HubFile(file.path, file.lfs.size if file.lfs else file.size) for file in files)


def _api() -> "HfApi":
    from huggingface_hub import HfApi

    return HfApi(token=hub_token())


def _is_offline() -> bool:
    from huggingface_hub import constants

    return constants.is_offline_mode()


def _is_cached(path: HubPath, name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(path.repo, name, revision=path.commit)
    return isinstance(found, str)


def _check_room(path: HubPath, missing: Mapping[str, HubFile], field: str) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    while not folder.is_dir():
        folder = folder.parent
    wanted, free = sum(file.num_bytes for file in missing.values()), shutil.disk_usage(folder).free
    if wanted > free:
        raise UserError(
            f"{field}: no room for {path}: {show_size(wanted)} are to be fetched, but "
            f"{HF_HUB_CACHE} has {show_size(free)} free; free space (`hf cache ls` lists what "
            "it holds), or set HF_HUB_CACHE to a larger disk"
        )


def _check_content(local: Path, what: str) -> None:
    """Compare a file with the hash that names it in the library's cache; delete it if it differs.

    That name is the hub's ETag: the SHA-256 of a large file, else the blob's id in git. A cache
    without symbolic links has no such names: there, only sizes are checked.
    """
    blob = local.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):
        digest = sha256_file(blob)
    elif re.fullmatch(r"[0-9a-f]{40}", blob.name):
        content = blob.read_bytes()
        header = f"blob {len(content)}\0".encode()
        digest = hashlib.sha1(header + content, usedforsecurity=False).hexdigest()
    else:
        return
    if digest != blob.name:
        blob.unlink()
        local.unlink(missing_ok=True)
        raise UserError(f"{what}: {local.name} was damaged on its way; run the command again")


def _retry(call: Callable[[], T]) -> T:
    """Call again while the hub is busy or the connection breaks; it says how long to wait."""
    import httpx2

    for attempt in range(_NUM_ATTEMPTS - 1):
        try:
            return call()
        except (OSError, httpx2.HTTPError) as error:
            seconds = _seconds_until_retry(error, attempt)
            if seconds is None:
                raise
            logger.warning(
                "the hub is busy (%s); trying again in %.0f s", _first_line(error), seconds
            )
            time.sleep(seconds)
    return call()


def _seconds_until_retry(error: BaseException, attempt: int) -> float | None:
    """Return how long to wait before the next attempt; None: another would fail as well."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    cause = error if isinstance(error, HfHubHTTPError) else error.__cause__
    if isinstance(cause, HfHubHTTPError):
        if cause.response.status_code not in (408, 429, 500, 502, 503, 504):
            return None
        text = cause.response.headers.get("Retry-After", "")
        seconds = float(text) if text.isdigit() else 2.0**attempt
        return seconds if seconds <= _MAX_WAIT_SECONDS else None
    is_broken = isinstance(error, httpx2.TransportError) or isinstance(cause, httpx2.TransportError)
    return 2.0**attempt if is_broken else None


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextlib.contextmanager
def _named_errors(path: HubPath, field: str) -> Iterator[None]:
    """Say what of the hub's answers the user can do something about, and what."""
    import httpx2
    from huggingface_hub.errors import HFValidationError, RevisionResolutionError

    try:
        yield
    except (OSError, httpx2.HTTPError, RevisionResolutionError, HFValidationError) as error:
        raise UserError(f"{field}: {_describe(error, path)}") from error


def _describe(error: BaseException, path: HubPath) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    token = f"{HUB_TOKEN_ENVIRONMENT} is {'' if hub_token() else 'not '}set here"
    cause = error if isinstance(error, HfHubHTTPError) else error.__cause__
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
    if _is_offline():
        return (
            f"{path} is not (or only in part) in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE=1 "
            f"forbids to fetch it; unset that, or run `hf download {path.repo}` where the hub can "
            "be reached"
        )
    if isinstance(cause, RevisionNotFoundError):
        wanted = path.ref or path.revision or _DEFAULT_REF
        return f"{path.repo} has no revision {wanted!r} on {constants.ENDPOINT}; check the spelling"
    if isinstance(cause, GatedRepoError):
        return (
            f"{path.repo} is gated: accept its terms on {constants.ENDPOINT}/{path.repo}, and set "
            f"{HUB_TOKEN_ENVIRONMENT} on every node ({token})"
        )
    if isinstance(cause, RepositoryNotFoundError) or status in (401, 403):
        return (
            f"{constants.ENDPOINT} has no {path.kind} {path.repo}, or it is private; check the "
            f"spelling, or set {HUB_TOKEN_ENVIRONMENT} to a token that may read it, on every node "
            f"({token})"
        )
    if status == 429:
        return (
            f"{constants.ENDPOINT} refuses more requests for now (429); run the command again "
            f"later, or set {HUB_TOKEN_ENVIRONMENT}, which allows more ({token})"
        )
    return f"{path} cannot be fetched from {constants.ENDPOINT}: {_first_line(error)}"
