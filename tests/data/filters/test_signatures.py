"""Promise: signatures are the same on any machine, and near ones are found as the formula says."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_llama.config.settings import ConfigError, from_dict
from raytune_llama.data.filters.config import DuplicatesConfig, NearDuplicatesConfig
from raytune_llama.data.filters.signatures import (
    compute_signatures,
    read_batch_layout,
    signature_file,
    write_signatures,
)
from raytune_llama.data.filters.words import BATCH_CHARACTERS
from raytune_llama.storage.place import Place

BOTH = DuplicatesConfig(exact=True, near=NearDuplicatesConfig(bands=3, rows=2))

# Of three texts; they may change only together with the version of signatures.
HASHES = [
    "8dd52148a1bb9b9f73389051bdb15b2e",
    "197cb10a33e92c0d8cf2279ca79d2e25",
    "658e5562f447b921eda4e842905d00a4",
]
BANDS = [
    [13201382240108561737, 12351161518307096535, 2137875861579921816],
    [3647793219895574924, 11451536544765135596, 6400867201978812231],
    [11467667151262591640, 4677288952987703841, 7326489536250767538],
]


def bands_of(texts: list[str], near: NearDuplicatesConfig) -> list[list[int]]:
    return compute_signatures(texts, DuplicatesConfig(near=near)).column("bands").to_pylist()


def test_signatures_of_known_texts_never_change() -> None:
    batch = compute_signatures(["人民日报一九九八年", "The quick brown fox jumps over", "!?"], BOTH)
    assert [value.hex() for value in batch.column("hash").to_pylist()] == HASHES
    assert batch.column("bands").to_pylist() == BANDS


def test_signatures_columns_are_what_is_looked_for() -> None:
    assert compute_signatures(["a"], DuplicatesConfig(exact=True)).schema.names == ["hash"]
    assert compute_signatures(
        ["a"], DuplicatesConfig(near=NearDuplicatesConfig())
    ).schema.names == ["bands"]
    assert compute_signatures([], BOTH).num_rows == 0


@given(st.lists(st.text(st.sampled_from("aB 1,.人民日报\ud800"), max_size=20), max_size=8))
def test_signatures_of_a_text_do_not_depend_on_its_neighbours(texts: list[str]) -> None:
    alone = [compute_signatures([text], BOTH).to_pylist()[0] for text in texts]
    assert compute_signatures(texts, BOTH).to_pylist() == alone


def test_signatures_near_see_words_only() -> None:
    near = NearDuplicatesConfig(shingle_words=2)
    first, *others = bands_of(
        ["Ab, 人民", "ab人 民!", "ab 民人", "ab", "AB?", "...", "..", "...", ""], near
    )
    assert others[0] == first != others[1]
    assert others[2] == others[3]
    # Without words there is nothing to compare but the whole.
    assert others[4] == others[6]
    assert len({tuple(bands) for bands in (others[4], others[5], others[7])}) == 3


def test_signatures_near_of_a_long_text_see_all_of_it() -> None:
    near = NearDuplicatesConfig(shingle_words=1, bands=4, rows=1)
    once = "人民日报" * (BATCH_CHARACTERS // 4)
    assert bands_of([once + once, once + "新" * 9], near) == bands_of(
        ["人民日报", "人民日报新"], near
    )


@pytest.mark.parametrize(
    "near", [NearDuplicatesConfig(shingle_words=1, bands=b, rows=r) for b, r in [(14, 8), (20, 5)]]
)
def test_found_share_is_the_share_that_is_found(near: NearDuplicatesConfig) -> None:
    """Pairs of documents of 60 different words, of which a known part is shared."""
    generator = np.random.default_rng(0)
    num_pairs = 1500
    for num_shared in (40, 46, 50, 54):
        texts: list[str] = []
        for _ in range(num_pairs):
            words = "".join(
                map(chr, generator.choice(20_000, 120 - num_shared, replace=False) + 0x4E00)
            )
            texts += [words[:60], words[-60:]]
        bands = np.array(bands_of(texts, near))
        found = (bands[::2] == bands[1::2]).any(axis=1).mean()
        expected = near.detection_probability(num_shared / (120 - num_shared))
        # Four standard deviations of a fair draw: each of 8 comparisons fails once in 16,000.
        margin = 4 * np.sqrt(max(expected * (1 - expected), 1 / num_pairs) / num_pairs)
        assert abs(found - expected) < margin, (num_shared, found, expected)


def test_other_seed_draws_other_functions() -> None:
    assert bands_of(["人民"], NearDuplicatesConfig()) != bands_of(
        ["人民"], NearDuplicatesConfig(seed=1)
    )


@given(st.lists(st.integers(0, 7), max_size=6), st.integers(1, 5))
def test_write_signatures_rows_are_in_order_whatever_the_batches(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], batch_documents: int
) -> None:
    folder = Place.local(tmp_path_factory.mktemp("signatures"))
    texts = [f"document {number}" for number in range(sum(lengths))]
    left = iter(texts)
    batches = ([next(left) for _ in range(length)] for length in lengths)
    assert write_signatures(folder, 7, batches, BOTH, batch_documents=batch_documents) == len(texts)
    file = signature_file(folder, 7)
    with file.open() as source:
        reader = pa.ipc.open_file(source)
        rows = [reader.get_batch(number) for number in range(reader.num_record_batches)]
    assert [row for batch in rows for row in batch.to_pylist()] == compute_signatures(
        texts, BOTH
    ).to_pylist()
    assert {batch.num_rows for batch in rows[:-1]} <= {batch_documents}
    assert all(0 < batch.num_rows <= batch_documents for batch in rows)
    assert read_batch_layout(file, BOTH) == (len(rows), batch_documents)


def test_write_signatures_interrupted_leaves_no_file(tmp_path: Path) -> None:
    def batches() -> Iterator[list[str]]:
        yield ["a"]
        raise InterruptedError

    with pytest.raises(InterruptedError):
        write_signatures(Place.local(tmp_path), 0, batches(), BOTH)
    assert not list(tmp_path.iterdir())


def test_inputs_are_what_is_on() -> None:
    assert DuplicatesConfig().fingerprint_inputs == {}
    assert DuplicatesConfig(exact=True).fingerprint_inputs == {"version": 1, "exact": True}
    near = DuplicatesConfig(near=NearDuplicatesConfig(rows=5)).fingerprint_inputs
    assert near["near"] == {"shingle_words": 5, "bands": 14, "rows": 5, "seed": 0}
    assert "exact" not in near


def test_config_out_of_bounds_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(DuplicatesConfig, {"near": {"bands": 0, "rows": 100, "seed": -1}})
    assert [line.split(":")[0] for line in caught.value.problems] == [
        "near.bands",
        "near.rows",
        "near.seed",
    ]
