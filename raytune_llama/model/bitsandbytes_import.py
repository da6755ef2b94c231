"""Whether bitsandbytes is imported; imports neither PEFT nor transformers itself."""

import sys

from raytune_llama.model.config import Quantization


def hide_bitsandbytes_unless(quantization: Quantization | None) -> None:
    """Keep PEFT from importing bitsandbytes, unless a quantized base needs it.

    PEFT, transformers and accelerate import it wherever it is installed: 0.9 of the 4.3 s that
    `import peft` takes, and a line about missing kernels on every start.

    Args:
        quantization: Of the base; None: nothing in this process is quantized.
    """
    if quantization is None and "bitsandbytes" not in sys.modules:
        sys.modules["bitsandbytes"] = None  # pyright: ignore[reportArgumentType]  # as documented
