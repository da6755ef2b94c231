"""The sources and batch plan of a run, from its config and token store; needs no model."""

from collections.abc import Sequence

from raytune_llama.data.batches.evaluation import EvaluationSource, select_evaluation_sources
from raytune_llama.data.batches.mixture import TrainingSource, cut_sources
from raytune_llama.data.batches.step_batches import BatchPlan
from raytune_llama.data.store.token_store import TokenStore
from raytune_llama.train.config import AnyTrainConfig


def build_batch_plan(config: AnyTrainConfig, sources: Sequence[TrainingSource]) -> BatchPlan:
    """Return the order of the run's sequences; independent of the number of workers."""
    weights = [source.weight for source in sources if source.weight is not None]
    return BatchPlan.create(
        [source.sequences.num_sequences for source in sources],
        sequence_tokens=config.batch.sequence_tokens,
        sequences_per_step=config.batch.sequences_per_step,
        micro_batch_sequences=config.batch.micro_batch_sequences,
        seed=config.seed,
        weights=weights or None,
        max_steps=config.max_steps,
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
