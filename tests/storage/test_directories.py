"""Promise: a path in a config has one meaning, and what is not meant is not looked for."""

from pathlib import Path

import pytest

from raytune_llama.config.errors import UserError
from raytune_llama.config.paths import path_name
from raytune_llama.config.settings import ConfigError
from raytune_llama.data.readers.config import SourceConfig
from raytune_llama.data.readers.sources import discover_files
from raytune_llama.storage.directories import (
    fetch_directory,
    fetched,
    parse_source,
    pin_directory,
    pin_source,
)
from raytune_llama.storage.place import Place
from tests.hub_server import HubServer

MODEL = {"config.json": b"{}", "model.safetensors": b"w"}
FIELD = "model.path"


def test_pin_of_a_bare_id_is_the_hubs_only_where_nothing_local_can_be_meant(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    commit = hub.publish("org/name", MODEL)
    hub.publish("models/modle", MODEL)
    assert pin_directory("org/name", FIELD) == f"hf://org/name@{commit}?ref=main"
    hub.requests.clear()
    (tmp_path / "models").mkdir()
    # A misspelled path in a folder that exists stays one.
    assert pin_directory("models/modle", FIELD) == str(tmp_path / "models" / "modle")
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert pin_directory("org/name", FIELD) == str(tmp_path / "org" / "name")
    assert hub.requests == []
    assert pin_directory("hf://org/name", FIELD) == f"hf://org/name@{commit}?ref=main"


def test_pin_of_a_bare_id_that_is_nowhere_names_both_places(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"^model\.path: there is no local directory a/b, and .*no model a/b"
    ):
        pin_directory("a/b", FIELD)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("s3:/bucket/model", "s3://bucket/model"),
        ("s3:bucket/model", "s3://bucket/model"),
        ("gs:/bucket/model", "gs://bucket/model"),
        ("hf:org/name", "hf://org/name"),
        ("S3:/bucket", "s3://bucket"),
    ],
)
def test_a_scheme_without_two_slashes_is_refused_with_the_uri_that_was_meant(
    text: str, wanted: str
) -> None:
    with pytest.raises(UserError, match=rf"^f: got .*two slashes.*: {wanted}$"):
        pin_directory(text, "f")
    with pytest.raises(UserError, match=wanted):
        Place.parse(text, "f")


@pytest.mark.parametrize("text", ["s3a://bucket/model", "http://host/model", "ftp://a/b", "s3://"])
def test_a_scheme_that_is_not_read_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^f: got "):
        pin_directory(text, "f")


def test_a_place_that_is_written_to_is_not_on_the_hub() -> None:
    with pytest.raises(UserError, match="only models and sources can be on the hub"):
        Place.parse("hf://datasets/org/name/run", "run_dir")


def test_fetch_from_a_bucket_that_does_not_exist_is_refused(s3: Place) -> None:
    with pytest.raises(UserError, match=r"^model\.path: s3://nowhere/model.*bucket"):
        fetch_directory(str(Place("s3", "nowhere/model", s3.options)), FIELD)


def test_fetched_opens_a_local_directory_where_it_is(tmp_path: Path) -> None:
    assert fetched(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("/a/llama", "llama"),
        ("s3://bucket/a/llama?region=x", "llama"),
        ("hf://org/llama@main", "llama"),
        (f"hf://org/llama@{'a' * 40}?ref=main", "llama"),
        ("hf://datasets/org/corpus@v1/a.jsonl", "a.jsonl"),
    ],
)
def test_path_name_is_the_last_part_without_revision_and_options(text: str, name: str) -> None:
    assert path_name(text) == name


def test_sources_of_a_dataset_are_listed_and_read_at_one_commit(hub: HubServer) -> None:
    rows = b'{"text": "one"}\n{"text": "two"}\n'
    files = {"data/a.jsonl": rows, "data/b.jsonl": rows, "README.md": b"#", "other.jsonl": b"{}\n"}
    commit = hub.publish("org/corpus", files, kind="datasets")
    pinned = pin_source("hf://datasets/org/corpus/data/*.jsonl", "f")
    assert pinned == f"hf://datasets/org/corpus@{commit}/data/*.jsonl?ref=main"
    hub.publish("org/corpus", {**files, "data/a.jsonl": b'{"text": "new"}\n'}, kind="datasets")
    found = discover_files((SourceConfig(path=pinned),))
    assert [file.name for file in found] == ["a.jsonl", "b.jsonl"]
    assert found[0].place.read_bytes() == rows
    with found[0].place.open() as file:
        file.seek(16)
        assert file.read(7) == rows[16:23]
    assert found[0].status.num_bytes == len(rows)
    # A later commit of the same size is another version of the file.
    later = hub.publish("org/corpus", files, kind="datasets")
    other = parse_source(f"hf://datasets/org/corpus@{later}/data/a.jsonl", "f")
    assert other.status() != found[0].status


def test_sources_of_a_private_dataset_at_a_commit_say_so_and_not_that_no_file_matches(
    hub: HubServer,
) -> None:
    commit = hub.publish("org/private", {"a.jsonl": b"{}"}, kind="datasets", is_private=True)
    path = f"hf://datasets/org/private@{commit}/a.jsonl"
    with pytest.raises(ConfigError, match=r"no dataset org/private, or it is private"):
        discover_files((SourceConfig(path=path),))


@pytest.mark.parametrize("text", ["https://huggingface.co/org/name/tree/main", "HF://org/name"])
def test_address_of_a_models_page_is_refused_with_the_path_that_was_meant(text: str) -> None:
    with pytest.raises(UserError, match=r"^f: got .*; for a model on the hub give hf://org/name$"):
        pin_directory(text, "f")


def test_sources_of_a_model_or_of_no_dataset_are_refused(hub: HubServer) -> None:
    with pytest.raises(UserError, match=r"^f: got .*a model; wanted a dataset"):
        pin_source("hf://org/name", "f")
    with pytest.raises(UserError, match=r"^f: .*no dataset org/none"):
        pin_source("hf://datasets/org/none/x.jsonl", "f")
