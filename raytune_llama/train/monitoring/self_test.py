"""Self-tests of a run on its own model before the first step; the run stops if one fails.

An attention kernel, a library version or a model class can each break these silently: the loss
still falls, on the wrong objective.
"""

import math

import torch

from raytune_llama.data.batches.step_batches import MicroBatch
from raytune_llama.model.config import Precision
from raytune_llama.model.llama import causal_lm
from raytune_llama.model.loss import IGNORE_INDEX
from raytune_llama.train.engines.protocol import TrainEngine, to_device
from raytune_llama.train.process_group import ProcessGroup

TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 5e-3}
"""Largest relative difference between two ways to compute a loss; rounding reaches a tenth."""

DOCUMENT_TOKENS = 12


def run_self_tests(
    engine: TrainEngine,
    precision: Precision,
    workers: ProcessGroup,
    isolate_documents: bool,  # noqa: FBT001  # a setting passed on
) -> None:
    """Test the loss and, if requested, the isolation of packed documents; collective.

    Raises:
        RuntimeError: a test failed; the message says which and by how much.
        FloatingPointError: the model's loss is not finite before the first step.
    """
    model = causal_lm(engine.module.model)
    rows = int(model.config.vocab_size)
    generator = torch.Generator().manual_seed(0)
    ids_3T = torch.randint(rows, (3, DOCUMENT_TOKENS), generator=generator)
    _test_loss(engine, ids_3T[0], precision, workers)
    if isolate_documents:
        _test_isolation(engine, ids_3T, precision)


def _test_loss(
    engine: TrainEngine, ids_T: torch.Tensor, precision: Precision, workers: ProcessGroup
) -> None:
    """Raise unless the chunked loss equals cross-entropy on the model's own logits."""
    batch = _packed(ids_T)
    ids, _, labels = to_device(batch, workers.device)
    module = engine.module
    module.eval()
    with torch.no_grad():
        wanted = module.loss_from_logits(ids, labels).item()
    module.train()
    if not math.isfinite(wanted):
        raise FloatingPointError(
            f"self-test: the model's own loss of {DOCUMENT_TOKENS} tokens is {wanted} before the "
            "first step: check the weights of model.path and of the adapter, or use "
            "engine.precision=bf16 or fp32"
        )
    got = engine.loss_sum(batch)
    if not math.isclose(got, wanted, rel_tol=TOLERANCE[precision]):
        raise RuntimeError(
            f"self-test: the chunked loss of {DOCUMENT_TOKENS} tokens is {got:.6f}, but "
            f"{wanted:.6f} from the model's own logits; this model does more than one projection "
            "between its last hidden state and its logits, which is not supported"
        )


def _test_isolation(engine: TrainEngine, ids_3T: torch.Tensor, precision: Precision) -> None:
    """Raise unless a document's loss is the same alone and packed after other documents."""
    first, other, second = ids_3T.unbind()
    # By row: a slot of a pack then computes alone, and not with what its neighbors do just now.
    (alone,) = engine.row_losses(_packed(second))
    (after_first,) = engine.row_losses(_packed(first, second))
    (after_other,) = engine.row_losses(_packed(other, second))
    # Masked attention weights are exactly zero: not one bit may depend on what they would weigh.
    if after_first != after_other:
        raise RuntimeError(
            f"self-test: packed documents attend to each other: a document's loss is "
            f"{after_first!r} after one document and {after_other!r} after another; this attention "
            "kernel does not isolate documents. Use model.attention=sdpa, or set "
            "batch.isolate_documents=false to train without isolation"
        )
    if not math.isclose(alone, after_first, rel_tol=TOLERANCE[precision]):
        raise RuntimeError(
            f"self-test: a document's loss is {alone:.6f} alone and {after_first:.6f} after "
            "another one that it does not attend to: position ids do not restart. Use "
            "model.attention=sdpa, or set batch.isolate_documents=false to train without "
            "isolation"
        )


def _packed(*documents: torch.Tensor) -> MicroBatch:
    """Pack documents into one sequence in which only the last one has targets."""
    ids_T = torch.cat(documents)
    labels_T = torch.full_like(ids_T, IGNORE_INDEX)
    last = len(documents[-1])
    labels_T[-last:-1] = documents[-1][1:]
    positions_T = torch.cat([torch.arange(len(document)) for document in documents])
    return MicroBatch(ids_T[None], labels_T[None], positions_T[None])
