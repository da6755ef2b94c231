"""Checks of the config and its input files before Ray starts anything; all problems at once."""

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedModel

from raytune_llama.chat.templates.choice import build_template
from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import ConfigError, override
from raytune_llama.data.build.preparation import DataInputs, open_data
from raytune_llama.data.store.manifest import read_revisions
from raytune_llama.evaluate.tasks.task import EvaluationTask
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
from raytune_llama.storage.directories import fetched, pin_directory, pin_source
from raytune_llama.storage.hashes import find_hash, show_hash
from raytune_llama.storage.hub import find_hub_paths, may_be_on_hub
from raytune_llama.storage.place import Place, check_place, is_url, local_path
from raytune_llama.tokenizer.loader import load_tokenizer
from raytune_llama.train.config import (
    DORA_PARTITIONED,
    AnyTrainConfig,
    PretrainConfig,
    SftConfig,
)
from raytune_llama.train.control_rows import find_untrained_control_rows
from raytune_llama.train.engines.config import strategies_with
from raytune_llama.train.fetched_inputs import input_directories
from raytune_llama.train.identity import IDENTITY_FILE, RUN_CONFIG_FILE
from raytune_llama.train.inputs import check_evaluated, text_store_config
from raytune_llama.train.monitoring.trackers.session import find_problems
from raytune_llama.train.tasks import open_tasks
from raytune_llama.train.texts import open_texts
from raytune_llama.train.untrained_rows import (
    check_embedding_rate,
    check_untrained_rows,
    modules_to_save,
)

logger = logging.getLogger(__name__)

C = TypeVar("C", bound=AnyTrainConfig)
T = TypeVar("T")

_ON_ANY_STORAGE = {"run_dir", "data.store_dir", "eval.store_dir"}
_SOURCES = ("data.sources.", "data.validation.", "eval.texts.", "eval.tasks.")
_WRITTEN = {
    "run_dir": "a path that every node mounts, such as run_dir=/shared/{}",
    "data.store_dir": "a path that every node mounts, such as data.store_dir=/shared/{}",
    "data.cache_dir": "one on each node's own disk, such as data.cache_dir=/local/{}",
    "eval.store_dir": "a path that every node mounts, such as eval.store_dir=/shared/{}",
}


def resolve_places(config: C, *, in_job: bool, recorded_in: Place | None = None) -> C:
    """Make every path of a config absolute, and those on the hub those of one commit.

    A resumed run keeps the commits that its `run.yaml` or its token store recorded.

    Args:
        config: config as the user wrote it.
        in_job: whether this is the driver of a submitted job, whose directory is temporary.
        recorded_in: directory of another run whose commits to keep too, such as a sweep's first.

    Raises:
        ConfigError: a field does not accept this kind of path, or an output path is relative in a
            submitted job.
    """
    problems: list[str] = []
    resolved: dict[str, str] = {}
    recorded: list[str] | None = None
    directories = input_directories(config)
    for field, text in _named_paths(config).items():
        if text is None:
            continue
        try:
            if field in directories or field.startswith(_SOURCES):
                if recorded is None and may_be_on_hub(text):
                    recorded = _find_recorded(config, recorded_in)
                pin = pin_directory if field in directories else pin_source
                resolved[field] = pin(text, field, recorded or [])
            elif field in _ON_ANY_STORAGE:
                resolved[field] = str(Place.parse(text, field))
            else:
                resolved[field] = str(local_path(text, field))
        except ValueError as error:
            problems.append(str(error))
            continue
        is_relative = not is_url(text) and not Path(text).expanduser().is_absolute()
        if in_job and is_relative and field in _WRITTEN:
            problems.append(
                f"{field}: {text!r} is relative, and a submitted job's directory is deleted when "
                f"it ends; use {_WRITTEN[field].format(text)}"
            )
    if problems:
        raise ConfigError(problems)
    return override(config, resolved)


def _find_recorded(config: AnyTrainConfig, other: Place | None) -> list[str]:
    """Return the pinned paths on the hub of a run's earlier start, and of its token stores."""
    found: list[str] = []
    with contextlib.suppress(ValueError, OSError):  # reported with the other paths
        for run_dir in (config.run_place, *(() if other is None else (other,))):
            file = run_dir / RUN_CONFIG_FILE
            text = file.read_bytes().decode(errors="replace") if file.exists() else ""
            found += find_hub_paths(text)
    for field, text in (
        ("data.store_dir", config.data.store_dir),
        ("eval.store_dir", config.eval.store_dir),
    ):
        with contextlib.suppress(ValueError, OSError):
            found += [] if text is None else read_revisions(Place.parse(text, field))
    return found


