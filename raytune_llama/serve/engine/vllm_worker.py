"""What is added to vLLM's worker, which holds the model in a process of its own."""

from typing import Any

import torch
from torch import Tensor

WORKER_EXTENSION = "raytune_llama.serve.engine.vllm_worker.VocabularyLimit"
"""Name under which vLLM imports `VocabularyLimit`."""


class VocabularyLimit:
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
