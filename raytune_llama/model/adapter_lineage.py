"""What an adapter was trained on: its base, adapters merged into that, those that it continues.

    lineage = Lineage.of_model(base)                    # of a model directory
    problems = check_chain(base, [first, second])       # whether both may be merged, in this order

Weights are named by the hashes of their files, as manifests record them. An adapter is a change of
one state of the weights: merged into another one it gives a model that nobody trained, of the right
shapes. An adapter that continues another contains it.
"""

import functools
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from raytune_llama.logs import waiting
from raytune_llama.model.adapter import Adapter
from raytune_llama.model.adapter_config import ADAPTER_CONFIG_FILE
from raytune_llama.storage.files import read_json, read_manifest
from raytune_llama.storage.hashes import algorithm_of, hash_file, show_hash

logger = logging.getLogger(__name__)

_ANY_SHA256 = "0" * 64

LINEAGE_KEY = "lineage"
"""Manifest key of the lineage of a merged model or an adapter."""


@dataclass(frozen=True)
class Lineage:
    """The weights that a model or adapter was made from, by the hashes of their files."""

    root: Mapping[str, str]
    """Hashes of the weight files of the model at the beginning, by file name."""
    adapters: tuple[str, ...] = ()
    """Hashes of the weights of the adapters that were merged into it, in order."""
    continues: tuple[str, ...] = field(default=())
    """Hashes of the weights of the adapters that an adapter continues, latest first."""

    @classmethod
    def of_model(cls, path: Path) -> Self:
        """Return the lineage of a model: of a merge, that of its inputs; else its own files."""
        manifest = read_manifest(path)
        recorded = _parse(manifest.get(LINEAGE_KEY))
        if recorded is not None:
            return cls(recorded.root, recorded.adapters)
        inputs = manifest.get("merged", {}).get("inputs")
        if not isinstance(inputs, dict):
            return cls(hash_weights(path))
        # Written by a release that recorded only the inputs.
        merged = [inputs[key] for key in sorted(inputs) if key != "base"]
        adapters = [digest for files in merged for digest in _only_weights(files).values()]
        return cls(_only_weights(inputs["base"]), tuple(adapters))

    def to_json(self) -> dict[str, Any]:
        """Return the lineage as plain data, for a manifest."""
        return asdict(self)


@dataclass(frozen=True)
class AdapterLineage:
    """What an adapter's manifest says of its training."""

    path: Path
    """Directory of the adapter."""
    file: Path
    """File of its weights."""
    base: Mapping[str, str]
    """Hashes of the weight files of the base that it was trained on; empty: not recorded."""
    recorded: Lineage | None
    """Lineage of that base, and what the adapter continues; None: not recorded."""

    @classmethod
    def of(cls, adapter: Adapter) -> Self:
        """Read the manifest of an adapter, which may have none."""
        manifest = read_manifest(adapter.path)
        base = _only_weights(manifest.get("base") or {})
        return cls(adapter.path, adapter.file, base, _parse(manifest.get(LINEAGE_KEY)))

    @property
    def weights(self) -> str:
        """Hash of its weights."""
        return _hash_once(self.file)

    @property
    def continues(self) -> tuple[str, ...]:
        """Hashes of the weights of the adapters that it continues and contains."""
        return self.recorded.continues if self.recorded else ()


def describe_training(base: Path, adapter: Adapter | None) -> dict[str, Any]:
    """Return the lineage of an adapter that is trained on a base, for its manifest.

    Args:
        base: Directory of the base.
        adapter: Adapter that the training continues; None: a new one.
    """
    lineage = Lineage.of_model(base)
    continues: tuple[str, ...] = ()
    if adapter is not None:
        before = AdapterLineage.of(adapter)
        continues = (before.weights, *before.continues)
    return Lineage(lineage.root, lineage.adapters, continues).to_json()


