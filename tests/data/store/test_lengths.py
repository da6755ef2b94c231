"""The lengths of a store's documents say what is in it, what was cut and what was left out."""

from raytune_llama.data.store.lengths import LengthTable, is_length_event
from raytune_llama.data.store.manifest import (
    STORE_FORMAT_VERSION,
    Manifest,
    RowCounts,
    Shard,
    SplitManifest,
    fingerprint_of,
)


def manifest(lengths: list[int], events: dict[str, int]) -> Manifest:
    shard = Shard(
        name="train-0",
        source=0,
        hash="blake3:00",
        file_bytes=1,
        documents=sum(lengths),
        tokens=400,
        text_bytes=1,
        targets=100,
    )
    return Manifest(
        format_version=STORE_FORMAT_VERSION,
        fingerprint=fingerprint_of({}),
        inputs={},
        token_dtype="uint16",  # noqa: S106 - a type's name
        splits={
            "train": SplitManifest.from_shards([shard]),
            "validation": SplitManifest.from_shards([]),
        },
        rows=RowCounts(events=events),
        quarantine=None,
        lengths=lengths,
    )


EVENTS = {
    "alias: answer": 7,
    "answers_without_prompt": 1,
    "cut from 16 to 31 tokens": 2,
    "cut from 64 to 127 tokens": 1,
    "cut_tokens": 90,
    "left out with 32 to 63 tokens": 4,
    "truncated": 3,
}


def test_length_table_of_a_manifest_has_a_bin_for_every_length_up_to_the_longest() -> None:
    table = LengthTable.from_manifest(manifest([0, 0, 5, 11], EVENTS))
    assert [(row.label, row.documents, row.cut, row.left_out) for row in table.bins] == [
        ("4 to 7", 5, 0, 0),
        ("8 to 15", 11, 0, 0),
        ("16 to 31", 0, 2, 0),
        ("32 to 63", 0, 0, 4),
        ("64 to 127", 0, 1, 0),
    ]
    assert dict(table.facts()) == {
        "learned": "25.0% of 400 tokens: 100",
        "cut": "3 of 20 (15.0%): 90 tokens lost; 1 answers are learned without their question",
        "left out": "4 of 20 (20.0%): too long, or no answer is left to train on",
    }
    assert [name for name in EVENTS if not is_length_event(name)] == ["alias: answer"]


def test_length_table_counts_documents_from_a_length_as_exactly_as_its_bins_allow() -> None:
    table = LengthTable.from_manifest(manifest([0, 0, 6, 3, 1], {}))
    assert [table.count_from(length) for length in (1, 4, 8, 9, 16, 32)] == [
        (10, 10),
        (10, 10),
        (4, 4),
        (1, 4),
        (1, 1),
        (0, 0),
    ]
    assert table.describe_limit(8) == "40.0%"
    assert table.describe_limit(9) == "10.0% to 40.0%"


def test_length_table_filled_one_by_one_equals_that_of_the_manifest() -> None:
    table = LengthTable()
    for _ in range(2):
        table.add(8, num_targets=3, num_cut=10)
    table.add(8, num_targets=3, num_cut=70, lost_prompt=True)
    for _ in range(8):
        table.add(8, num_targets=3)
    for _ in range(5):
        table.add(4, num_targets=2)
    for _ in range(4):
        table.add_left_out(40)
    stored = LengthTable.from_manifest(manifest([0, 0, 5, 11], EVENTS))
    assert table.bins == stored.bins
    assert table.num_cut_tokens == stored.num_cut_tokens
    assert table.num_without_prompt == stored.num_without_prompt
    assert (table.num_tokens, table.num_targets) == (11 * 8 + 5 * 4, 11 * 3 + 5 * 2)


def test_length_table_of_nothing_has_no_bins() -> None:
    assert LengthTable().bins == []
    assert LengthTable().describe_limit(8) == "-"
