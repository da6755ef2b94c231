"""Promise: a merge reads from buckets and the hub, and a bucket never shows half of its result."""

import json
from http import HTTPStatus
from pathlib import Path

import pytest

from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import ConfigError, from_dict
from raytune_llama.merge.config import MergeConfig
from raytune_llama.merge.merger import merge_adapters
from raytune_llama.storage.place import Place
from tests.faulty_s3 import FaultyServer
from tests.hub_server import HubServer
from tests.merge.conftest import MakeAdapter, MakeBase, merge


def upload(folder: Path, place: Place) -> str:
    for file in folder.iterdir():
        (place / file.name).upload(file)
    return str(place)


def names(place: Place) -> list[str]:
    return [file.name for file in place.files()]


def test_merge_from_and_to_a_bucket_equals_that_of_the_disk(
    make_base: MakeBase, make_adapter: MakeAdapter, s3_path: Place, hub: HubServer
) -> None:
    base = make_base(shard_size="20KB")
    adapter = make_adapter(base)
    target = s3_path / "merged"
    config = MergeConfig(
        base=upload(base, s3_path / "base"),
        adapters=(upload(adapter, s3_path / "adapter"),),
        target=str(target),
    )
    merge_adapters(config)
    local = merge(base, adapter)
    assert names(target) == sorted(file.name for file in local.iterdir())
    for file in target.files():
        if file.name.endswith((".safetensors", "config.json")):
            assert file.read_bytes() == (local / file.name).read_bytes()
    with pytest.raises(UserError, match=r"target: s3://.* exists"):
        merge_adapters(config)


def test_merge_of_a_base_on_the_hub_equals_that_of_the_disk(
    make_base: MakeBase, make_adapter: MakeAdapter, tmp_path: Path, hub: HubServer
) -> None:
    base = make_base()
    adapter = make_adapter(base)
    commit = hub.publish("org/base", {file.name: file.read_bytes() for file in base.iterdir()})
    of_adapter = hub.publish(
        "org/adapter", {file.name: file.read_bytes() for file in adapter.iterdir()}
    )
    target = tmp_path / "from-hub"
    adapters = ("hf://org/adapter@main",)
    merge_adapters(MergeConfig(base="hf://org/base", adapters=adapters, target=str(target)))
    wanted = merge(base, adapter) / "model.safetensors"
    assert (target / "model.safetensors").read_bytes() == wanted.read_bytes()
    recorded = json.loads((target / "manifest.json").read_bytes())["config"]
    assert recorded["base"] == f"hf://org/base@{commit}?ref=main"
    assert recorded["adapters"] == [f"hf://org/adapter@{of_adapter}?ref=main"]


def test_merge_into_a_bucket_that_denies_writing_is_refused_before_anything_is_read(
    s3_path: Place, faulty_s3: FaultyServer
) -> None:
    def deny(request: str, _times: int) -> HTTPStatus | None:
        return HTTPStatus.FORBIDDEN if request.startswith(("PUT ", "POST ")) else None

    faulty_s3.fault = deny
    target = faulty_s3.front_of(s3_path / "merged")
    with pytest.raises(UserError, match=r"target: s3://\S+ cannot be written to .*credentials"):
        merge_adapters(MergeConfig(base="none", adapters=("none",), target=str(target)))
    assert names(target) == []


def test_merge_whose_upload_fails_leaves_nothing_that_looks_like_a_model(
    make_base: MakeBase, make_adapter: MakeAdapter, s3_path: Place, faulty_s3: FaultyServer
) -> None:
    base = make_base(shard_size="20KB")
    adapter = make_adapter(base)
    target = faulty_s3.front_of(s3_path / "merged")

    def deny(request: str, _times: int) -> HTTPStatus | None:
        is_config = request.startswith(("PUT ", "POST ")) and "/merged/config.json" in request
        return HTTPStatus.FORBIDDEN if is_config else None

    faulty_s3.fault = deny
    config = MergeConfig(base=str(base), adapters=(str(adapter),), target=str(target))
    with pytest.raises(OSError, match=r"config\.json"):
        merge_adapters(config)
    assert not {"config.json", "manifest.json"} & set(names(target))
    assert any(name.endswith(".safetensors") for name in names(target))
    faulty_s3.fault = lambda _request, _times: None
    with pytest.raises(UserError, match=r"target: .* no manifest\.json, as an interrupted upload"):
        merge_adapters(config)
    target.delete()
    merge_adapters(config)
    assert {"config.json", "manifest.json"} <= set(names(target))


def test_merge_lists_all_inputs_that_cannot_be_fetched(hub: HubServer, s3_path: Place) -> None:
    config = MergeConfig(
        base="hf://org/none", adapters=(str(s3_path / "none"), "s3:/bucket/x"), target=str(s3_path)
    )
    with pytest.raises(ConfigError) as caught:
        merge_adapters(config)
    starts = [problem.partition(":")[0] for problem in caught.value.problems]
    assert starts == ["base", "adapters.0", "adapters.1"]


def test_merge_to_a_bucket_by_several_nodes_is_refused() -> None:
    fields = {"base": "a", "adapters": ["b"], "target": "s3://bucket/x", "num_workers": 2}
    with pytest.raises(ConfigError, match="num_workers: got 2, but a result for a bucket"):
        from_dict(MergeConfig, fields)
