"""The memory that merging takes, in a process of its own.

Pages of mapped files are not counted: the system takes them back when it needs memory. pth is made
from a mapped file, since a .pth file can only be written whole.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from raytune_llama.model.tensors import open_weights
from tests.merge.conftest import ALL, MakeAdapter, MakeBase

_MERGE = """
import re, sys, threading, time
from pathlib import Path
from raytune_llama.merge.merger import (merge_adapters)
from raytune_llama.merge.config import (MergeConfig)

peak = 0

def watch():
    global peak
    while True:
        status = Path("/proc/self/status").read_text()
        peak = max(peak, 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]))
        time.sleep(0.002)

threading.Thread(target=watch, daemon=True).start()
base, adapter, target, form = sys.argv[1:]
merge_adapters(MergeConfig(base=base, adapters=(adapter,), target=target, output_format=form))
print(peak)
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["huggingface", "pth", "gguf"])
def test_merge_of_a_model_that_is_larger_than_the_bound_stays_under_it(
    make_base: MakeBase, make_adapter: MakeAdapter, add_pieces: Callable[[Path], None], form: str
) -> None:
    base = make_base(
        vocab_size=360,
        hidden_size=1024,
        intermediate_size=16_384,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_hidden_layers=8,
        shard_size="400MB",
    )
    add_pieces(base)
    adapter = make_adapter(base, target_modules=ALL)
    specs = open_weights(base).specs.values()
    largest = max(spec.num_bytes for spec in specs)
    bound = 3 * largest + 500 * 10**6
    assert sum(spec.num_bytes for spec in specs) > 2 * bound
    command = [sys.executable, "-c", _MERGE, str(base), str(adapter)]
    merged = subprocess.run(
        [*command, str(base.with_name("merged")), form],
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(merged.stdout.splitlines()[-1]) < bound
