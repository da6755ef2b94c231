"""The model in training through lm-evaluation-harness's interface: log-likelihoods of options.

    model = EngineLanguageModel(engine, workers, tokenizer, None, batch_tokens=4096)
    outcome = run_task(task, model)

Every worker runs the same tasks, and `score_pairs` divides the forward passes among the workers.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from transformers import PreTrainedTokenizerFast

from raytune_llama.chat.encoding import ChatEncoder
from raytune_llama.data.batches.packing import PackedSequence
from raytune_llama.data.batches.step_batches import stack_sequences
from raytune_llama.evaluate.encoded_model import EncodedLanguageModel, Pair
from raytune_llama.model.llama import causal_lm
from raytune_llama.model.rope import context_tokens
from raytune_llama.train.engines.protocol import TrainEngine
from raytune_llama.train.process_group import ProcessGroup

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_LENGTH_MULTIPLE = 8
_ONLY_OPTIONS = "a training run scores given options only"


class EngineLanguageModel(EncodedLanguageModel):
    """lm-eval's interface to the model that an engine trains."""

    def __init__(
        self,
        engine: TrainEngine,
        workers: ProcessGroup,
        tokenizer: PreTrainedTokenizerFast,
        chat: ChatEncoder | None,
        *,
        batch_tokens: int,
    ) -> None:
        """Wrap an engine.

        Args:
            engine: engine of the run.
            workers: all workers of the run.
            tokenizer: tokenizer of the run.
            chat: encoder of the run's conversations; None: there is none.
            batch_tokens: tokens per forward pass of a worker, exceeded only by a longer prompt.
        """
        max_length = context_tokens(causal_lm(engine.module.model).config)
        super().__init__(tokenizer, chat, name="the model in training", max_length=max_length)
        self._engine, self._workers = engine, workers
        self._batch_tokens = batch_tokens

    def loglikelihood(self, requests: "list[Instance]") -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood in nats; collective.

        Whether it is the greedy one is not computed: always false.
        """
        pairs = self.encode_pairs(requests)
        scores = score_pairs(self._engine, self._workers, pairs, batch_tokens=self._batch_tokens)
        return [(score, False) for score in scores]

    def loglikelihood_rolling(self, requests: "list[Instance]") -> list[float]:
        """Raise NotImplementedError: `eval.texts` evaluates texts."""
        raise NotImplementedError(_ONLY_OPTIONS)

    def generate_until(self, requests: "list[Instance]") -> list[str]:
        """Raise NotImplementedError: such tasks are refused before a run starts."""
        raise NotImplementedError(_ONLY_OPTIONS)


def score_pairs(
    engine: TrainEngine, workers: ProcessGroup, pairs: Sequence[Pair], *, batch_tokens: int
) -> list[float]:
    """Return the log-likelihood in nats of each continuation after its context; collective.

    Pairs of similar length share a forward pass, one pair a row. All workers run the same number of
    passes of the same shape, with filler rows where pairs are missing.

    Args:
        engine: engine of the run.
        workers: all workers of the run.
        pairs: contexts and continuations, the same on every worker.
        batch_tokens: tokens per forward pass of a worker, exceeded only by a single longer pair.
    """
    sizes = [len(context) + len(continuation) - 1 for context, continuation in pairs]
    order = sorted(range(len(pairs)), key=lambda number: -sizes[number])
    scores = [0.0] * len(pairs)
    start = 0
    while start < len(order):
        length = -(-sizes[order[start]] // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
        rows = max(1, batch_tokens // length)
        group = order[start : start + rows * workers.world_size]
        start += len(group)
        mine = group[workers.rank :: workers.world_size]
        batch = stack_sequences([_row_of(pairs[number]) for number in mine], rows, length)
        workers.progress.enter_phase("evaluating")
        losses = engine.row_losses(batch)
        for number, loss in zip(mine, losses, strict=False):  # filler rows come last
            scores[number] = -loss
    return workers.all_reduce_sum(scores) if scores else []


def _row_of(pair: Pair) -> PackedSequence:
    """Return a pair as a sequence in which only the continuation's tokens are targets."""
    context, continuation = pair
    ids = np.array([*context, *continuation], dtype=np.uint32)
    targets = np.arange(1, len(ids)) >= len(context)
    return PackedSequence(ids[:-1], ids[1:], targets=targets)
