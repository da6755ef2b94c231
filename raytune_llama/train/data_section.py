"""What the job prepare-data builds: the data of its own config, or that of a training config.

    job = load_preparation(sys.argv[1:], default=Path("jobs/configs/prepare_data_smollm2.yaml"))
    print(job.config.data.store_dir)

Of a training config only what decides the token store is read, so that the store of a run can be
built, and looked at, before its other settings are chosen.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from raytune_llama.config.command_line import find_misfits
from raytune_llama.config.settings import (
    ConfigError,
    from_dict,
    load,
    override,
    read_arguments,
    to_dict,
)
from raytune_llama.data.config import (
    AnyDataConfig,
    AnyPrepareConfig,
    PrepareChatDataConfig,
    PrepareDataConfig,
)
from raytune_llama.train.config import AnyTrainConfig, PretrainConfig, SftConfig

logger = logging.getLogger(__name__)

T = TypeVar("T")

RowKind = Literal["text", "conversations"]
"""What the rows of a store's sources are."""

_OWN: Final = ("rows", "preview", "preview_documents")
_RUN_MARKS: Final = ("model", "run_dir")
_USED: Final = {"model": ("path", "tokenizer"), "batch": ("sequence_tokens",)}
_MAX_STEPS: Final = 10**6
"""Steps of a reduced run, enough that no weight of a source is too small."""


@dataclass(frozen=True)
class Preparation:
    """A token store to build or to preview."""

    config: AnyPrepareConfig
    """Config of the job; of a training config, what it has in common with one."""
    run: AnyTrainConfig | None = None
    """Training config that it was read from, only with the settings that decide the store."""

    @property
    def tokenizer_field(self) -> str:
        """Field of the user's config that names the tokenizer's directory."""
        if self.run is None:
            return "tokenizer"
        return "model.path" if self.run.model.tokenizer is None else "model.tokenizer"

    def resolve_data(self) -> AnyDataConfig:
        """Return the data settings that the run would use: a former default is kept if recorded."""
        if self.run is None:
            return self.config.data
        from raytune_llama.storage.directories import pin_directory
        from raytune_llama.train.identity import keep_recorded_bos

        field = self.tokenizer_field
        pinned = pin_directory(self.run.model.tokenizer_path, field)
        run = override(self.run, {field: pinned})
        return keep_recorded_bos(run, run.run_place).encoded_data


def load_preparation(
    argv: Sequence[str], *, default: Path | None = None, program: str | None = None
) -> Preparation:
    """Read a config of prepare-data, or of a training job, as a job's command line gives it.

    Overrides of `rows`, `preview` and `preview_documents` may be added to a training config.

    Args:
        argv: Arguments without the program's name; see `load`.
        default: File to read if `argv` names none.
        program: What the usage line calls the program.

    Raises:
        ConfigError: All mistakes, of a training config only those that concern the store.
        SystemExit: With status 0, after the help was printed.
    """
    if {"-h", "--help"} & set(argv):
        try:
            load(PrepareDataConfig, argv, default=default, program=program)
        except ConfigError:  # no section of it
            load(PrepareChatDataConfig, argv, default=default, program=program)
    data, problems = read_arguments(argv, default=default, program=program)
    if data is None:
        raise ConfigError(problems)
    if not any(mark in data for mark in _RUN_MARKS):
        configs: dict[RowKind, type[AnyPrepareConfig]] = {
            "text": PrepareDataConfig,
            "conversations": PrepareChatDataConfig,
        }
        return Preparation(_choose(configs, data, data, problems))
    if "tokenizer" in data:
        problems.append(
            f"tokenizer: got {data['tokenizer']!r}, but a training config names it in "
            "model.tokenizer; set that one"
        )
    return _read_run(data, problems)


