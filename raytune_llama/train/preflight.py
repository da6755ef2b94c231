"""Checks of the config and its input files before Ray starts anything; all problems at once."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel

from raytune_llama.chat.templates.choice import build_template
from raytune_llama.config.settings import (
    ConfigError,
    find_differences,
    from_dict,
    identity,
    override,
    to_dict,
    to_yaml,
)
from raytune_llama.config.yaml12 import parse_mapping
from raytune_llama.data.build.preparation import DataInputs, open_data
from raytune_llama.model.directory import stored_tables
from raytune_llama.model.embeddings import check_embeddings
from raytune_llama.model.lineage import check_adapter_tokenizer, find_chat_template
from raytune_llama.model.llama import (
    build_empty_model,
    check_document_isolation,
    check_model_directory,
    check_model_settings,
    check_output_projection,
    decoder_layers,
    has_weights,
)
from raytune_llama.model.lora import (
    check_adapter_directory,
    check_adapter_fits,
    check_adapter_targets,
)
from raytune_llama.model.quantization import check_quantization
from raytune_llama.model.rope import build_rope_settings, check_rope_scaling, read_model_settings
from raytune_llama.model.vocab import VocabularyFit, check_vocabulary, num_embedding_rows
from raytune_llama.storage.files import read_json
from raytune_llama.storage.place import Place, check_place, local_path
from raytune_llama.tokenizer.loader import load_tokenizer, tokenizer_sha256
from raytune_llama.train.config import (
    DORA_PARTITIONED,
    AnyTrainConfig,
    PretrainConfig,
    SftConfig,
)
from raytune_llama.train.engines.config import strategies_with
from raytune_llama.train.export import fingerprint_adapter, fingerprint_model
from raytune_llama.train.untrained_rows import (
    check_embedding_rate,
    count_untrained_rows,
    modules_to_save,
)

logger = logging.getLogger(__name__)

C = TypeVar("C", bound=AnyTrainConfig)

IDENTITY_FILE = "identity.json"
RUN_CONFIG_FILE = "run.yaml"

_ON_ANY_STORAGE = {"run_dir", "data.store_dir"}
_SOURCES = ("data.sources.", "data.validation.")
_WRITTEN = {
    "run_dir": "a path that every node mounts, such as run_dir=/shared/{}",
    "data.store_dir": "a path that every node mounts, such as data.store_dir=/shared/{}",
    "data.cache_dir": "one on each node's own disk, such as data.cache_dir=/local/{}",
}


def resolve_places(config: C, *, in_job: bool) -> C:
    """Make every path of a config absolute, relative to the current directory.

    Args:
        config: config as the user wrote it.
        in_job: whether this is the driver of a submitted job, whose directory is temporary.

    Raises:
        ConfigError: a field does not accept this kind of path, or an output path is relative in a
            submitted job.
    """
    fields: dict[str, str | None] = {
        "run_dir": config.run_dir,
        "data.store_dir": config.data.store_dir,
        "data.cache_dir": config.data.cache_dir,
        "model.path": config.model.path,
        "model.tokenizer": config.model.tokenizer,
        "adapter": config.adapter,
    }
    for number, source in enumerate(config.data.sources):
        fields[f"data.sources.{number}.path"] = source.path
    for number, source in enumerate(config.data.validation):
        fields[f"data.validation.{number}.path"] = source.path
    problems: list[str] = []
    resolved: dict[str, str] = {}
    for field, text in fields.items():
        if text is None:
            continue
        try:
            is_any = field in _ON_ANY_STORAGE or field.startswith(
                ("data.sources.", "data.validation.")
            )
            place = Place.parse(text, field) if is_any else Place.local(local_path(text, field))
        except ValueError as error:
            problems.append(str(error))
            continue
        resolved[field] = str(place)
        is_relative = place.is_local and not Path(text).expanduser().is_absolute()
        if in_job and is_relative and field in _WRITTEN:
            problems.append(
                f"{field}: {text!r} is relative, and a submitted job's directory is deleted when "
                f"it ends; use {_WRITTEN[field].format(text)}"
            )
    if problems:
        raise ConfigError(problems)
    return override(config, resolved)


@dataclass(frozen=True)
class Inputs:
    """Opened inputs of a run; opened once per start and shared by all later checks."""

    data: DataInputs
    """Tokenizer and corpus of the run."""

    skeleton: PreTrainedModel
    """Model without weights, on PyTorch's meta device."""

    vocabulary: VocabularyFit
    """The tokenizer against the model's embedding rows."""


