"""Promise: the sample at a position is a pure function, and weights are met exactly."""

from collections import Counter
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_llama.data.batches.config import (
    MAX_BLOCK_SEQUENCES,
    apportion,
    block_quotas,
    block_sequences,
)
from raytune_llama.data.batches.order import (
    EpochOrder,
    MixedOrder,
    Order,
    permuted_index,
    permuted_indices,
)

KNOWN_EPOCHS = [1, 3, 5, 4, 2, 9, 8, 0, 11, 7, 6, 10, 5, 2]
KNOWN_MIXTURE = [
    (1, 0, 0),
    (1, 1, 0),
    (1, 2, 0),
    (1, 1, 1),
    (1, 2, 1),
    (1, 0, 1),
    (0, 2, 0),
    (1, 2, 2),
    (0, 8, 0),
    (1, 0, 2),
    (0, 1, 0),
    (0, 0, 0),
    (1, 1, 2),
    (1, 2, 3),
]

COUNTS = st.lists(st.integers(1, 30), min_size=1, max_size=5)


@given(num_items=st.integers(1, 700), key=st.integers(0, 2**64 - 1))
def test_permutation_any_size_is_a_bijection(num_items: int, key: int) -> None:
    images = {permuted_index(position, num_items, key) for position in range(num_items)}
    assert images == set(range(num_items))


@given(position=st.integers(0, 10**12 - 1), key=st.integers(0, 2**64 - 1))
def test_permutation_huge_range_stays_inside(position: int, key: int) -> None:
    assert 0 <= permuted_index(position, 10**12, key) < 10**12


@pytest.mark.parametrize("num_items", [2, 3, 10, 17])
def test_permutation_over_keys_puts_every_item_first_equally_often(num_items: int) -> None:
    num_keys = 1000
    firsts = Counter(permuted_index(0, num_items, key) for key in range(num_keys))
    expected = num_keys / num_items
    # Six standard deviations of a binomial count.
    allowed = 6 * (expected * (1 - 1 / num_items)) ** 0.5
    assert all(abs(firsts[item] - expected) < allowed for item in range(num_items))


def test_permutation_neighbours_are_not_kept_together() -> None:
    images = [permuted_index(position, 1000, 1) for position in range(1000)]
    near = sum(abs(left - right) <= 5 for left, right in pairwise(images))
    # By chance about 10 of 999 pairs are that near.
    assert near < 30


def test_permuted_index_outside_the_range_is_refused() -> None:
    with pytest.raises(IndexError, match="position 3 of 3"):
        permuted_index(3, 3, 0)


@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8), total=st.integers(0, 20_000))
def test_apportion_gives_all_and_each_less_than_one_from_its_share(
    weights: list[float], total: int
) -> None:
    counts = apportion(weights, total)
    assert sum(counts) == total
    for weight, count in zip(weights, counts, strict=True):
        assert abs(count - total * weight / sum(weights)) < 1


@pytest.mark.parametrize(
    ("weights", "total", "counts"),
    [
        ([0.7, 0.2, 0.1], 10_000, [7000, 2000, 1000]),
        ([1, 1, 1], 10, [4, 3, 3]),
        ([6, 3, 1], 7, [4, 2, 1]),
    ],
)
def test_apportion_known_weights_give_known_counts(
    weights: list[float], total: int, counts: list[int]
) -> None:
    assert apportion(weights, total) == counts


