"""Promise: adapters are merged only into the weights that they were trained on, in their order."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from raytune_llama.model.adapter import Adapter
from raytune_llama.model.adapter_lineage import (
    LINEAGE_KEY,
    Lineage,
    check_chain,
    describe_merge,
    describe_training,
    hash_weights,
)
from raytune_llama.storage.files import OUTPUT_MANIFEST, read_manifest, write_json_atomic
from tests.merge.conftest import MakeAdapter, MakeBase, make_adapter, make_base, merge

__all__ = ["make_adapter", "make_base"]

Train = Callable[..., Path]


@pytest.fixture
def train(make_adapter: MakeAdapter) -> Train:
    """Write an adapter as a run does: with the manifest of what it was trained on."""

    def make(base: Path, name: str, *, continues: Path | None = None) -> Path:
        adapter = make_adapter(base, name, r=len(name))
        before = Adapter.open(continues) if continues else None
        manifest = {"base": hash_weights(base), LINEAGE_KEY: describe_training(base, before)}
        write_json_atomic(adapter / OUTPUT_MANIFEST, manifest)
        return adapter

    return make


def check(base: Path, *adapters: Path) -> str:
    return "\n".join(check_chain(base, [Adapter.open(path) for path in adapters]))


def merge_to(target: Path, base: Path, *adapters: Path, **fields: str) -> Path:
    return merge(base, *adapters, **fields).rename(target)


def forget(adapter: Path, *keys: str) -> None:
    """Remove keys of a manifest, as an older release would not have written them."""
    manifest = read_manifest(adapter)
    for key in keys:
        del manifest[key]
    write_json_atomic(adapter / OUTPUT_MANIFEST, manifest)


def test_chain_of_two_trained_one_on_the_other_is_merged_in_one_step_or_in_two(
    make_base: MakeBase, train: Train, tmp_path: Path
) -> None:
    base = make_base()
    first = train(base, "a")
    middle = merge_to(tmp_path / "middle", base, first)
    second = train(middle, "bb")
    assert check(base, first, second) == ""
    assert check(middle, second) == ""
    at_once = merge_to(tmp_path / "at_once", base, first, second)
    in_two = merge_to(tmp_path / "in_two", middle, second)
    assert Lineage.of_model(at_once) == Lineage.of_model(in_two)
    third = train(in_two, "ccc")
    assert check(base, first, second, third) == ""
    # The same merge, in another type: other files, the same weights.
    assert check(merge_to(tmp_path / "half", base, first, dtype="bfloat16"), second) == ""


def test_adapter_that_continues_another_replaces_it(make_base: MakeBase, train: Train) -> None:
    base = make_base()
    first = train(base, "a")
    second = train(base, "bb", continues=first)
    third = train(base, "ccc", continues=second)
    assert check(base, third) == ""
    for chain in ([first, second], [second, first], [first, third], [first, second, third]):
        problem = check(base, *chain)
        assert "contains it" in problem
        assert f"set adapters=[{max(chain, key=lambda path: len(path.name))}]" in problem
    with pytest.raises(ValueError, match="contains it"):
        merge(base, first, second)
    assert not base.with_name("merged").exists()


def test_adapters_of_the_same_base_are_not_added(make_base: MakeBase, train: Train) -> None:
    base = make_base()
    first, second = train(base, "a"), train(base, "bb")
    problem = check(base, first, second)
    assert f"trained apart, on the same weights: merge one of them, adapters=[{first}]" in problem
    assert "is listed twice" in check(base, first, first)
    shutil.copytree(first, first.with_name("copy"))
    assert "is listed twice" in check(base, first, first.with_name("copy"))


def test_chain_in_another_order_names_the_right_one(
    make_base: MakeBase, train: Train, tmp_path: Path
) -> None:
    base = make_base()
    first = train(base, "a")
    middle = merge_to(tmp_path / "middle", base, first)
    second = train(middle, "bb")
    third = train(merge_to(tmp_path / "last", middle, second), "ccc")
    right = f"set adapters=[{first},{second},{third}]"
    assert right in check(base, first, third, second)
    lacking = check(base, second)
    assert "was trained on" in lacking
    assert "list them before it, or set base to that merge" in lacking
    assert "was not trained on the merge of exactly those before it" in check(base, first, third)
    # The base that holds the first already.
    assert "is not the base" in check(middle, first)


def test_adapter_on_another_base_of_the_same_shape_is_refused(
    make_base: MakeBase, train: Train
) -> None:
    base, other = make_base(), make_base("other")
    adapter = train(base, "a")
    problem = check(other, adapter)
    assert f"{other} is not the base that {adapter} was trained on" in problem
    assert "another model.safetensors (BLAKE3 " in problem


def test_adapter_of_an_older_release_is_checked_as_far_as_its_manifest_says(
    make_base: MakeBase, train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = make_base()
    first, apart = train(base, "a"), train(base, "dddd")
    middle = merge_to(tmp_path / "middle", base, first)
    forget(middle, LINEAGE_KEY)
    assert (
        Lineage.of_model(middle).adapters
        == Lineage(**describe_merge(base, [Adapter.open(first)])).adapters
    )
    second = train(middle, "bb")
    assert check(base, first, second) == ""
    for adapter in (second, apart):
        forget(adapter, LINEAGE_KEY)
    assert check(base, first, second) == ""
    assert "records no lineage" in caplog.text
    assert f"was trained on {base} itself" in check(base, first, apart)


def test_chain_over_a_merge_of_a_release_with_sha256_is_checked_with_it(
    make_base: MakeBase, train: Train, tmp_path: Path
) -> None:
    base = make_base()
    first, other = train(base, "a"), train(base, "dddd")
    middle = merge_to(tmp_path / "middle", base, first)
    manifest = read_manifest(middle)
    del manifest[LINEAGE_KEY]
    for key, folder in (("base", base), ("adapter 0", first)):
        files = manifest["merged"]["inputs"][key]
        for name in files:
            files[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    write_json_atomic(middle / OUTPUT_MANIFEST, manifest)
    second = train(middle, "bb")
    assert check(base, first, second) == ""
    assert "was not trained on the merge" in check(base, other, second)


def test_adapter_without_a_manifest_is_compared_by_the_name_of_its_base(
    make_base: MakeBase, make_adapter: MakeAdapter, caplog: pytest.LogCaptureFixture
) -> None:
    base, other = make_base(), make_base("other")
    adapter = make_adapter(base)
    assert check(base, adapter) == ""
    assert caplog.text == ""
    assert f"names the base {base}, whose weights are not those of {other}" in check(other, adapter)
    shutil.copytree(base, base.with_name("copy"))
    assert check(base.with_name("copy"), adapter) == ""
    file = adapter / "adapter_config.json"
    settings = json.loads(file.read_text())
    for name, said in (("hub/llama", "which is not here"), (None, "does not record its base")):
        caplog.clear()
        file.write_text(json.dumps(settings | {"base_model_name_or_path": name}))
        assert check(base, adapter) == ""
        assert said in caplog.text
    caplog.clear()
    file.write_text(json.dumps(settings | {"base_model_name_or_path": f"hub/{base.name}"}))
    assert check(base, adapter) == ""
    assert caplog.text == ""


def test_lineage_survives_other_weights_of_the_same_name(make_base: MakeBase, train: Train) -> None:
    """A base that was edited in place is another one."""
    base = make_base()
    adapter = train(base, "a")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert "is not the base" in check(base, adapter)
