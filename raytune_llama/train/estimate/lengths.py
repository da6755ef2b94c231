"""Lengths of a run's documents against its sequences, from its token store or a sample of the text.

    table = measure_lengths(inputs.data, store)
    for line in render_lengths(config, table): print(line)

A run can lose text only by length, so the plan shows what does not fit before anything is built.
"""

from collections.abc import Iterator

from raytune_llama.data.build.preparation import DataInputs
from raytune_llama.data.build.sample import sample_lengths
from raytune_llama.data.store.lengths import LengthTable
from raytune_llama.data.store.token_store import TokenStore
from raytune_llama.train.config import AnyTrainConfig, SftConfig

_LONGER = {
    "isolated": "longer ones are split, nothing is lost",
    "joined": "longer ones are split, nothing is lost",
    "crops": "of longer ones, a step sees a part",
    "seed_blocks": "documents are joined and cut, remainders are dropped",
}


def measure_lengths(data: DataInputs, store: TokenStore | None) -> LengthTable:
    """Return the lengths that an existing store records, or those of a sample of the sources."""
    if store is not None:
        return LengthTable.from_manifest(store.manifest)
    return sample_lengths(data.corpus, data.tokenizer)


def render_lengths(config: AnyTrainConfig, table: LengthTable) -> Iterator[str]:
    """Yield a table of lengths as lines for a terminal, at most 100 columns wide."""
    is_chat, limit = isinstance(config, SftConfig), config.batch.sequence_tokens
    what = "conversations" if is_chat else "documents"
    where = "in a sample of the sources" if table.is_sample else "in the token store"
    yield f"{'lengths':<13}{table.num_documents:,} {what} {where}"
    if not table.bins:
        return
    if isinstance(config, SftConfig):
        field = "data.chat.max_tokens"
        if config.data.chat.max_tokens is None:
            field = "batch.sequence_tokens"
        most = config.encoded_data.chat.max_tokens
        yield f"{'  limit':<13}{most:,} tokens, {field}; truncation: {config.data.chat.truncation}"
        for name, fact in table.facts():
            yield f"{'  ' + name:<13}{fact}"
    else:
        share = table.describe_limit(limit)
        longer = f"{share} have {limit:,} tokens (batch.sequence_tokens) or more"
        yield f"{'  limit':<13}{longer}; {_LONGER[config.batch.form]}"
    head = f"{'tokens':<24}{'kept' if is_chat else what:>14}{'share':>9}"
    yield f"  {head}{'cut from':>12}{'left out':>12}" if is_chat else f"  {head}"
    for row in table.bins:
        share = f"{row.documents / max(1, table.num_documents):.1%}"
        line = f"  {row.label:<24}{row.documents:>14,}{share:>9}"
        yield f"{line}{row.cut:>12,}{row.left_out:>12,}" if is_chat else line
