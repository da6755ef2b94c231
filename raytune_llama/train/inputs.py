"""What a run trains and evaluates on, from its config and its token store; needs no model."""

from collections.abc import Sequence

from raytune_llama.data.batches.evaluation import EvaluatedSource, choose_evaluated
from raytune_llama.data.batches.mixture import Source, cut_sources
from raytune_llama.data.batches.step_batches import BatchPlan
from raytune_llama.data.store.token_store import TokenStore
from raytune_llama.train.config import AnyTrainConfig


def plan_run(config: AnyTrainConfig, sources: Sequence[Source]) -> BatchPlan:
    """Return the order of the whole run over its sources, which depends on no worker."""
    weights = [source.weight for source in sources if source.weight is not None]
    return BatchPlan.of(
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


def build_sources(config: AnyTrainConfig, store: TokenStore) -> tuple[Source, ...]:
    """Return the sources that the run trains on, cut into sequences.

    Raises:
        ConfigError: the store has too little text, of any or of a weighted source.
    """
    return cut_sources(
        config.data.sources,
        store.split("train"),
        config.batch.form,
        config.batch.sequence_tokens,
        fingerprint=store.fingerprint,
        seed=config.seed,
    )


def build_evaluation(config: AnyTrainConfig, store: TokenStore) -> tuple[EvaluatedSource, ...]:
    """Return what is evaluated of each source with validation text.

    Raises:
        ConfigError: `eval.max_sequences` is less than one for each of them.
    """
    return choose_evaluated(
        config.data.every_source,
        store.split("validation"),
        config.batch.evaluation_form,
        config.batch.sequence_tokens,
        config.eval.max_sequences,
    )
