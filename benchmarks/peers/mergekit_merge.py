"""Merge by mergekit: `mergekit_merge.py BASE ADAPTER TARGET DTYPE CACHE`."""

import json
import sys
from pathlib import Path

from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions


def main() -> None:
    """Merge one model with one adapter; print the peak memory of the process."""
    base, adapter, target, dtype, cache = sys.argv[1:]
    recipe = {
        "merge_method": "passthrough",
        "models": [{"model": f"{base}+{adapter}"}],
        "dtype": dtype,
    }
    options = MergeOptions(lora_merge_cache=cache, lora_merge_dtype=dtype, copy_tokenizer=False)
    run_merge(MergeConfiguration.model_validate(recipe), target, options)
    status = Path("/proc/self/status").read_text()
    print(json.dumps({"peak_mib": int(status.partition("VmHWM:")[2].split()[0]) / 1024}))


if __name__ == "__main__":
    main()
