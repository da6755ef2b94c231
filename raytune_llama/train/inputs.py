"""The sources and batch plan of a run, from its config and token stores; needs no model."""

from collections.abc import Sequence
from dataclasses import replace

from raytune_llama.config.fields import fields_of
from raytune_llama.config.settings import ConfigError, from_dict, to_dict
from raytune_llama.data.batches.config import source_names
from raytune_llama.data.batches.evaluation import EvaluationSource, select_evaluation_sources
from raytune_llama.data.batches.mixture import TrainingSource, cut_sources
from raytune_llama.data.batches.step_batches import BatchPlan
from raytune_llama.data.config import DataConfig
from raytune_llama.data.store.config import StoreConfig
from raytune_llama.data.store.token_store import TokenStore, open_store
from raytune_llama.storage.place import Place
from raytune_llama.train.config import AnyTrainConfig, SftConfig
from raytune_llama.train.schedule import count_warmup_steps, learning_rate_factor

MIN_STEPS = 10
"""Number of optimizer steps below which a run is likely not what was meant."""


def build_batch_plan(config: AnyTrainConfig, sources: Sequence[TrainingSource]) -> BatchPlan:
    """Return the order of the run's sequences; independent of the number of workers."""
    weights = [source.weight for source in sources if source.weight is not None]
    if config.max_steps == 0:
        # Evaluation needs no order: that of one step without weights, of which none is taken.
        return replace(_create_plan(config, sources, None, max_steps=1), total_positions=0)
    return _create_plan(config, sources, weights or None, max_steps=config.max_steps)


def _create_plan(
    config: AnyTrainConfig,
    sources: Sequence[TrainingSource],
    weights: Sequence[float] | None,
    *,
    max_steps: int | None,
) -> BatchPlan:
    return BatchPlan.create(
        [source.sequences.num_sequences for source in sources],
        sequence_tokens=config.batch.sequence_tokens,
        sequences_per_step=config.batch.sequences_per_step,
        micro_batch_sequences=config.batch.micro_batch_sequences,
        seed=config.seed,
        weights=weights,
        max_steps=max_steps,
        num_epochs=config.num_epochs,
        is_padded=config.batch.form == "padded",
    )


def build_sources(config: AnyTrainConfig, store: TokenStore) -> tuple[TrainingSource, ...]:
    """Return the sources that the run trains on, cut into sequences.

    Raises:
        ConfigError: the store has too little text, in total or of a weighted source.
    """
    return cut_sources(
        config.data.sources,
        store.split("train"),
        config.batch.form,
        config.batch.sequence_tokens,
        fingerprint=store.fingerprint,
        seed=config.seed,
    )


def build_evaluation_sources(
    config: AnyTrainConfig, store: TokenStore
) -> tuple[EvaluationSource, ...]:
    """Return the evaluation sequences of each source with validation text.

    Raises:
        ConfigError: `eval.max_sequences` is less than the number of these sources.
    """
    return select_evaluation_sources(
        config.data.all_sources,
        store.split("validation"),
        config.batch.evaluation_form,
        config.batch.sequence_tokens,
        config.eval.max_sequences,
    )


def text_store_config(config: AnyTrainConfig) -> DataConfig | None:
    """Return the settings of the token store of `eval.texts`, or None without texts.

    Documents begin and end as those that the run trains on or, for conversations, as in the
    default store of text; they are not cleaned.
    """
    if not config.eval.texts:
        return None
    place = Place.parse(config.data.store_dir, "data.store_dir")
    shared = {"bos", "eos", *fields_of(StoreConfig)}
    data = {name: value for name, value in to_dict(config.data).items() if name in shared}
    own = {
        "sources": [to_dict(text) for text in config.eval.texts],
        "store_dir": config.eval.store_dir or str(place.with_name(f"{place.name}-texts")),
        "validation_fraction": 0.0,
    }
    return from_dict(DataConfig, data | own)


def open_text_store(config: AnyTrainConfig) -> TokenStore | None:
    """Open the existing token store of `eval.texts`; None without texts.

    Raises:
        StoreError: there is no token store, or it is damaged.
        OSError: the store cannot be reached.
    """
    store_config = text_store_config(config)
    return None if store_config is None else open_store(store_config)


