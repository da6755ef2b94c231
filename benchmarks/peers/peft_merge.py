"""Merge as PEFT's documentation does: `peft_merge.py BASE ADAPTER TARGET DTYPE`."""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main() -> None:
    """Load, merge, save; print the peak memory of the process."""
    base, adapter, target, dtype = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(target, max_shard_size="1GB")
    status = Path("/proc/self/status").read_text()
    print(json.dumps({"peak_mib": int(status.partition("VmHWM:")[2].split()[0]) / 1024}))


if __name__ == "__main__":
    main()
