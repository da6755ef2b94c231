"""What is added to vLLM's worker, which holds the model in a process of its own."""

from typing import Any

import torch
from torch import Tensor

WORKER_EXTENSION = "raytune_llama.serve.engine.vllm_worker.WorkerExtension"
"""Name under which vLLM imports `WorkerExtension`."""


class WorkerExtension:
    """Base class that vLLM adds to its worker (`worker_extension_cls`)."""

    model_runner: Any
    """The worker's own, which holds the model."""

    def limit_vocabulary(self, num_tokens: int) -> None:
        """Never generate rows beyond the vocabulary, nor count them in log-probabilities.

        vLLM's `allowed_token_ids` would send the whole vocabulary with each request, and leave
        those rows in the log-probabilities.

        Args:
            num_tokens: vocabulary size of the tokenizer.
        """
        model = self.model_runner.get_model()
        compute = model.compute_logits

        def limited(*args: Any, **kwargs: Any) -> Tensor | None:  # noqa: ANN401  # vLLM's
            logits_NV = compute(*args, **kwargs)
            # Workers that do not sample get none.
            if logits_NV is not None:
                logits_NV[..., num_tokens:] = -torch.inf
            return logits_NV

        model.compute_logits = limited

    def add_empty_adapter(self) -> None:
        """Add an adapter of zeros at the end, for rows without an adapter on CPUs.

        vLLM 0.29 marks such rows in a mixed batch by the index -1, and its operations for CPUs
        (`lora/ops/torch_ops`) read that as the last adapter: the base would answer with it. A
        known bug: https://github.com/vllm-project/vllm/pull/48421.
        """
        for layer in self.model_runner.get_model().modules():
            # Embedding tables keep a view of theirs; no adapter that changes them is attached.
            if hasattr(layer, "lora_a_stacked_2d"):
                continue
            for name in ("lora_a_stacked", "lora_b_stacked"):
                stacked = getattr(layer, name, None)
                if isinstance(stacked, tuple):
                    setattr(layer, name, tuple(_with_zeros(one) for one in stacked))
                elif isinstance(stacked, Tensor):
                    setattr(layer, name, _with_zeros(stacked))


def _with_zeros(stacked: Tensor) -> Tensor:
    return torch.cat([stacked, torch.zeros_like(stacked[:1])])