def open_inputs(config: AnyTrainConfig, data: DataInputs | None = None) -> Inputs:
    """Open the files that a config with absolute paths names, and check the config against them.

    Args:
        config: config of the run.
        data: tokenizer and corpus, if another run on the same store has already opened them.

    Raises:
        ConfigError: lists every problem found.
    """
    skeleton, fit, problems = _open_model(config)
    problems += _check_adapter(config) + _check_template(config)
    try:
        data = data or open_data(config.encoded_data, Path(config.model.tokenizer_path))
    except ConfigError as error:
        problems += error.problems
    problems += _check_run_dir(config)
    if problems or data is None or skeleton is None or fit is None:
        # The vocabulary and the data checks report the same tokenizer problem.
        raise ConfigError(list(dict.fromkeys(problems)))
    return Inputs(data, skeleton, fit)


def _open_model(
    config: AnyTrainConfig,
) -> tuple[PreTrainedModel | None, VocabularyFit | None, list[str]]:
    """Open the model without weights and compare its tokenizer; also return the problems."""
    path = Path(config.model.path)
    try:
        # A plan needs no weights, but weights that exist must be complete.
        no_weights_needed = config.plan and not has_weights(path)
        problems = (check_model_settings if no_weights_needed else check_model_directory)(path)
        if problems:
            return None, None, problems
        model = build_empty_model(path)
    except (ValueError, OSError) as error:
        return None, None, [f"model.path: cannot load a causal LM from {path}: {error}"]
    problems = _check_model(config, model)
    try:
        fit = check_vocabulary(num_embedding_rows(model), path, Path(config.model.tokenizer_path))
    except (ValueError, OSError) as error:
        return model, None, [*problems, str(error)]
    return model, fit, problems + _check_vocabulary(config, model, fit)


def _check_model(config: AnyTrainConfig, model: PreTrainedModel) -> list[str]:
    problems = check_output_projection(model)
    problems += _check_positions(config, model)
    if config.batch.evaluation_form == "isolated":
        problems += check_document_isolation(model)
    if config.lora is not None:
        problems += check_adapter_targets(model, config.lora)
    if config.engine.traits.shards_by_layer and not decoder_layers(model):
        others = strategies_with(lambda traits: not traits.shards_by_layer)
        problems.append(
            f"engine.strategy: got {config.engine.strategy}, but {type(model).__name__} has no "
            f"list of layers, so they cannot be sharded one by one; set engine.strategy={others}"
        )
    if config.model.quantization is not None:
        keep = modules_to_save(config)
        problems += check_quantization(model, config.model.quantization, keep)
    return problems


def _check_template(config: AnyTrainConfig) -> list[str]:
    """Refuse a chat template other than the one that the model or adapter was tuned with."""
    if not isinstance(config, SftConfig) or config.allow_other_template:
        return []
    found = find_chat_template([Path(path) for path in (config.model.path, config.adapter) if path])
    if found is None:
        return []
    directory, chat = found
    try:
        tokenizer = load_tokenizer(Path(config.model.tokenizer_path))
        template = build_template(config.data.chat.template, tokenizer)
    except (ValueError, OSError):
        return []  # reported by the data check
    if template.sha256 == chat["template_sha256"]:
        return []
    return [
        f"data.chat.template: got {template.name}, but {directory} was tuned with "
        f"{chat['template']} (SHA256 {chat['template_sha256'][:16]}, this one "
        f"{template.sha256[:16]}); use that one, or set allow_other_template=true"
    ]


def _check_adapter(config: AnyTrainConfig) -> list[str]:
    if config.adapter is None:
        return []
    problem = check_adapter_directory(Path(config.adapter))
    if problem:
        return [problem]
    is_dora = read_json(Path(config.adapter) / "adapter_config.json").get("use_dora")
    return [DORA_PARTITIONED] if is_dora and config.engine.layout == "ZeRO 3" else []


def _check_positions(config: AnyTrainConfig, model: PreTrainedModel) -> list[str]:
    """Check RoPE scaling, and that the adapter to continue from was trained with the same."""
    scaling = config.model.rope_scaling
    if scaling is not None:
        problems = check_rope_scaling(model.config, scaling, config.batch.sequence_tokens)
        if problems:
            return problems
    if config.adapter is None or _check_adapter(config):
        return []
    trained = read_model_settings(Path(config.adapter))
    wanted = build_rope_settings(model.config, scaling)
    if trained == wanted:
        return []
    return [
        f"model.rope_scaling: the adapter {config.adapter} was trained with "
        f"{trained or 'the RoPE settings of its base'}, but the run would use "
        f"{wanted or 'the RoPE settings of its base'}; set it as the adapter was trained"
    ]


