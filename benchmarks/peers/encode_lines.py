"""One engine on one text: `encode_lines.py ENGINE TOKENIZER TEXT IDS`; prints JSON.

CPU time and not the clock's: other programs on the machine are not the engine's fault. What is
measured ends with a NumPy array of ids for each document, whatever an engine returns.
"""

import json
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from raytune_llama.tokenizer.loader import load_reference_encoder, load_tokenizer
from raytune_llama.tokenizer.selection import select_encoder

EncodeFunction = Callable[[list[str]], Sequence[np.ndarray]]

BATCH_TEXTS = 1024


def as_arrays(ids: Sequence[Any]) -> list[np.ndarray]:
    """Turn what an engine returns into arrays."""
    return [np.array(one, np.uint32) for one in ids]


def as_json(tokenizer: Path) -> str:
    """Return the path of the tokenizer's tokenizer.json, converted where there is only a model."""
    if (tokenizer / "tokenizer.json").is_file():
        return str(tokenizer / "tokenizer.json")
    folder = tempfile.mkdtemp()
    load_tokenizer(tokenizer).save_pretrained(folder)
    return f"{folder}/tokenizer.json"


def reference(tokenizer: Path) -> EncodeFunction:
    """What defines the ids."""
    return load_reference_encoder(tokenizer).encode


def compiled(tokenizer: Path) -> EncodeFunction:
    """Ours, as a worker uses it: with the share that is checked."""
    return select_encoder(load_tokenizer(tokenizer), [], "compiled").encoder.encode


def tokenizers(tokenizer: Path) -> EncodeFunction:
    """Hugging Face's library, on the converted tokenizer.json."""
    engine = import_module("tokenizers").Tokenizer.from_file(as_json(tokenizer))
    engine.encode_special_tokens = True

    def encode(texts: list[str]) -> list[np.ndarray]:
        encoded = engine.encode_batch_fast(texts, add_special_tokens=False)
        return as_arrays([one.ids for one in encoded])

    return encode


def kitoken(tokenizer: Path) -> EncodeFunction:
    """https://github.com/Systemcluster/kitoken."""
    build = import_module("kitoken").Kitoken
    if (tokenizer / "tokenizer.model").is_file():
        engine = build.from_sentencepiece_file(str(tokenizer / "tokenizer.model"))
    else:
        engine = build.from_tokenizers_file(as_json(tokenizer))
    return lambda texts: as_arrays(engine.encode_all(texts, False))


def tokie(tokenizer: Path) -> EncodeFunction:
    """https://github.com/chonkie-inc/tokie."""
    engine = import_module("tokie").Tokenizer.from_json(as_json(tokenizer))
    return lambda texts: as_arrays([engine.encode(t, add_special_tokens=False).ids for t in texts])


def gigatoken(tokenizer: Path) -> EncodeFunction:
    """https://github.com/marcelroed/gigatoken."""
    load = import_module("gigatoken.gigatoken_rs").load_hf_json
    engine = load(Path(as_json(tokenizer)).read_bytes())
    return lambda texts: [engine.encode(text) for text in texts]


def fastokens(tokenizer: Path) -> EncodeFunction:
    """https://github.com/crusoecloud/fastokens."""
    engine = import_module("fastokens._native").Tokenizer.from_file(as_json(tokenizer))

    def encode(texts: list[str]) -> list[np.ndarray]:
        ids, bounds = engine.encode_batch_flat(texts, split_special_tokens=True)
        return np.split(np.frombuffer(ids, np.uint32), np.frombuffer(bounds, np.uint64)[1:-1])

    return encode


ENGINES = (reference, compiled, tokenizers, kitoken, tokie, gigatoken, fastokens)


def resident_mib() -> int:
    """Return the process's resident memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


def main() -> None:
    """Encode the text in four quarters, so that it shows whether memory goes on growing."""
    name, tokenizer, text, target = sys.argv[1:]
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    encode = {engine.__name__: engine for engine in ENGINES}[name](Path(tokenizer))
    lines = Path(text).read_text().splitlines()
    encode(["warm up"])
    seconds, hashes, memory = 0.0, [], [resident_mib()]
    for quarter in np.array_split(np.arange(len(lines)), 4):
        for start in range(quarter[0], quarter[-1] + 1, BATCH_TEXTS):
            batch = lines[start : min(start + BATCH_TEXTS, quarter[-1] + 1)]
            began = time.process_time()
            encoded = encode(batch)
            seconds += time.process_time() - began
            hashes += [zlib.crc32(ids.astype(np.uint32).tobytes()) for ids in encoded]
        memory.append(resident_mib())
    np.savez(target, hashes=np.array(hashes, np.uint32))
    own = {"reference": "", "compiled": version("numba") if name == "compiled" else ""}
    result = {
        "version": own.get(name) or ("" if name in own else version(name)),
        "megabytes_per_second": Path(text).stat().st_size / 1e6 / seconds,
        "documents": len(lines),
        "growth_mib": np.diff(memory).tolist(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
