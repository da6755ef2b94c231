"""The peer: how the Chinese-LLaMA scripts make training blocks of a text file.

`hf_datasets.py SETTINGS.json`: datasets' text loader, a map that tokenizes, a map that groups into
blocks, save to disk; two processes, as the scripts are started with.
"""

import json
import sys
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import load_dataset
from transformers import AutoTokenizer


def main() -> None:
    """Do what the settings say; write how many tokens came out."""
    settings: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    tokenizer = AutoTokenizer.from_pretrained(settings["tokenizer"])
    block = settings["block_tokens"]

    def tokenize(batch: dict[str, Any]) -> dict[str, Any]:
        return tokenizer(batch["text"])

    def group(batch: dict[str, Any]) -> dict[str, Any]:
        joined = {name: list(chain(*batch[name])) for name in batch}
        total = len(joined["input_ids"])
        if total >= block:
            total = total // block * block
        result = {
            name: [ids[start : start + block] for start in range(0, total, block)]
            for name, ids in joined.items()
        }
        result["labels"] = result["input_ids"].copy()
        return result

    text = load_dataset(
        "text", data_files=settings["text"], cache_dir=settings["cache"], split="train"
    )
    processes = settings["num_workers"]
    tokens = text.map(tokenize, batched=True, num_proc=processes, remove_columns=["text"])
    blocks = tokens.map(group, batched=True, num_proc=processes)
    blocks.save_to_disk(settings["output"])
    Path(settings["result"]).write_text(json.dumps({"tokens": len(blocks) * block}))


if __name__ == "__main__":
    main()
