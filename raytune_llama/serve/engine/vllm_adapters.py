"""LoRA adapters as files that vLLM reads, and may read again after it has dropped them.

They are written from the factors, with their scale in B: vLLM ignores PEFT's patterns of ranks and
alphas, and the adapter's own directory may be replaced while it is in use.
"""

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from safetensors.torch import save_file

from raytune_llama.serve.engine.lora import LoraLayerWeights
from raytune_llama.storage.files import write_json_atomic

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes as its maximum rank."""


def round_up_rank(rank: int) -> int:
    """Return the smallest maximum rank of vLLM's that allows a rank of at most 512."""
    return next(one for one in _RANKS if one >= rank)


class AdapterFiles:
    """A directory with an adapter, deleted with this object."""

    def __init__(self, updates: Mapping[str, LoraLayerWeights]) -> None:
        """Write the directory.

        Args:
            updates: LoRA factors by the name of the model's linear layer.
        """
        self.path: Final = Path(tempfile.mkdtemp(prefix="raytune-adapter-"))
        """The directory."""

        self.delete: Final = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        """Deletes it now."""

        tensors = {}
        for layer, update in updates.items():
            tensors[f"base_model.model.{layer}.lora_A.weight"] = update.a_RI.contiguous()
            tensors[f"base_model.model.{layer}.lora_B.weight"] = update.b_RO.T.contiguous()
        save_file(tensors, self.path / "adapter_model.safetensors")
        rank = max(len(update.a_RI) for update in updates.values())
        settings = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": rank,
            "target_modules": sorted({layer.rpartition(".")[2] for layer in updates}),
        }
        write_json_atomic(self.path / "adapter_config.json", settings)
