"""The peer: litdata's `optimize` with its tokens loader, of a text file cut into ranges of lines.

`litdata_tokenize.py SETTINGS.json`: each input is a file of lines; the function yields the ids of
one line at a time, as litdata's own examples do.
"""

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import litdata
import torch
from litdata.streaming import TokensLoader
from tokenizers import Tokenizer


def read_ids(file: str, tokenizer_json: str) -> Iterator[torch.Tensor]:
    """Yield the ids of each line of a file."""
    tokenizer = Tokenizer.from_file(tokenizer_json)
    with Path(file).open() as lines:
        for line in lines:
            yield torch.tensor(tokenizer.encode(json.loads(line)["text"]).ids, dtype=torch.int32)


def main() -> None:
    """Do what the settings say."""
    settings: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    tokenizer_json = str(Path(settings["tokenizer_json"]) / "tokenizer.json")
    litdata.optimize(
        fn=partial(read_ids, tokenizer_json=tokenizer_json),
        inputs=sorted(map(str, Path(settings["jsonl"]).glob("*.jsonl"))),
        output_dir=settings["output"],
        num_workers=settings["num_workers"],
        chunk_bytes="64MB",
        item_loader=TokensLoader(),
    )


if __name__ == "__main__":
    main()