def describe_merge(base: Path, adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Return the lineage of the merge of a base and adapters, for its manifest."""
    lineage = Lineage.of_model(base)
    merged = tuple(_hash_once(adapter.file) for adapter in adapters)
    return Lineage(lineage.root, lineage.adapters + merged).to_json()


def check_chain(
    base: Path, adapters: Sequence[Adapter], *, base_field: str = "base", field: str = "adapters"
) -> list[str]:
    """Return why adapters may not be merged into a base in the given order; empty if they may.

    What their manifests do not record is logged as unchecked.

    Args:
        base: Directory of the base.
        adapters: Open adapters, in order; a single one for training on, or serving.
        base_field: Config field that names the base, for errors.
        field: Config field that names the adapters, for errors.
    """
    chain = [AdapterLineage.of(adapter) for adapter in adapters]
    problem = _check_first(base, chain[0], adapters[0], base_field)
    if problem is not None:
        return [problem]
    if len(chain) == 1:
        return []
    start = Lineage.of_model(base)
    for number, one in enumerate(chain[1:], start=1):
        reason = _find_wrong_order(one, chain[:number], base, start)
        if reason is not None:
            return [f"{field}: {one.path} {reason}; {_suggest(chain, start, field)}"]
    return []


def _check_first(base: Path, one: AdapterLineage, adapter: Adapter, field: str) -> str | None:
    """Return why a base is not the one that an adapter was trained on; None if it may be."""
    if not one.base:
        return _check_named_base(base, adapter, field)
    found = {name: _hash_named(base, name, digest) for name, digest in one.base.items()}
    differing = [name for name, digest in one.base.items() if found[name] != digest]
    if not differing:
        return None
    start, recorded = Lineage.of_model(base), one.recorded
    if recorded is not None and recorded.adapters and _is_same_root(recorded.root, start.root):
        if _are_merged(recorded, start, []):
            return None  # the same merge, written with another type or into other files
        num_merged = len(start.adapters)
        if _are_equal(recorded.adapters[:num_merged], start.adapters):
            lacking = ", ".join(map(show_hash, recorded.adapters[num_merged:]))
            return (
                f"{field}: {one.path} was trained on {base} merged with other adapters, whose "
                f"weights have the hashes {lacking}; list them before it, or set {field} to that "
                "merge"
            )
    name = differing[0]
    wanted, other = show_hash(one.base[name]), found[name]
    has = f"no {name} ({wanted})" if other is None else f"another {name} ({show_hash(other)}, "
    has += "" if other is None else f"wanted {wanted})"
    return (
        f"{field}: {base} is not the base that {one.path} was trained on: it has {has}; set "
        f"{field} to that model"
    )


def _find_wrong_order(
    one: AdapterLineage, before: Sequence[AdapterLineage], base: Path, start: Lineage
) -> str | None:
    """Return why an adapter was not trained on a base with others merged; None if it may be."""
    repeated = _find_repeated(one, before)
    if repeated is not None:
        return repeated
    if one.recorded is None:
        if one.base and all(_hash_named(base, name, h) == h for name, h in one.base.items()):
            return f"was trained on {base} itself, without the adapters before it"
        logger.warning(
            "%s records no lineage: whether it was trained on the merge of those before it cannot "
            "be checked",
            one.path,
        )
        return None
    if _are_merged(one.recorded, start, before):
        return None if _is_same_root(one.recorded.root, start.root) else "has another base"
    if not one.recorded.adapters:
        return "was trained on a base without adapters, not on the merge of those before it"
    return "was not trained on the merge of exactly those before it"


def _find_repeated(one: AdapterLineage, before: Sequence[AdapterLineage]) -> str | None:
    for other in before:
        if one.weights == other.weights:
            return "is listed twice"
        if other.weights in one.continues:
            return f"continues {other.path} and contains it"
        if one.weights in other.continues:
            return f"is continued by {other.path}, which contains it"
    return None


def _is_same_root(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether two roots are the same weights, as far as their hashes can be compared."""
    kinds = {algorithm_of(digest) for digest in (*one.values(), *other.values())}
    return len(kinds) > 1 or sorted(one.values()) == sorted(other.values())


def _are_merged(recorded: Lineage, start: Lineage, before: Sequence[AdapterLineage]) -> bool:
    """Whether the adapters in a record are those merged into a base already, then some others."""
    num_merged = len(start.adapters)
    others = recorded.adapters[num_merged:]
    return (
        _are_equal(recorded.adapters[:num_merged], start.adapters)
        and len(others) == len(before)
        and all(
            _hash_once(one.file, like) == like for one, like in zip(before, others, strict=True)
        )
    )


def _are_equal(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two lists of hashes are equal, as far as hashes of two algorithms can be."""
    return len(one) == len(other) and all(
        left == right or algorithm_of(left) != algorithm_of(right)
        for left, right in zip(one, other, strict=True)
    )


def _suggest(chain: Sequence[AdapterLineage], start: Lineage, field: str) -> str:
    """Return the list of adapters that would be right."""
    unique = {one.weights: one for one in chain}
    contained = {digest for one in unique.values() for digest in one.continues}
    left = [one for one in unique.values() if one.weights not in contained]
    order: list[AdapterLineage] = []
    while True:
        following = [
            one
            for one in left
            if one not in order
            and (one.recorded is None or _are_merged(one.recorded, start, order))
        ]
        if not following:
            break
        if len(following) > 1 and all(one.recorded for one in following):
            names = " or ".join(f"{field}=[{one.path}]" for one in following)
            return f"they were trained apart, on the same weights: merge one of them, {names}"
        order.append(following[0])
    if not order:
        return "merge each into the base that it was trained on"
    return f"set {field}=[{','.join(str(one.path) for one in order)}]"


def _check_named_base(base: Path, adapter: Adapter, field: str) -> str | None:
    """Compare a base with the name in an adapter_config.json, if the manifest records none."""
    named = adapter.settings.get("base_model_name_or_path")
    unchecked = f"only the names and shapes of its tensors were compared with {base}"
    if not isinstance(named, str) or not named:
        logger.warning("%s does not record its base: %s", adapter.path, unchecked)
        return None
    other = Path(named)
    if other.is_dir() and (other / "config.json").is_file():
        if other.resolve() == base.resolve():
            return None
        if sorted(hash_weights(other).values()) == sorted(hash_weights(base).values()):
            return None
        return (
            f"{field}: {ADAPTER_CONFIG_FILE} of {adapter.path} names the base {named}, whose "
            f"weights are not those of {base}; set {field}={named}, or, if it is the same model, "
            "correct base_model_name_or_path"
        )
    # A model of the hub lies in `models--ORG--NAME/snapshots/COMMIT` of its cache.
    cached = [
        one.name.rpartition("--")[2] for one in base.parents if one.name.startswith("models--")
    ]
    names = {base.name, _own_name(base).rpartition("/")[2], *cached}
    if other.name not in names:
        logger.warning(
            "%s names the base %s, which is not here: %s", adapter.path, named, unchecked
        )
    return None


def _own_name(base: Path) -> str:
    settings = read_json(base / "config.json")
    return str(settings.get("_name_or_path") or "") if isinstance(settings, dict) else ""


def hash_weights(path: Path) -> dict[str, str]:
    """Return the hashes of the weight files of a model directory, by name."""
    return hash_files(sorted([*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin")]))


def fingerprint_model(path: Path, like: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the hashes of a model's configuration and weight files, by file name.

    Args:
        path: Model directory.
        like: Recorded fingerprint to compare with, whose algorithms to use; None: a new one.
    """
    return hash_files([path / "config.json", *sorted(path.glob("*.safetensors"))], like)


def hash_adapter(adapter: Adapter, like: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the hashes of an adapter's settings and weights, by file name.

    Args:
        adapter: Adapter.
        like: Recorded hashes to compare with, whose algorithms to use; None: new ones.
    """
    return hash_files([adapter.path / ADAPTER_CONFIG_FILE, adapter.file], like)


def hash_files(files: Sequence[Path], like: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the hashes of files, by name; a file is hashed once per process while it is unchanged.

    Args:
        files: Files of one directory.
        like: Recorded hashes to compare with, whose algorithms to use; None: new ones.
    """
    if not files:
        return {}
    gigabytes = sum(file.stat().st_size for file in files) / 1e9
    what = f"hashing {files[0].parent}, {gigabytes:.1f} GB"
    recorded = [_like(like, file.name) for file in files]
    # Hashing releases the GIL, so threads help with large models.
    with (
        waiting(logger, what, usually="1 to 3 s per GB"),
        ThreadPoolExecutor(max_workers=8) as pool,
    ):
        hashes = pool.map(_hash_once, files, recorded)
        return dict(zip((file.name for file in files), hashes, strict=True))


def _like(recorded: Mapping[str, str] | None, name: str) -> str | None:
    """Return a recorded hash of the same algorithm as that of a file, which may be new."""
    if not recorded:
        return None
    return recorded.get(name) or next(iter(recorded.values()))


def _hash_named(base: Path, name: str, like: str) -> str | None:
    """Return the hash of a file of a base with the algorithm of a recorded one; None: no file."""
    file = base / Path(name).name
    return _hash_once(file, like) if file.is_file() else None


def _hash_once(file: Path, like: str | None = None) -> str:
    status = file.stat()
    state = (status.st_size, status.st_mtime_ns, status.st_ino)
    return _cached_hash(file, state, None if algorithm_of(like) == "blake3" else _ANY_SHA256)


@functools.lru_cache(maxsize=1024)
def _cached_hash(file: Path, state: tuple[int, int, int], like: str | None) -> str:  # noqa: ARG001  # the key
    return hash_file(file, like)


def _only_weights(files: Mapping[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in files.items() if not name.endswith(".json")}


def _parse(value: object) -> Lineage | None:
    if not isinstance(value, dict):
        return None
    return Lineage(
        dict(value["root"]), tuple(value["adapters"]), tuple(value.get("continues") or ())
    )
