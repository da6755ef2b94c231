"""What a run was started with, and whether a later start asks for the same run.

The identity is the settings that decide the result, and the inputs by hash. It is written to
`identity.json` in the run directory before the first step, beside `run.yaml`.
"""

import logging
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from raytune_llama.config.settings import (
    ConfigError,
    find_differences,
    from_dict,
    identity,
    override,
    to_dict,
    to_yaml,
)
from raytune_llama.config.yaml12 import format_value, parse_mapping
from raytune_llama.data.build.text_corpus import keep_store_bos
from raytune_llama.data.store.token_store import TokenStore
from raytune_llama.evaluate.tasks.task import EvaluationTask
from raytune_llama.model.adapter_lineage import fingerprint_model
from raytune_llama.storage.directories import fetched
from raytune_llama.storage.place import Place
from raytune_llama.tokenizer.loader import hash_tokenizer, load_tokenizer
from raytune_llama.train.checkpoint.layout import newest_checkpoint_step
from raytune_llama.train.config import AnyTrainConfig, PretrainConfig
from raytune_llama.train.export import (
    fingerprint_adapter,
    read_result,
    result_path,
)
from raytune_llama.train.run_files import IDENTITY_FILE, RUN_CONFIG_FILE

logger = logging.getLogger(__name__)

C = TypeVar("C", bound=AnyTrainConfig)

_HORIZON = ("max_steps", "num_epochs", "stop_step")
"""Fields that say where a run ends."""


