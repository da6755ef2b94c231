"""Promise: workers on Ray make the same bytes as this process, whatever their number."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from raytune_llama.storage.files import OUTPUT_MANIFEST
from tests.merge.conftest import MakeAdapter, MakeBase, left_over, merge, rewrite_base

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def contents(folder: Path) -> dict[str, Any]:
    """Return a merged model's files; its manifest without the number of workers it records."""
    files: dict[str, Any] = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    manifest = json.loads(files[OUTPUT_MANIFEST])
    del manifest["config"]["num_workers"]
    return {**files, OUTPUT_MANIFEST: manifest}


def test_merge_on_any_number_of_workers_has_the_same_bytes(
    make_base: MakeBase, make_adapter: MakeAdapter
) -> None:
    # More rows than are computed at a time, and more than one file.
    base = make_base(vocab_size=2500, hidden_size=256, intermediate_size=1536)
    adapter = make_adapter(base, r=8, target_modules=["q_proj", "up_proj", "embed_tokens"])
    fields = {"max_shard_mib": 2, "dtype": "bfloat16"}
    alone = contents(merge(base, adapter, **fields).rename(base.with_name("alone")))
    assert sum(name.endswith(".safetensors") for name in alone) > 3
    for num_workers in (2, 3):
        target = merge(base, adapter, num_workers=num_workers, **fields)
        assert contents(target) == alone
        target.rename(base.with_name(f"by-{num_workers}"))


def test_merge_with_a_worker_that_fails_says_why_and_leaves_nothing(
    make_base: MakeBase, make_adapter: MakeAdapter
) -> None:
    base = make_base(vocab_size=2500, hidden_size=256)
    adapter = make_adapter(base, target_modules=["q_proj"])

    def enlarge(weights: dict[str, Tensor]) -> None:
        weights["model.norm.weight"].fill_(1e6)

    rewrite_base(base, enlarge)
    with pytest.raises(ValueError, match="float16 ends at 65,504"):
        merge(base, adapter, num_workers=2, max_shard_mib=1, dtype="float16")
    assert left_over(base) == []


def test_merge_of_one_file_needs_no_workers(
    make_base: MakeBase, make_adapter: MakeAdapter, caplog: pytest.LogCaptureFixture
) -> None:
    base = make_base()
    merged = merge(base, make_adapter(base), num_workers=2)
    assert "num_workers is 2, but there is only one file" in caplog.text
    assert (merged / "model.safetensors").is_file()
