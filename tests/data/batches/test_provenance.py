"""Promise: of every sequence it is known which documents it holds, and where they come from."""

from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_llama.data.batches.best_fit import cut_sequences
from raytune_llama.data.batches.config import SequenceForm
from raytune_llama.data.batches.mixture import TrainingSource
from raytune_llama.data.batches.order import SampleIndex
from raytune_llama.data.batches.packing import find_source_spans
from raytune_llama.data.batches.provenance import Provenance
from raytune_llama.data.batches.step_batches import BatchPlan
from raytune_llama.data.store.manifest import (
    STORE_FORMAT_VERSION,
    Manifest,
    RowCounts,
    fingerprint_of,
)
from raytune_llama.data.store.token_store import TokenStore
from tests.data.conftest import MakeSplit

T = 8
LENGTHS = st.lists(
    st.lists(st.lists(st.integers(1, T), min_size=1, max_size=6), min_size=1, max_size=3),
    min_size=1,
    max_size=3,
)


@pytest.mark.parametrize("form", ["isolated", "joined", "crops", "seed_blocks", "fitted", "padded"])
@settings(max_examples=25)
@given(lengths=LENGTHS)
def test_documents_are_those_whose_tokens_a_sequence_reads(
    make_split: MakeSplit, form: SequenceForm, lengths: list[list[list[int]]]
) -> None:
    # All tokens of a document are its number.
    numbers = count()
    sources = [[[[next(numbers)] * n for n in file] for file in source] for source in lengths]
    split = make_split(*sources)
    for stretch in find_source_spans(split).values():
        sequences = cut_sequences(stretch, form, T, fingerprint="f", seed=1)
        for index in range(sequences.num_sequences):
            sample = SampleIndex(0, index, 0)
            sequence = sequences.read(sample)
            read = {*sequence.ids.tolist(), *sequence.labels.tolist()}
            assert sorted(sequences.documents(sample)) == sorted(read)


def test_origins_of_a_step_lead_to_files_and_places_in_them(make_split: MakeSplit) -> None:
    first = [[[1] * 4, [2] * 4, [3] * 4], [[4] * 4]]
    split = make_split(first, [[[5] * 4, [6] * 4]])
    inputs = {"sources": [{"name": name} for name in ("a.txt", "b.txt", "c.txt")]}
    manifest = Manifest(
        format_version=STORE_FORMAT_VERSION,
        fingerprint=fingerprint_of(inputs),
        inputs=inputs,
        token_dtype="uint16",  # noqa: S106 - a type's name
        splits={"train": split.manifest},
        rows=RowCounts(),
        quarantine=None,
        lengths=[],
    )
    store = TokenStore(split.place, manifest)
    sources = [
        TrainingSource(name, None, cut_sequences(stretch, "padded", T, fingerprint="f", seed=1))
        for name, stretch in zip(("one", "two"), find_source_spans(split).values(), strict=True)
    ]
    plan = BatchPlan.create(
        [source.sequences.num_sequences for source in sources],
        sequence_tokens=T,
        sequences_per_step=3,
        micro_batch_sequences=1,
        seed=1,
        num_epochs=2,
    )
    origins = Provenance(store, split, sources, plan)
    samples = [sample for step in range(plan.num_steps) for sample in origins.of_step(step)]
    assert [sample["position"] for sample in samples] == list(range(12))
    assert [sample["epoch"] for sample in samples] == [0] * 6 + [1] * 6
    wanted = {
        ("one", 0, "a.txt", 0),
        ("one", 1, "a.txt", 1),
        ("one", 2, "a.txt", 2),
        ("one", 3, "b.txt", 0),
        ("two", 4, "c.txt", 0),
        ("two", 5, "c.txt", 1),
    }
    for epoch in (samples[:6], samples[6:]):
        found = {
            (sample["source"], document["number"], document["file"], document["offset"])
            for sample in epoch
            for document in sample["documents"]
        }
        assert found == wanted
