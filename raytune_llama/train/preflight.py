"""Everything that can be known to be wrong before Ray is asked for anything, all at once."""

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
    """Make every path of a config absolute, from the current folder.

    Args:
        config: as the user wrote it.
        in_job: whether this is the driver of a submitted job, whose folder is temporary.

    Raises:
        ConfigError: a path is not of the kind that its field takes, or is written to and
            relative in a job.
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
                f"{field}: {text!r} is relative, and a submitted job's folder is deleted after it; "
                f"name {_WRITTEN[field].format(text)}"
            )
    if problems:
        raise ConfigError(problems)
    return override(config, resolved)


@dataclass(frozen=True)
class Inputs:
    """What a run reads, opened once per start; every later step takes it from here."""

    data: DataInputs
    """Tokenizer and corpus."""

    skeleton: PreTrainedModel
    """The model without weights, on PyTorch's meta device."""


def open_inputs(config: AnyTrainConfig, data: DataInputs | None = None) -> Inputs:
    """Look at the files that a config with absolute paths names, once, and check it against them.

    Args:
        config: of the run.
        data: tokenizer and corpus, where another run on the same store has opened them.

    Raises:
        ConfigError: with every problem found.
    """
    skeleton, problems = _open_model(config)
    problems += _check_adapter(config) + _check_template(config)
    try:
        data = data or open_data(config.encoded_data, Path(config.model.tokenizer_path))
    except ConfigError as error:
        problems += error.problems
    problems += _check_run_dir(config)
    if problems or data is None or skeleton is None:
        # The vocabulary and the data both need the tokenizer, and say so alike.
        raise ConfigError(list(dict.fromkeys(problems)))
    return Inputs(data, skeleton)


def _open_model(config: AnyTrainConfig) -> tuple[PreTrainedModel | None, list[str]]:
    path = Path(config.model.path)
    try:
        # A plan needs no weights; those that are there have to be whole.
        no_weights_needed = config.plan and not has_weights(path)
        problems = (check_model_settings if no_weights_needed else check_model_directory)(path)
        if problems:
            return None, problems
        model = build_empty_model(path)
    except (ValueError, OSError) as error:
        return None, [f"model.path: {path} is no causal LM that can be read: {error}"]
    return model, _check_model(config, model)


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
            f"engine.strategy: got {config.engine.strategy}, but {type(model).__name__} keeps its "
            f"layers in no list, so they cannot be sharded one by one; set engine.strategy={others}"
        )
    if config.model.quantization is not None:
        keep = modules_to_save(config)
        problems += check_quantization(model, config.model.quantization, keep)
    return problems + _check_vocabulary(config, model)


def _check_template(config: AnyTrainConfig) -> list[str]:
    """Refuse to tune with another template than the model was tuned with, unless told."""
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
        return []  # which the check of the data tells
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
    """Check the scaling of positions, and that an adapter to go on from was trained with it."""
    scaling = config.model.rope_scaling
    if scaling is not None:
        problems = check_rope_scaling(model.config, scaling, config.batch.sequence_tokens)
        if problems:
            return problems
    if config.adapter is None or _check_adapter(config):
        return []
    had = read_model_settings(Path(config.adapter))
    has = build_rope_settings(model.config, scaling)
    if had == has:
        return []
    return [
        f"model.rope_scaling: the adapter {config.adapter} was trained with "
        f"{had or 'the positions of its base'}, and the run would have "
        f"{has or 'the positions of its base'}; set it as it was"
    ]


def _check_vocabulary(config: AnyTrainConfig, model: PreTrainedModel) -> list[str]:
    try:
        fit = check_vocabulary(
            num_embedding_rows(model), Path(config.model.path), Path(config.model.tokenizer_path)
        )
    except (ValueError, OSError) as error:
        return [str(error)]
    if fit.num_unused_rows:
        logger.info(
            "the model has %d rows for the tokenizer's %d ids: %d surplus rows are kept",
            fit.num_rows,
            fit.num_ids,
            fit.num_unused_rows,
        )
    problems = _check_untrained_rows(config, model, fit)
    problems += check_embedding_rate(config, model)
    if isinstance(config, PretrainConfig) and config.train == "embeddings":
        problems += check_embeddings(model, config.embeddings, fit.new_ids)
        if has_weights(Path(config.model.path)):  # a plan needs none
            problems += _check_stored_tables(model, Path(config.model.path))
    if not problems and config.adapter is not None and not _check_adapter(config):
        adapter = Path(config.adapter)
        problems = check_adapter_tokenizer(adapter, Path(config.model.tokenizer_path))
        return problems or check_adapter_fits(model, adapter, num_ids=fit.num_ids)
    return problems


