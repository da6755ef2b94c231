"""Merge as `jobs/merge.py` does and print the peak memory: `merge_once.py CONFIG.json`."""

import json
import sys
from pathlib import Path

from raytune_llama.config.settings import load
from raytune_llama.merge.config import MergeConfig
from raytune_llama.model.bitsandbytes_import import hide_bitsandbytes_unless


def peak_mib() -> float:
    """Return the largest resident size of this process so far, mapped files included."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


if __name__ == "__main__":
    hide_bitsandbytes_unless(None)
    from raytune_llama.merge.merger import merge_adapters

    merge_adapters(load(MergeConfig, sys.argv[1:]))
    print(json.dumps({"peak_mib": peak_mib()}))