def build_text_sources(
    config: AnyTrainConfig, store: TokenStore | None
) -> tuple[EvaluationSource, ...]:
    """Return the evaluation sequences of each of `eval.texts`.

    Args:
        config: config of the run.
        store: token store of the texts; None: there are none.

    Raises:
        ConfigError: a text has nothing to evaluate, or `eval.max_sequences` is less than the number
            of texts.
    """
    if store is None:
        return ()
    form = config.batch.evaluation_form
    found = select_evaluation_sources(
        config.eval.texts,
        store.split("train"),
        "isolated" if form == "fitted" else form,
        config.batch.sequence_tokens,
        config.eval.max_sequences,
    )
    evaluated = {source.name for source in found}
    problems = [
        f"eval.texts.{number}: {text.path} has less than two tokens, so nothing of it can be "
        "evaluated; remove it"
        for number, (name, text) in enumerate(
            zip(source_names(config.eval.texts), config.eval.texts, strict=True)
        )
        if name not in evaluated
    ]
    if problems:
        raise ConfigError(problems)
    return found


def check_evaluated(config: AnyTrainConfig) -> list[str]:
    """Return which fields need an evaluation, for a run that has no validation text."""
    names = ["data.validation_fraction"]
    names += ["data.validation"] if isinstance(config, SftConfig) else []
    needing = {
        "eval.patience": config.eval.patience is not None,
        "checkpoint.result": config.checkpoint.result == "best",
        "max_steps": config.max_steps == 0 and not (config.eval.texts or config.eval.tasks),
    }
    values = {
        "eval.patience": config.eval.patience,
        "checkpoint.result": config.checkpoint.result,
        "max_steps": "0, which only evaluates",
    }
    return [
        f"{field}: got {values[field]}, but nothing is evaluated, since the store has no "
        f"validation split; set {' or '.join(names)}, or change the field"
        for field, is_set in needing.items()
        if is_set
    ]


def find_horizon_warnings(
    config: AnyTrainConfig, num_steps: int, num_sequences: int | None
) -> list[str]:
    """Return what is likely not meant about how long a run is; each begins with a field to change.

    Args:
        config: config of the run.
        num_steps: optimizer steps of the full run.
        num_sequences: training sequences per epoch; None: unknown without a token store.
    """
    end = min(config.stop_step or num_steps, num_steps)
    if end == 0:
        return []
    per_step = config.batch.sequences_per_step
    found: list[str] = []
    if num_sequences is not None and num_sequences < per_step:
        effect = f"each step reads every sequence {per_step / num_sequences:.3g} times"
        if config.num_epochs:
            effect = f"num_epochs={config.num_epochs:g} makes only {_steps(num_steps)}"
        found.append(
            f"batch.sequences_per_step: got {per_step}, but an epoch has only {num_sequences} "
            f"sequences, so that {effect}; set it to {num_sequences} or less"
        )
    if end < MIN_STEPS:
        field = "stop_step" if end < num_steps else "max_steps"
        field = "num_epochs" if config.num_epochs and field == "max_steps" else field
        found.append(
            f"{field}: the run takes only {_steps(end)} of {per_step} sequences, too few for "
            "warm-up and AdamW's averages to mean anything; raise it, or lower "
            "batch.sequences_per_step"
        )
    return found + _warmup_warnings(config, num_steps, end) + _patience_warnings(config, end)


def _warmup_warnings(config: AnyTrainConfig, num_steps: int, end: int) -> list[str]:
    num_warmup = count_warmup_steps(num_steps, config.schedule)
    # A warm-up of one step is at the peak already.
    if num_warmup < max(end, 2):
        return []
    share = learning_rate_factor(end - 1, num_steps, config.schedule)
    return [
        f"schedule.warmup_ratio: got {config.schedule.warmup_ratio:g}, a warm-up of {num_warmup} "
        f"steps, but the run ends after {end}: the learning rate never leaves the warm-up, and "
        f"its last step has {share:.0%} of optim.learning_rate; lower it, or take more steps"
    ]


def _patience_warnings(config: AnyTrainConfig, end: int) -> list[str]:
    every, patience = config.eval.every_steps, config.eval.patience
    if every is None or patience is None or every * patience < end:
        return []
    return [
        f"eval.patience: got {patience} evaluations, one every {every} steps (eval.every_steps), "
        f"but the run ends after {_steps(end)}: it cannot stop early; lower one of them"
    ]


def _steps(number: int) -> str:
    return f"{number} step{'' if number == 1 else 's'}"