def _check_untrained_rows(
    config: AnyTrainConfig, model: PreTrainedModel, fit: VocabularyFit
) -> list[str]:
    """Refuse rows that no stage would have trained; an embedding stage leaves some to the next."""
    counts = count_untrained_rows(config, model, fit.num_new_ids)
    if not counts:
        return []
    tables = " and ".join(counts)
    if config.train == "embeddings":
        logger.warning(
            "%s stays frozen, with %s rows of new ids as they started: the next stage has to train "
            "it (lora.modules_to_save), or set embeddings.lm_head here",
            tables,
            " and ".join(str(count) for count in counts.values()),
        )
    if config.train == "embeddings" or config.model.allow_untrained_rows:
        return []
    remedy = f"add {', '.join(counts)} to lora.modules_to_save, or set model.allow_untrained_rows"
    if fit.num_new_ids:
        return [
            f"model.tokenizer: it has {fit.num_new_ids} ids that the model was not trained with, "
            f"and {tables} would keep their new rows as initialised; {remedy}"
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
        return [f"run_dir: {run_dir} is a file; name a folder"]
    store_dir = Place.parse(config.data.store_dir, "data.store_dir")
    if all(_is_ours(place, store_dir) for place in [*run_dir.files(), *run_dir.folders()]):
        return []
    return [
        f"run_dir: {run_dir} exists and is not the directory of a run (it has no {IDENTITY_FILE}); "
        "name another one, or an empty folder"
    ]


def _is_ours(place: Place, store_dir: Place) -> bool:
    """Whether an earlier start of the run that came to no training may have left this behind."""
    is_store = store_dir.is_below(place) or place.name.startswith(f"{store_dir.name}.partial-")
    return is_store or place.name.startswith(".")


def identify(config: AnyTrainConfig) -> dict[str, Any]:
    """Return what makes this run this run: settings that decide the result, and inputs by hash.

    The token store's fingerprint is added once the store is there.
    """
    return {
        "config": identity(config),
        # All else that decides the result in the group `data` is in the store's fingerprint.
        "data": {"sources": [{"weight": source.weight} for source in config.data.sources]},
        "model": fingerprint_model(Path(config.model.path)),
        "adapter": fingerprint_adapter(config),
        "tokenizer": tokenizer_sha256(Path(config.model.tokenizer_path)),
    }


def check_identity(place: Place, now: Mapping[str, Any], *, field: str = "run_dir") -> None:
    """Refuse to go on with what was started with other settings or inputs.

    Args:
        place: the directory; nothing is checked where it is new.
        now: what `identify` returned, or a part of it.
        field: names the directory.

    Raises:
        ConfigError: with every field that differs.
    """
    file = place / IDENTITY_FILE
    if not file.exists():
        return
    then = file.read_json()
    changed = find_differences({key: then.get(key) for key in now}, now)
    if changed:
        raise ConfigError(
            [
                f"{field}: {place} was started with other settings or inputs (then -> now); set "
                f"them back, or name another {field}",
                *changed,
            ]
        )


def write_identity(config: AnyTrainConfig, now: Mapping[str, Any]) -> None:
    """Write `run.yaml` and `identity.json` before the first step; log what may change and did."""
    before = config.run_place / RUN_CONFIG_FILE
    if before.exists():
        for change in placement_changes(config, before):
            logger.info("changed since the run's last start: %s", change)
    # First what makes the folder that of a run: a start that is killed in between can be repeated.
    (config.run_place / IDENTITY_FILE).write_json(now)
    before.write_bytes(to_yaml(config).encode())


def placement_changes(config: AnyTrainConfig, before: Place) -> list[str]:
    """Return the fields that differ from an earlier `run.yaml` of the run."""
    data, problems = parse_mapping(before.read_bytes().decode(errors="replace"), str(before))
    if data is not None and not problems:
        try:
            return find_differences(to_dict(from_dict(type(config), data)), to_dict(config))
        except ConfigError as error:
            problems = error.problems
    return [f"{before} can't be read ({'; '.join(problems)}); it is written anew"]