def _check_vocabulary(
    config: AnyTrainConfig, model: PreTrainedModel, fit: VocabularyFit
) -> list[str]:
    if fit.num_unused_rows:
        logger.info(
            "the model has %d embedding rows for the tokenizer's %d ids: %d unused rows are kept",
            fit.num_rows,
            fit.num_ids,
            fit.num_unused_rows,
        )
    problems = _check_untrained_rows(config, model, fit)
    problems += check_embedding_rate(config, model)
    if isinstance(config, PretrainConfig) and config.train == "embeddings":
        problems += check_embeddings(model, config.embeddings, fit.new_ids)
        if has_weights(Path(config.model.path)):  # a plan works without weights
            problems += _check_stored_tables(model, Path(config.model.path))
    if not problems and config.adapter is not None and not _check_adapter(config):
        adapter = Path(config.adapter)
        problems = check_adapter_tokenizer(adapter, Path(config.model.tokenizer_path))
        return problems or check_adapter_fits(model, adapter, num_ids=fit.num_ids)
    return problems


def _check_untrained_rows(
    config: AnyTrainConfig, model: PreTrainedModel, fit: VocabularyFit
) -> list[str]:
    """Refuse rows that no stage trains; an embedding stage may leave some to the next stage."""
    counts = count_untrained_rows(config, model, fit.num_new_ids)
    if not counts:
        return []
    tables = " and ".join(counts)
    if config.train == "embeddings":
        logger.warning(
            "%s stays frozen, with %s rows of new ids untrained: train it in the next stage "
            "(lora.modules_to_save), or set embeddings.lm_head here",
            tables,
            " and ".join(str(count) for count in counts.values()),
        )
    if config.train == "embeddings" or config.model.allow_untrained_rows:
        return []
    remedy = f"add {', '.join(counts)} to lora.modules_to_save, or set model.allow_untrained_rows"
    if fit.num_new_ids:
        return [
            f"model.tokenizer: it has {fit.num_new_ids} ids that the model was not trained with, "
            f"and the new rows of {tables} would stay as initialized; {remedy}"
        ]
    return [
        f"model.path: the run that made {config.model.path} trained no new row of {tables} "
        f"({', '.join(str(count) for count in counts.values())} rows), and neither would this one; "
        f"{remedy}"
    ]


def _check_stored_tables(model: PreTrainedModel, path: Path) -> list[str]:
    try:
        stored_tables(model, path)
    except ValueError as error:
        return [str(error)]
    return []


def _check_run_dir(config: AnyTrainConfig) -> list[str]:
    run_dir = config.run_place
    problem = check_place(run_dir, "run_dir")
    if problem is not None:
        return [problem]
    if not run_dir.exists() or (run_dir / IDENTITY_FILE).exists():
        return []
    if not run_dir.is_dir():
        return [f"run_dir: {run_dir} is a file; use a directory"]
    store_dir = Place.parse(config.data.store_dir, "data.store_dir")
    if all(_is_leftover(place, store_dir) for place in [*run_dir.files(), *run_dir.folders()]):
        return []
    return [
        f"run_dir: {run_dir} exists and is not the directory of a run (it has no {IDENTITY_FILE}); "
        "use another directory, or an empty one"
    ]


def _is_leftover(place: Place, store_dir: Place) -> bool:
    """Whether an earlier start of this run that ended before training may have left this file."""
    is_store = store_dir.is_below(place) or place.name.startswith(f"{store_dir.name}.partial-")
    return is_store or place.name.startswith(".")


def identify(config: AnyTrainConfig) -> dict[str, Any]:
    """Return the identity of a run: the settings that decide its result, and its inputs by hash.

    The token store's fingerprint is added once the store exists.
    """
    return {
        "config": identity(config),
        # All other `data` settings that affect the result are in the store's fingerprint.
        "data": {"sources": [{"weight": source.weight} for source in config.data.sources]},
        "model": fingerprint_model(Path(config.model.path)),
        "adapter": fingerprint_adapter(config),
        "tokenizer": tokenizer_sha256(Path(config.model.tokenizer_path)),
    }


def check_identity(place: Place, now: Mapping[str, Any], *, field: str = "run_dir") -> None:
    """Refuse to resume a run or sweep that was started with other settings or inputs.

    Args:
        place: directory of the run or sweep; a new directory passes.
        now: current identity from `identify`, or part of it.
        field: config field that names the directory.

    Raises:
        ConfigError: lists every field that differs.
    """
    file = place / IDENTITY_FILE
    if not file.exists():
        return
    then = file.read_json()
    changed = find_differences({key: then.get(key) for key in now}, now)
    if changed:
        raise ConfigError(
            [
                f"{field}: {place} was started with other settings or inputs (then -> now); "
                f"restore them, or use another {field}",
                *changed,
            ]
        )


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