def _named_paths(config: AnyTrainConfig) -> dict[str, str | None]:
    """Return the paths of a config by their field; None: not set."""
    fields = {
        "run_dir": config.run_dir,
        "data.store_dir": config.data.store_dir,
        "data.cache_dir": config.data.cache_dir,
        **input_directories(config),
    }
    for number, source in enumerate(config.data.sources):
        fields[f"data.sources.{number}.path"] = source.path
    for number, source in enumerate(config.data.validation):
        fields[f"data.validation.{number}.path"] = source.path
    fields["eval.store_dir"] = config.eval.store_dir
    for number, text in enumerate(config.eval.texts):
        fields[f"eval.texts.{number}.path"] = text.path
    for number, task in enumerate(config.eval.tasks):
        for name in ("path", "shots_path", "include"):
            fields[f"eval.tasks.{number}.{name}"] = getattr(task, name)
    return fields


@dataclass(frozen=True)
class Inputs:
    """Opened inputs of a run; opened once per start and shared by all later checks."""

    data: DataInputs
    """Tokenizer and corpus of the run."""

    texts: DataInputs | None
    """Tokenizer and corpus of `eval.texts`; None without texts."""

    tasks: tuple[EvaluationTask, ...]
    """Tasks of `eval.tasks`, with their questions."""

    skeleton: PreTrainedModel
    """Model without weights, on PyTorch's meta device."""

    vocabulary: VocabularyFit
    """The tokenizer against the model's embedding rows."""

    warnings: tuple[str, ...]
    """What keeps no run from starting but is likely not meant; each begins with its field."""


def open_inputs(config: AnyTrainConfig, opened: Inputs | None = None) -> Inputs:
    """Open the files that a config with absolute paths names, and check the config against them.

    Warnings are logged once: not for a plan, which shows them, nor if `opened` is given.

    Args:
        config: config of the run.
        opened: inputs of another run on the same stores, whose tokenizer and files are not opened
            again; None: all are opened.

    Raises:
        ConfigError: lists every problem found.
    """
    is_logged = opened is None and not config.plan
    skeleton, fit, problems = _open_model(config)
    problems += _check_adapter(config) + _check_template(config)
    if opened is not None:
        data, texts, tasks = opened.data, opened.texts, opened.tasks
    else:
        tokenizer = fetched(config.model.tokenizer_path)
        data = _collect(lambda: open_data(config.encoded_data, tokenizer), problems)
        texts = _collect(lambda: open_texts(config), problems)
        tasks = _collect(lambda: open_tasks(config), problems)
    if not config.data.validation_fraction and not config.data.validation:
        problems += check_evaluated(config)
    problems += _check_run_dir(config)
    problems += [] if config.plan else find_problems(config.logging, config.run_place)
    if problems or data is None or tasks is None or skeleton is None or fit is None:
        # The vocabulary and the data checks report the same tokenizer problem.
        raise ConfigError(list(dict.fromkeys(problems)))
    warnings = find_untrained_control_rows(config, skeleton, data.tokenizer, fit)
    for warning in warnings if is_logged else ():
        logger.warning("%s", warning)
    return Inputs(data, texts, tasks, skeleton, fit, tuple(warnings))


def _collect(open_one: Callable[[], T], problems: list[str]) -> T | None:
    """Open some of the inputs; add the problems to the others and return None if it fails."""
    try:
        return open_one()
    except ConfigError as error:
        problems += error.problems
    except UserError as error:  # such as a package that is not installed
        problems.append(str(error))
    return None


def _open_model(
    config: AnyTrainConfig,
) -> tuple[PreTrainedModel | None, VocabularyFit | None, list[str]]:
    """Open the model without weights and compare its tokenizer; also return the problems."""
    path = fetched(config.model.path)
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
        fit = check_vocabulary(
            num_embedding_rows(model), path, fetched(config.model.tokenizer_path)
        )
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
    paths = (config.model.path, config.adapter)
    found = find_chat_template([fetched(path) for path in paths if path])
    if found is None:
        return []
    directory, chat = found
    try:
        tokenizer = load_tokenizer(fetched(config.model.tokenizer_path))
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
        adapter = Adapter.open(fetched(config.adapter), field="adapter")
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
    trained = read_model_settings(fetched(config.adapter))
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
        if has_weights(fetched(config.model.path)):  # a plan works without weights
            problems += _check_stored_tables(model, fetched(config.model.path))
    if not problems and config.adapter is not None and not _check_adapter(config):
        adapter = Adapter.open(fetched(config.adapter), field="adapter")
        problems = check_adapter_tokenizer(adapter.path, fetched(config.model.tokenizer_path))
        base = fetched(config.model.path)
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
    stores = [Place.parse(config.data.store_dir, "data.store_dir")]
    texts = text_store_config(config)
    stores += [] if texts is None else [Place.parse(texts.store_dir, "eval.store_dir")]
    found = [*run_dir.files(), *run_dir.folders()]
    if all(any(_is_leftover(place, store) for store in stores) for place in found):
        return []
    return [
        f"run_dir: {run_dir} exists and is not the directory of a run (it has no {IDENTITY_FILE}); "
        "use another directory, or an empty one"
    ]


def _is_leftover(place: Place, store_dir: Place) -> bool:
    """Whether an earlier start of this run that ended before training may have left this file."""
    is_store = store_dir.is_below(place) or place.name.startswith(f"{store_dir.name}.partial-")
    return is_store or place.name.startswith(".")