@given(total=st.integers(1, 10**9))
def test_blocks_are_equal_and_the_last_is_almost_full(total: int) -> None:
    length = block_sequences(total)
    num_blocks = -(-total // length)
    assert 1 <= length <= min(total, MAX_BLOCK_SEQUENCES)
    assert num_blocks * length - total < num_blocks
    assert total <= MAX_BLOCK_SEQUENCES or length > MAX_BLOCK_SEQUENCES // 2


@given(counts=COUNTS, seed=st.integers(0, 99), num_epochs=st.integers(1, 3))
def test_epoch_order_each_epoch_has_each_sequence_once(
    counts: list[int], seed: int, num_epochs: int
) -> None:
    order = EpochOrder(tuple(counts))
    everything = {(s, index) for s, count in enumerate(counts) for index in range(count)}
    for epoch in range(num_epochs):
        samples = [
            order.sample(epoch * sum(counts) + place, "f", seed) for place in range(sum(counts))
        ]
        assert {(sample.source, sample.index) for sample in samples} == everything
        assert {sample.epoch for sample in samples} == {epoch}


@given(counts=COUNTS, data=st.data(), seed=st.integers(0, 99), num_blocks=st.integers(1, 4))
def test_mixed_order_blocks_have_exact_quotas_and_sources_whole_epochs(
    counts: list[int], data: st.DataObject, seed: int, num_blocks: int
) -> None:
    quotas = data.draw(st.tuples(*[st.integers(1, 20)] * len(counts)))
    order = MixedOrder(tuple(counts), quotas)
    seen: list[list[tuple[int, int]]] = [[] for _ in counts]
    for block in range(num_blocks):
        start = block * sum(quotas)
        samples = [order.sample(start + place, "f", seed) for place in range(sum(quotas))]
        assert Counter(sample.source for sample in samples) == Counter(dict(enumerate(quotas)))
        for sample in samples:
            seen[sample.source].append((sample.epoch, sample.index))
    for samples, count in zip(seen, counts, strict=True):
        # A source begins its next epoch when it has seen all of the one before.
        assert [epoch for epoch, _ in samples] == [turn // count for turn in range(len(samples))]
        assert len(set(samples)) == len(samples)


@given(num_items=st.integers(1, 700), key=st.integers(0, 2**64 - 1))
def test_permuted_indices_are_those_of_each_position(num_items: int, key: int) -> None:
    one_by_one = [permuted_index(position, num_items, key) for position in range(num_items)]
    assert permuted_indices(num_items, key).tolist() == one_by_one


def test_mixed_order_any_stretch_has_about_the_asked_shares() -> None:
    weights = (0.7, 0.2, 0.1)
    order = MixedOrder((5000, 40, 100_000), block_quotas(weights, 30_000))
    assert order.shares == weights
    sources = [order.sample(position, "f", 1).source for position in range(30_000)]
    for start in range(0, 30_000, 500):
        counts = Counter(sources[start : start + 500])
        for source, weight in enumerate(weights):
            # Six standard deviations of a binomial count.
            allowed = 6 * (500 * weight * (1 - weight)) ** 0.5
            assert abs(counts[source] - 500 * weight) < allowed


ORDERS = [EpochOrder((9, 3)), MixedOrder((9, 3), (4, 8))]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("change", ["seed", "fingerprint", "later"])
def test_order_at_other_key_is_another_one(order: Order, change: str) -> None:
    def samples(fingerprint: str = "f", seed: int = 7, start: int = 0) -> list[tuple[int, int]]:
        found = [order.sample(start + place, fingerprint, seed) for place in range(12)]
        return [(sample.source, sample.index) for sample in found]

    changes = {"seed": {"seed": 8}, "fingerprint": {"fingerprint": "g"}, "later": {"start": 36}}
    assert samples() == samples()
    assert samples() != samples(**changes[change])


@pytest.mark.parametrize("order", ORDERS)
def test_order_far_position_costs_no_more(order: Order) -> None:
    sample = order.sample(10**15, "f", 1)
    assert 0 <= sample.index < order.source_sequences[sample.source]


def test_order_known_samples_never_change() -> None:
    # A resumed run continues an order that an older version of this code began.
    starts = list(accumulate((9, 3), initial=0))
    epochs = [ORDERS[0].sample(position, "f", 7) for position in range(14)]
    assert [starts[sample.source] + sample.index for sample in epochs] == KNOWN_EPOCHS
    mixed = [ORDERS[1].sample(position, "f", 7) for position in range(14)]
    assert [(s.source, s.index, s.epoch) for s in mixed] == KNOWN_MIXTURE