def _read_run(data: Mapping[str, Any], problems: list[str]) -> Preparation:
    """Read what decides the token store of a training config."""
    configs: dict[RowKind, type[AnyTrainConfig]] = {
        "text": PretrainConfig,
        "conversations": SftConfig,
    }
    run = _choose(configs, _reduce(data), data, problems)
    own = {name: data[name] for name in _OWN if name in data}
    values = {"tokenizer": run.model.tokenizer_path, "data": to_dict(run.encoded_data), **own}
    is_chat = isinstance(run, SftConfig)
    config = from_dict(PrepareChatDataConfig if is_chat else PrepareDataConfig, values)
    used = ["data", "model.tokenizer" if run.model.tokenizer else "model.path"]
    used += ["batch.sequence_tokens"] if is_chat and run.data.chat.max_tokens is None else []
    ignored = [name for name in data if name not in ("data", "model", *_OWN)]
    ignored = [name for name in ignored if f"{name}.sequence_tokens" not in used]
    logger.info(
        "using %s of this config of `raytune %s`; not used: %s",
        ", ".join(used),
        "sft" if is_chat else "pretrain",
        ", ".join(ignored) or "none",
    )
    return Preparation(config, run)


def _reduce(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a training config with the settings that decide its token store, and defaults."""
    kept: dict[str, Any] = {"run_dir": "runs", "train": "full", "max_steps": _MAX_STEPS}
    kept |= {name: data[name] for name in ("run_dir", "data") if name in data}
    for section, names in _USED.items():
        value = data.get(section)
        if isinstance(value, Mapping):
            kept[section] = {name: value[name] for name in names if name in value}
        elif section in data:
            kept[section] = value
    return kept


def _choose(
    configs: Mapping[RowKind, type[T]],
    data: Mapping[str, Any],
    full: Mapping[str, Any],
    problems: list[str],
) -> T:
    """Build the config of the kind of rows that the data are for.

    Args:
        configs: Settings class of each kind.
        data: Settings that decide the store.
        full: All settings of the user, which decide if `data` fits both kinds.
        problems: Mistakes found so far.

    Raises:
        ConfigError: All mistakes.
    """
    kind = _find_kind(configs, data, full)
    found = _find(configs[kind], data)
    if problems or found:
        raise ConfigError([*problems, *found])
    return from_dict(configs[kind], data)


def _find_kind(
    configs: Mapping[RowKind, type[Any]], data: Mapping[str, Any], full: Mapping[str, Any]
) -> RowKind:
    for kind in configs:
        if kind == full.get("rows"):
            return kind
    costs: dict[RowKind, tuple[int, ...]] = {
        kind: _rate(cls, data, full) for kind, cls in configs.items()
    }
    best = min(costs, key=lambda kind: costs[kind])
    if len(set(costs.values())) == 1 and not _find(configs[best], data):
        return _sniff(data)
    return best


def _rate(cls: type[Any], data: Mapping[str, Any], full: Mapping[str, Any]) -> tuple[int, ...]:
    """Return how badly settings fit a class, the worst kind of misfit first."""
    # By the names of fields first: one that is unknown hides other mistakes. A section that is
    # unknown is worse than a typo in it.
    unknown, elsewhere = find_misfits(cls, data), find_misfits(cls, full)
    sections = sum(path.count(".") < 2 for path in unknown)
    return sections, len(unknown), len(elsewhere), len(_find(cls, data))


def _find(cls: type[Any], data: Mapping[str, Any]) -> list[str]:
    try:
        from_dict(cls, data)
    except ConfigError as error:
        return error.problems
    return []


def _sniff(data: Mapping[str, Any]) -> RowKind:
    """Return what the first row of the sources is, if the settings fit both kinds."""
    from raytune_llama.data.readers.conversations import starts_with_conversation

    config = from_dict(PrepareChatDataConfig, {"tokenizer": "", "data": data["data"]})
    if not starts_with_conversation(config.data.sources):
        return "text"
    logger.info(
        "data.sources: the first row is a conversation; set rows=text to build a store of text"
    )
    return "conversations"
