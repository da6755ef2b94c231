"""Compare the embedding rows of two model directories, the second one with more of them.

python compare_rows.py MODEL GROWN_MODEL
"""

import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open

TABLE = "model.embed_tokens.weight"


def read_table(model_dir: Path) -> np.ndarray:
    """Return the embedding table of a model of one file, one row per token."""
    with safe_open(model_dir / "model.safetensors", framework="numpy") as tensors:
        return tensors.get_tensor(TABLE)


def main() -> None:
    """Print how many old rows are equal and how many are new; status 1 if an old one differs."""
    old_VD, grown_VD = (read_table(Path(argument)) for argument in sys.argv[1:3])
    equal = (grown_VD[: len(old_VD)].view(np.uint32) == old_VD.view(np.uint32)).all(axis=1)
    print(f"{equal.sum():,} of {len(old_VD):,} old rows are equal, bit for bit")
    print(f"{len(grown_VD) - len(old_VD):,} rows are new")
    sys.exit(0 if equal.all() else 1)


if __name__ == "__main__":
    main()
