"""Promise: a run, a store and an adapter of a release that hashed with SHA-256 are still checked.

`older_release.tar.xz` was written by the last such commit (6a7bfc1) on one CPU: a model of random
weights and its tokenizer (`model`), a text (`corpus`), its token store (`store`), a run of 8 steps
as it was after step 6 (`run`), and the adapter that it wrote at its end (`adapter`).
"""

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raytune_llama.config.settings import ConfigError, from_dict
from raytune_llama.config.yaml12 import read_mapping
from raytune_llama.data.build.preparation import open_current_store, open_data
from raytune_llama.data.store.manifest import StoreError
from raytune_llama.merge.config import MergeConfig
from raytune_llama.merge.merger import merge_adapters
from raytune_llama.serve.generation.model import check_files
from raytune_llama.storage.files import OUTPUT_MANIFEST, read_json
from raytune_llama.storage.hashes import hash_file
from raytune_llama.storage.place import Place
from raytune_llama.train.checkpoint.layout import CHECKPOINT_MANIFEST, check_checkpoint
from raytune_llama.train.config import PretrainConfig
from raytune_llama.train.identity import check_run, identify, read_identity, write_identity
from tests.train.conftest import run_here

ARCHIVE = Path(__file__).with_name("older_release.tar.xz")


@pytest.fixture
def older(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "older_release"


@pytest.fixture
def config(older: Path) -> PretrainConfig:
    values, problems = read_mapping(older / "run" / "run.yaml")
    assert values is not None
    assert not problems
    values["run_dir"] = str(older / "run")
    values["model"]["path"] = str(older / "model")
    values["data"]["store_dir"] = str(older / "store")
    values["data"]["sources"][0]["path"] = str(older / "corpus")
    return from_dict(PretrainConfig, values)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_run_of_an_older_release_resumes_to_the_same_result(
    older: Path, config: PretrainConfig
) -> None:
    known = {**identify(config), "store": read_identity(config.run_place)["store"]}
    check_run(config, known)
    write_identity(config, known)
    assert run_here(config).step == 8
    name = "adapter_model.safetensors"
    wanted = load_file(older / "adapter" / name)
    found = load_file(older / "run" / "pt_lora_model" / name)
    assert wanted.keys() == found.keys()
    for key, tensor in wanted.items():  # another processor may add in another order
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-6)


def test_run_of_an_older_release_with_another_model_is_refused(
    older: Path, config: PretrainConfig
) -> None:
    flip(older / "model" / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.model\.safetensors"):
        check_run(config, identify(config))


def test_checkpoint_of_an_older_release_with_a_flipped_bit_is_found(
    older: Path, tmp_path: Path
) -> None:
    place = Place.local(older / "run" / "checkpoints" / "step-00000006")
    assert check_checkpoint(place, tmp_path) is None
    (file,) = place.path.glob("*.safetensors")
    flip(file)
    assert file.name in str(check_checkpoint(place, tmp_path))
    manifest: dict[str, Any] = (place / CHECKPOINT_MANIFEST).read_json()
    manifest["files"][file.name]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (place / CHECKPOINT_MANIFEST).write_json(manifest)
    assert CHECKPOINT_MANIFEST in str(check_checkpoint(place, tmp_path))


def test_store_of_an_older_release_is_current_until_a_source_changes(
    older: Path, config: PretrainConfig
) -> None:
    def opened() -> Any:  # noqa: ANN401
        data = config.encoded_data
        return open_current_store(data, open_data(data, older / "model"))

    opened().verify()
    recorded = (older / "store" / ".source-files.json").read_text()
    assert "blake3" not in recorded, "the store's own hashes are of one algorithm"
    (older / "corpus" / "a.txt").write_text("another text\n")
    with pytest.raises(StoreError, match=r"a\.txt: its content changed \(SHA-256 .*SHA-256"):
        opened()


def test_store_of_an_older_release_with_a_flipped_bit_is_found(
    older: Path, config: PretrainConfig
) -> None:
    flip(older / "store" / "train-00000.arrow")
    data = config.encoded_data
    store = open_current_store(data, open_data(data, older / "model"))
    assert store is not None
    with pytest.raises(StoreError, match=r"train-00000\.arrow: its hash is SHA-256"):
        store.verify()


def test_adapter_of_an_older_release_is_verified_merged_and_recorded_with_new_hashes(
    older: Path,
) -> None:
    assert check_files(older / "adapter") == []
    target = older / "merged"
    adapters = (str(older / "adapter"),)
    merge_adapters(MergeConfig(base=str(older / "model"), adapters=adapters, target=str(target)))
    base = read_json(target / OUTPUT_MANIFEST)["merged"]["inputs"]["base"]
    assert base["model.safetensors"] == hash_file(older / "model" / "model.safetensors")
    flip(older / "adapter" / "tokenizer.json")
    assert "SHA-256" in check_files(older / "adapter")[0]


def test_adapter_of_an_older_release_on_another_base_is_refused(older: Path) -> None:
    flip(older / "model" / "model.safetensors")
    config = MergeConfig(
        base=str(older / "model"),
        adapters=(str(older / "adapter"),),
        target=str(older / "merged"),
    )
    with pytest.raises(ValueError, match=r"model\.safetensors.*SHA-256"):
        merge_adapters(config)
    assert "sha256" in json.dumps(read_json(older / "adapter" / OUTPUT_MANIFEST))
