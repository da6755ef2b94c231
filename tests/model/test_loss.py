"""Promise: the loss in chunks is cross-entropy, at a fraction of its memory."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from raytune_llama.model import loss
from raytune_llama.model.loss import IGNORE_INDEX, summed_cross_entropy


def reference(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, factor: float = 1.0
) -> list[Tensor]:
    """Return PyTorch's loss and both gradients, computed in float64 from the same values."""
    hidden = hidden_ND.detach().double().requires_grad_()
    weight = weight_VD.detach().double().requires_grad_()
    total = torch.nn.functional.cross_entropy(
        hidden @ weight.T, labels_N, ignore_index=IGNORE_INDEX, reduction="sum"
    )
    return [total.detach(), *torch.autograd.grad(total * factor, [hidden, weight])]


def ours(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, factor: float = 1.0
) -> list[Tensor]:
    hidden = hidden_ND.detach().clone().requires_grad_()
    weight = weight_VD.detach().clone().requires_grad_()
    total = summed_cross_entropy(hidden, weight, labels_N)
    assert total.dtype == torch.float32
    return [total.detach(), *torch.autograd.grad(total * factor, [hidden, weight])]


def draw(
    num: int, width: int, rows: int, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, rows and labels, of which about a third are no targets."""
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(num, width, generator=generator).to(dtype)
    weight_VD = torch.randn(rows, width, generator=generator).to(dtype)
    labels_N = torch.randint(rows, (num,), generator=generator)
    labels_N[torch.rand(num, generator=generator) < 0.3] = IGNORE_INDEX
    return hidden_ND, weight_VD, labels_N


@pytest.fixture
def three_rows_a_chunk(monkeypatch: pytest.MonkeyPatch) -> int:
    """Let a chunk hold three positions of 40 rows; return the rows."""
    monkeypatch.setattr(loss, "CHUNK_BYTES", 3 * 4 * 40)
    return 40


@settings(max_examples=60)
@given(
    num=st.integers(1, 17),
    width=st.integers(1, 6),
    rows=st.integers(1, 30),
    chunk_bytes=st.integers(1, 2000),
    factor=st.floats(-4, 4),
    seed=st.integers(0, 2**16),
)
def test_loss_random_shapes_and_chunks_equal_cross_entropy(
    *, num: int, width: int, rows: int, chunk_bytes: int, factor: float, seed: int
) -> None:
    inputs = draw(num, width, rows, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "CHUNK_BYTES", chunk_bytes)
        found = ours(*inputs, factor)
    for got, wanted in zip(found, reference(*inputs, factor), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


def test_loss_float32_in_many_chunks_equals_cross_entropy_tightly(three_rows_a_chunk: int) -> None:
    inputs = draw(100, 16, three_rows_a_chunk)
    for got, wanted in zip(ours(*inputs), reference(*inputs), strict=True):
        assert (got - wanted).norm() <= 3e-7 * wanted.norm()


# A half-precision logit is off by up to half a unit in its last place, which bounds everything.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 1.5e-3)])
def test_loss_half_precision_in_many_chunks_stays_within_rounding(
    three_rows_a_chunk: int, dtype: torch.dtype, tolerance: float
) -> None:
    inputs = draw(300, 16, three_rows_a_chunk, dtype=dtype)
    found = ours(*inputs)
    assert [tensor.dtype for tensor in found] == [torch.float32, dtype, dtype]
    for got, wanted in zip(found, reference(*inputs), strict=True):
        assert (got.double() - wanted).norm() <= tolerance * wanted.norm()


def test_loss_half_precision_sums_many_chunks_without_losing_the_late_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """600 equal chunks: a sum held in bfloat16 would stand still after 256 of them."""
    monkeypatch.setattr(loss, "CHUNK_BYTES", 1)
    hidden_ND = torch.ones(600, 1, dtype=torch.bfloat16)
    weight_VD = torch.zeros(2, 1, dtype=torch.bfloat16)
    labels_N = torch.zeros(600, dtype=torch.long)
    total, _, grad_weight = ours(hidden_ND, weight_VD, labels_N)
    assert total.item() == pytest.approx(600 * math.log(2), rel=1e-5)
    assert grad_weight.flatten().tolist() == pytest.approx([-300, 300], rel=4e-3)


@pytest.mark.parametrize("num", [0, 5])
def test_loss_without_targets_is_zero_and_so_are_its_gradients(num: int) -> None:
    hidden_ND, weight_VD, _ = draw(num, 4, 9)
    found = ours(hidden_ND, weight_VD, torch.full((num,), IGNORE_INDEX))
    assert [tensor.shape for tensor in found] == [(), (num, 4), (9, 4)]
    assert all(torch.equal(tensor, torch.zeros_like(tensor)) for tensor in found)


def test_loss_of_one_target_gives_no_gradient_to_other_positions() -> None:
    hidden_ND, weight_VD, labels_N = draw(6, 4, 9)
    labels_N[:] = IGNORE_INDEX
    labels_N[3] = 2
    total, grad_hidden, _ = ours(hidden_ND, weight_VD, labels_N)
    wanted = -torch.log_softmax(weight_VD @ hidden_ND[3], dim=0)[2]
    assert total.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert grad_hidden.any(dim=1).tolist() == [False, False, False, True, False, False]


def test_loss_of_large_logits_stays_finite() -> None:
    hidden_ND = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight_VD = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    total = summed_cross_entropy(hidden_ND, weight_VD, torch.tensor([0, 0]))
    total.backward()
    assert total.item() == pytest.approx(2e4)
    assert hidden_ND.grad is not None
    assert hidden_ND.grad.flatten().tolist() == [0.0, -2.0]


@pytest.mark.parametrize("wants", ["hidden", "weight"])
def test_loss_of_one_trained_side_gives_that_side_its_gradient_only(
    three_rows_a_chunk: int, wants: str
) -> None:
    hidden_ND, weight_VD, labels_N = draw(20, 4, three_rows_a_chunk)
    _, *both = reference(hidden_ND, weight_VD, labels_N)
    trained, other, wanted = (
        (hidden_ND, weight_VD, both[0]) if wants == "hidden" else (weight_VD, hidden_ND, both[1])
    )
    trained.requires_grad_()
    summed_cross_entropy(hidden_ND, weight_VD, labels_N).backward()
    assert other.grad is None
    assert trained.grad is not None
    torch.testing.assert_close(trained.grad.double(), wanted, rtol=1e-5, atol=1e-5)


def test_loss_without_gradients_needs_none() -> None:
    hidden_ND, weight_VD, labels_N = draw(7, 4, 9)
    total = summed_cross_entropy(hidden_ND, weight_VD, labels_N)
    assert not total.requires_grad
    assert total.item() == pytest.approx(reference(hidden_ND, weight_VD, labels_N)[0].item())


def test_loss_in_half_precision_scaled_and_divided_keeps_small_gradients() -> None:
    """A loss scaler's factor over many targets: a mean taken first would round them to zero."""
    num, factor = 2**16, 65536 / 2**16
    hidden_ND = torch.zeros(num, 1, dtype=torch.float16)
    # Logits are 0: each position's gradient is (1/2 - 1) * 2**-12, times 1 of `factor`.
    weight_VD = torch.tensor([[2.0**-12], [0.0]], dtype=torch.float16)
    labels_N = torch.zeros(num, dtype=torch.long)
    _, grad_hidden, _ = ours(hidden_ND, weight_VD, labels_N, factor)
    assert torch.equal(grad_hidden, torch.full_like(grad_hidden, -(2.0**-13)))
    mean_first = grad_hidden / num
    assert not mean_first.any()


class LargestResult(TorchDispatchMode):
    """Keeps the size of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple | list) else (results,):
            if isinstance(result, Tensor):
                size = result.untyped_storage().nbytes()
                self.num_bytes = max(self.num_bytes, size)
        return results


def test_loss_of_a_large_batch_never_holds_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk_bytes = 64 * 1000
    monkeypatch.setattr(loss, "CHUNK_BYTES", chunk_bytes)
    hidden_ND, weight_VD, labels_N = draw(2000, 4, 1000)
    hidden_ND.requires_grad_()
    weight_VD.requires_grad_()
    with LargestResult() as largest:
        summed_cross_entropy(hidden_ND, weight_VD, labels_N).backward()
    # The logits of the batch are 8,000,000 bytes; inputs and their gradients 32,000 at most.
    assert 0 < largest.num_bytes <= chunk_bytes