def identify(config: AnyTrainConfig, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the identity of a run: the settings that decide its result, and its inputs by hash.

    The token store's fingerprint is added once the store exists.

    Args:
        config: config of the run, with absolute paths.
        like: recorded identity to compare with, whose hash algorithms to use; None: that of the
            run's directory, if there is one.
    """
    then = read_identity(config.run_place) if like is None else like
    return {
        "config": identity(config),
        # All other `data` settings that affect the result are in the store's fingerprint.
        "data": {"sources": [{"weight": source.weight} for source in config.data.sources]},
        "model": fingerprint_model(fetched(config.model.path), then.get("model")),
        "adapter": fingerprint_adapter(config, then.get("adapter") or then.get("model")),
        "tokenizer": hash_tokenizer(fetched(config.model.tokenizer_path), then.get("tokenizer")),
    }


def identify_evaluated(texts: TokenStore | None, tasks: Sequence[EvaluationTask]) -> dict[str, Any]:
    """Return what identifies `eval.texts` and each of `eval.tasks`, by name.

    Args:
        texts: token store of the texts; None without texts.
        tasks: tasks with their questions.
    """
    found: dict[str, Any] = {} if texts is None else {"eval.texts": texts.fingerprint}
    for task in tasks:
        files = dict(task.file_hashes)
        found[f"eval.tasks.{task.name}"] = {"settings": identity(task.config), "files": files}
    return found


def read_identity(place: Place) -> dict[str, Any]:
    """Return the identity that a run or sweep was started with; empty if it was not started."""
    file = place / IDENTITY_FILE
    return file.read_json() if file.exists() else {}


def check_identity(place: Place, now: Mapping[str, Any], *, field: str = "run_dir") -> None:
    """Refuse to resume a run or sweep that was started with other settings or inputs.

    Args:
        place: directory of the run or sweep; a new directory passes.
        now: current identity from `identify`, or part of it.
        field: config field that names the directory.

    Raises:
        ConfigError: lists every field that differs.
    """
    then = read_identity(place)
    problems = _find_changes(place, then, now, field) if then else []
    if problems:
        raise ConfigError(problems)


def check_run(config: AnyTrainConfig, now: Mapping[str, Any]) -> None:
    """Refuse to resume a run with other settings or inputs; see `check_identity`.

    A run with `max_steps: 0` has trained nothing, so that it may be continued to any step. One that
    has not ended may end at another `stop_step`, since its steps until then are the same.

    Args:
        config: config of the run, with absolute paths.
        now: current identity from `identify`, or part of it with `config`.

    Raises:
        ConfigError: lists every field that differs and, if the run was to be longer, how to
            continue from its result.
    """
    then = read_identity(config.run_place)
    if not then:
        return
    old, new = then["config"], now["config"]
    if old.get("max_steps") == 0:
        then = {**then, "config": old | {field: new[field] for field in _HORIZON}}
    elif config.stop_step != old.get("stop_step") and read_result(config) is None:
        newest = newest_checkpoint_step(config.run_place)
        if config.stop_step is not None and config.stop_step <= newest:
            raise ConfigError(
                [
                    f"stop_step: got {config.stop_step}, but the run's newest checkpoint is of "
                    f"step {newest}; set it to {newest + 1} or more"
                ]
            )
        then = {**then, "config": old | {"stop_step": config.stop_step}}
    problems = _find_changes(config.run_place, then, now, "run_dir")
    if problems and (new["max_steps"] == 0 or _is_longer(old, new)):
        purpose = "evaluate its result" if new["max_steps"] == 0 else "train longer"
        problems.append(describe_continuation(config, purpose, _remaining(old, new)))
    if problems:
        raise ConfigError(problems)


def _find_changes(
    place: Place, then: Mapping[str, Any], now: Mapping[str, Any], field: str
) -> list[str]:
    changed = find_differences({key: then.get(key) for key in now}, now)
    if not changed:
        return []
    return [
        f"{field}: {place} was started with other settings or inputs (then -> now); "
        f"restore them, or use another {field}",
        *changed,
    ]


def _is_longer(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether a config ends a run later than the one that it was started with."""
    for field in ("max_steps", "num_epochs"):
        before, after = old.get(field), new.get(field)
        if before != after:
            # Steps and epochs cannot be compared.
            return before is None or after is None or after > before
    before, after = old.get("stop_step"), new.get("stop_step")
    return before is not None and (after is None or after > before)


def _remaining(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return overrides of the new config for a run of the steps or epochs that the old one lacks.

    Empty if they cannot be counted, or if the new config only evaluates.
    """
    if new["max_steps"] and old.get("max_steps"):
        end, before = (each.get("stop_step") or each["max_steps"] for each in (new, old))
        stop = {} if new["stop_step"] is None else {"stop_step": None}
        return {"max_steps": end - before, **stop}
    if new["num_epochs"] and old.get("num_epochs"):
        return {"num_epochs": round(new["num_epochs"] - old["num_epochs"], 6)}
    return {}


def describe_continuation(config: AnyTrainConfig, purpose: str, changes: Mapping[str, Any]) -> str:
    """Return how to start another run from the result of a run, as a message of `run_dir`.

    Args:
        config: config of the run, with absolute paths.
        purpose: what the other run is for, after "to".
        changes: overrides that the other run needs besides those of its start.
    """
    result, place = result_path(config), config.run_place
    first = "" if read_result(config) is not None else f"finish this run, so that {result} exists; "
    target = f"{place.name}-evaluated" if config.max_steps == 0 else f"{place.name}-continued"
    values = {
        **continuation_overrides(config, str(result)),
        "run_dir": str(place.with_name(target)),
        **changes,
    }
    schedule = "" if config.max_steps == 0 else ", with a learning rate schedule of its own"
    command = shlex.join(f"{field}={format_value(value)}" for field, value in values.items())
    return (
        f"run_dir: to {purpose}, {first}start another run from the result{schedule}: "
        f"the same config with {command}"
    )


def continuation_overrides(config: AnyTrainConfig, source: str) -> dict[str, Any]:
    """Return the overrides of a run's config that start another run from its result.

    They lack `run_dir`.

    Args:
        config: config of the run that made the result.
        source: path of the result.
    """
    if config.train == "lora":
        values: dict[str, Any] = {"adapter": source}
        values |= {"lora": None} if config.lora is not None else {}
    else:
        # The result has the run's tokenizer and RoPE scaling in its own files.
        own = {"tokenizer": config.model.tokenizer, "rope_scaling": config.model.rope_scaling}
        values = {"model.path": source}
        values |= {f"model.{field}": None for field, value in own.items() if value is not None}
    if isinstance(config, PretrainConfig) and config.embeddings.new_rows_only:
        # The result's own tokenizer has the new ids, so that it lacks none of the run's.
        values["embeddings.new_rows_only"] = False
    if config.max_steps != 0:
        # Another order: with the same one, the run would begin with what this one has seen.
        values["seed"] = config.seed + 1
    return values


def keep_recorded_bos(config: C, run_dir: Place) -> C:
    """Return the config with `data.bos: true` if it is `auto`, but its run or store recorded true.

    `true` was the default before `auto`, so the run's config may not name the field; its resumed
    run must train on the same documents.

    Args:
        config: config of the run, with absolute paths.
        run_dir: directory of the run, or of another one on the same store.
    """
    if not isinstance(config, PretrainConfig) or config.data.bos != "auto":
        return config
    file = run_dir / RUN_CONFIG_FILE
    text = file.read_bytes().decode(errors="replace") if file.exists() else ""
    recorded, _ = parse_mapping(text, str(file))
    if recorded and isinstance(recorded.get("data"), dict) and recorded["data"].get("bos") is True:
        return override(config, {"data.bos": True})
    try:
        tokenizer = load_tokenizer(fetched(config.model.tokenizer_path))
    except (ValueError, OSError):
        return config  # reported by the checks of the inputs
    store = Place.parse(config.data.store_dir, "data.store_dir")
    kept = keep_store_bos(config.data, tokenizer, store)
    return config if kept is config.data else override(config, {"data.bos": True})


def write_identity(config: AnyTrainConfig, now: Mapping[str, Any]) -> None:
    """Write `run.yaml` and `identity.json` before the first step; log the permitted changes."""
    before = config.run_place / RUN_CONFIG_FILE
    if before.exists():
        for change in placement_changes(config, before):
            logger.info("changed since the run's last start: %s", change)
    # The identity first, as it marks a run directory: a start killed in between can be repeated.
    (config.run_place / IDENTITY_FILE).write_json(now)
    before.write_bytes(to_yaml(config).encode())


def placement_changes(config: AnyTrainConfig, before: Place) -> list[str]:
    """Return the fields that differ from the run's previous `run.yaml`."""
    data, problems = parse_mapping(before.read_bytes().decode(errors="replace"), str(before))
    if data is not None and not problems:
        try:
            return find_differences(to_dict(from_dict(type(config), data)), to_dict(config))
        except ConfigError as error:
            problems = error.problems
    return [f"{before} can't be read ({'; '.join(problems)}); it is rewritten"]
