"""Checks of the config and its input files before Ray starts anything; all problems at once."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedModel

from raytune_llama.chat.templates.choice import build_template
from raytune_llama.config.settings import ConfigError, override
from raytune_llama.data.build.preparation import DataInputs, open_data
from raytune_llama.model.adapter import Adapter
from raytune_llama.model.adapter_lineage import check_chain
from raytune_llama.model.directory import stored_tables
from raytune_llama.model.embeddings import check_embeddings
from raytune_llama.model.lineage import (
    TEMPLATE_KEY,
    check_adapter_tokenizer,
    find_chat_template,
)
from raytune_llama.model.llama import (
    build_empty_model,
    check_document_isolation,
    check_model_directory,
    check_model_settings,
    check_not_quantized,
    check_output_projection,
    decoder_layers,
    has_weights,
)
from raytune_llama.model.lora import check_adapter_targets, check_trainable
from raytune_llama.model.quantization import check_quantization
from raytune_llama.model.rope import (
    build_rope_settings,
    check_context,
    check_rope_scaling,
    read_model_settings,
)
from raytune_llama.model.vocab import VocabularyFit, check_vocabulary, num_embedding_rows
from raytune_llama.storage.hashes import find_hash, show_hash
from raytune_llama.storage.place import Place, check_place, local_path
from raytune_llama.tokenizer.loader import load_tokenizer
from raytune_llama.train.config import (
    DORA_PARTITIONED,
    AnyTrainConfig,
    PretrainConfig,
    SftConfig,
)
from raytune_llama.train.control_rows import find_untrained_control_rows
from raytune_llama.train.engines.config import strategies_with
from raytune_llama.train.identity import IDENTITY_FILE
from raytune_llama.train.inputs import check_evaluated
from raytune_llama.train.untrained_rows import (
    check_embedding_rate,
    check_untrained_rows,
    modules_to_save,
)

logger = logging.getLogger(__name__)

C = TypeVar("C", bound=AnyTrainConfig)

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

    warnings: tuple[str, ...]
    """What keeps no run from starting but is likely not meant; each begins with its field."""


def open_inputs(config: AnyTrainConfig, data: DataInputs | None = None) -> Inputs:
    """Open the files that a config with absolute paths names, and check the config against them.

    Warnings are logged once: not for a plan, which shows them, nor if `data` is given.

    Args:
        config: config of the run.
        data: tokenizer and corpus, if another run on the same store has already opened them.

    Raises:
        ConfigError: lists every problem found.
    """
    is_logged = data is None and not config.plan
    skeleton, fit, problems = _open_model(config)
    problems += _check_adapter(config) + _check_template(config)
    try:
        data = data or open_data(config.encoded_data, Path(config.model.tokenizer_path))
    except ConfigError as error:
        problems += error.problems
    if not config.data.validation_fraction and not config.data.validation:
        problems += check_evaluated(config)
    problems += _check_run_dir(config)
    if problems or data is None or skeleton is None or fit is None:
        # The vocabulary and the data checks report the same tokenizer problem.
        raise ConfigError(list(dict.fromkeys(problems)))
    warnings = find_untrained_control_rows(config, skeleton, data.tokenizer, fit)
    for warning in warnings if is_logged else ():
        logger.warning("%s", warning)
    return Inputs(data, skeleton, fit, tuple(warnings))


def _open_model(
    config: AnyTrainConfig,
) -> tuple[PreTrainedModel | None, VocabularyFit | None, list[str]]:
    """Open the model without weights and compare its tokenizer; also return the problems."""
    path = Path(config.model.path)
    try:
        # A plan needs no weights, but weights that exist must be complete.
        no_weights_needed = config.plan and not has_weights(path)
        problems = (check_model_settings if no_weights_needed else check_model_directory)(path)
        problems = problems or check_not_quantized(path, "model.path")
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
    wanted = find_hash(chat, TEMPLATE_KEY)
    found = template.hash(like=wanted)
    if wanted is None or found == wanted:
        return []
    return [
        f"data.chat.template: got {template.name}, but {directory} was tuned with "
        f"{chat['template']} ({show_hash(wanted)}, this one {show_hash(found)}); "
        "use that one, or set allow_other_template=true"
    ]


def _check_adapter(config: AnyTrainConfig) -> list[str]:
    if config.adapter is None:
        return []
    try:
        adapter = Adapter.open(Path(config.adapter), field="adapter")
    except (ValueError, OSError) as error:
        return str(error).split("\n")
    is_dora = adapter.settings.get("use_dora")
    return [DORA_PARTITIONED] if is_dora and config.engine.layout == "ZeRO 3" else []


def _check_positions(config: AnyTrainConfig, model: PreTrainedModel) -> list[str]:
    """Check RoPE scaling, that an adapter to continue was trained with it, and the context."""
    scaling = config.model.rope_scaling
    field, longest = _longest_text(config)
    if scaling is not None:
        problems = check_rope_scaling(model.config, scaling, longest, field=field)
        if problems:
            return problems
    too_long = check_context(model.config, scaling, longest, field=field, adapter=config.adapter)
    if config.adapter is None or _check_adapter(config):
        return too_long
    trained = read_model_settings(Path(config.adapter))
    wanted = build_rope_settings(model.config, scaling)
    if trained == wanted:
        return too_long
    return [
        f"model.rope_scaling: the adapter {config.adapter} was trained with "
        f"{trained or 'the RoPE settings of its base'}, but the run would use "
        f"{wanted or 'the RoPE settings of its base'}; set it as the adapter was trained"
    ]


def _longest_text(config: AnyTrainConfig) -> tuple[str, int]:
    """Return the most positions that training reaches, and the field that limits them.

    Positions restart at each conversation, so that a packed sequence may hold more tokens.
    """
    if isinstance(config, SftConfig) and config.data.chat.max_tokens is not None:
        return "data.chat.max_tokens", config.data.chat.max_tokens
    return "batch.sequence_tokens", config.batch.sequence_tokens


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
    problems = check_untrained_rows(config, model, fit)
    problems += check_embedding_rate(config, model)
    if isinstance(config, PretrainConfig) and config.train == "embeddings":
        problems += check_embeddings(model, config.embeddings, fit.new_ids)
        if has_weights(Path(config.model.path)):  # a plan works without weights
            problems += _check_stored_tables(model, Path(config.model.path))
    if not problems and config.adapter is not None and not _check_adapter(config):
        adapter = Adapter.open(Path(config.adapter), field="adapter")
        problems = check_adapter_tokenizer(adapter.path, Path(config.model.tokenizer_path))
        base = Path(config.model.path)
        if has_weights(base):  # a plan works without weights
            problems += check_chain(base, [adapter], base_field="model.path", field="adapter")
        return problems or check_trainable(model, adapter, num_rows=fit.num_ids)
    return problems


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
