"""Promise: a model of the hub is one commit, whole and checked, or the error says what to do."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from raytune_llama.config.errors import UserError
from raytune_llama.storage.directories import fetch_directory, pin_directory
from raytune_llama.storage.hub import HubPath, find_hub_paths, may_be_on_hub
from tests.conftest import hub_environment
from tests.hub_server import TOKEN, Fault, HubServer
from tests.storage.fetching import fetch_elsewhere, start_fetch

WEIGHTS = bytes(range(256)) * 4000
MODEL = {"config.json": b"{}", "model.safetensors": WEIGHTS, "tokenizer.json": b'{"a": 1}'}
FIELD = "model.path"


def fetch(text: str) -> Path:
    return fetch_directory(pin_directory(text, FIELD), FIELD)


def names(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def test_fetch_takes_weights_tokenizer_and_settings_but_neither_code_nor_pickles(
    hub: HubServer,
) -> None:
    others = {
        "modeling.py": b"import os",
        "pytorch_model.bin": b"pickle",
        "original/consolidated.safetensors": b"x",
        "additional_chat_templates/tools.jinja": b"{{ x }}",
        "README.md": b"text",
    }
    hub.publish("org/name", {**MODEL, **others})
    folder = fetch("hf://org/name")
    assert names(folder) == {*MODEL, "additional_chat_templates/tools.jinja", "README.md"}
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert not any(".py" in request or ".bin" in request for request in hub.requests)


def test_pin_keeps_the_commit_of_a_branch_that_moves_while_it_is_recorded(hub: HubServer) -> None:
    first = hub.publish("org/name", MODEL)
    pinned = pin_directory("hf://org/name", FIELD)
    assert pinned == f"hf://org/name@{first}?ref=main"
    second = hub.publish("org/name", {**MODEL, "config.json": b'{"new": 1}'})
    assert (fetch_directory(pinned, FIELD) / "config.json").read_bytes() == b"{}"
    recorded = find_hub_paths(f"model:\n  path: {pinned}\n  other: 1\n")
    assert pin_directory("hf://org/name", FIELD, recorded) == pinned
    assert pin_directory("hf://org/name@main", FIELD, recorded) == pinned
    assert pin_directory("hf://org/name", FIELD) == f"hf://org/name@{second}?ref=main"
    assert pin_directory(f"hf://org/name@{first}", FIELD) == f"hf://org/name@{first}"


@pytest.mark.parametrize(
    "text",
    [
        "hf://org/name",
        "hf://org/name@v1.0",
        "hf://org/name@feature%2Fx",
        "hf://org/name@refs/pr/3",
        f"hf://org/name@{'a' * 40}?ref=feature%2Fx",
        "hf://datasets/org/name@main/data/*.jsonl",
        "hf://datasets/org/name@refs/convert/parquet/default",
    ],
)
def test_hub_path_is_written_as_it_is_read(text: str) -> None:
    assert str(HubPath.parse(text, "f")) == text


@pytest.mark.parametrize(
    "text", ["hf://name", "hf:///org/name", "hf://org/name/file", "hf://org/name@", "hf://a b/c"]
)
def test_hub_path_of_another_form_is_refused_with_the_forms_that_there_are(text: str) -> None:
    with pytest.raises(UserError, match=r"data\.x: got .*wanted hf://org/name"):
        HubPath.parse(text, "data.x")


def test_may_be_on_hub_is_true_of_ids_and_false_of_other_paths() -> None:
    assert all(map(may_be_on_hub, ("org/name", "org/name@v1", "hf://org/name")))
    assert not any(
        map(may_be_on_hub, ("./a/b", "/a/b", "a/b/c", "name", "~/a", "../a", "s3://a/b"))
    )


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("hf://org/other", r"no model org/other, or it is private.*HF_TOKEN is not set"),
        ("hf://org/private", r"no model org/private, or it is private.*HF_TOKEN is not set"),
        ("hf://org/gated", r"org/gated is gated.*HF_TOKEN"),
        ("hf://org/name@v9", r"org/name has no revision 'v9'"),
        ("hf://org/pickles", r"weights only as pytorch_model\.bin.*safetensors"),
        ("hf://datasets/org/name", r"a dataset; wanted a model"),
    ],
)
def test_pin_of_what_cannot_be_had_says_what_to_do(hub: HubServer, text: str, error: str) -> None:
    hub.publish("org/name", MODEL)
    hub.publish("org/private", MODEL, is_private=True)
    hub.publish("org/gated", MODEL, is_gated=True)
    hub.publish("org/pickles", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    with pytest.raises(UserError, match=rf"^model\.path: .*{error}"):
        pin_directory(text, FIELD)


def test_fetch_of_a_private_model_takes_the_token_of_the_environment_and_tells_no_other_host(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("org/private", MODEL, is_private=True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert names(fetch("hf://org/private")) == set(MODEL)
    assert hub.tokens_sent_elsewhere == []


def test_fetch_waits_as_long_as_a_busy_hub_says(hub: HubServer) -> None:
    hub.publish("org/name", MODEL)
    busy = Fault(429, {"Retry-After": "0"})
    hub.fault = lambda request, times: busy if "/api/" in request and times < 2 else None
    assert names(fetch("hf://org/name")) == set(MODEL)


def test_pin_at_a_hub_that_stays_busy_is_refused_with_the_remedy(hub: HubServer) -> None:
    hub.publish("org/name", MODEL)
    hub.fault = lambda _request, _times: Fault(429, {"Retry-After": "99999"})
    with pytest.raises(UserError, match=r"model\.path: .*\(429\).*HF_TOKEN"):
        pin_directory("hf://org/name", FIELD)


def test_fetch_continues_where_a_connection_was_cut(hub: HubServer) -> None:
    weights = bytes(range(256)) * (12 * 2**20 // 256)
    hub.publish("org/name", {**MODEL, "model.safetensors": weights})
    cut = Fault(cut_after=11 * 2**20)
    hub.fault = lambda request, times: cut if "GET /large" in request and times == 0 else None
    assert (fetch("hf://org/name") / "model.safetensors").read_bytes() == weights
    # The library writes 10 MiB at a time, so that the eleventh is fetched twice.
    assert hub.sent_of(weights) == 13 * 2**20


@pytest.mark.parametrize("damaged", ["GET /large", "GET /org/name/resolve"])
def test_fetch_refuses_damaged_bytes_and_fetches_them_again(hub: HubServer, damaged: str) -> None:
    hub.publish("org/name", MODEL)
    hub.fault = lambda request, times: (
        Fault(flip=True) if damaged in request and not times else None
    )
    for _ in range(2 if "resolve" in damaged else 1):  # config.json and tokenizer.json
        with pytest.raises(UserError, match=r"model\.path: .* was damaged on its way"):
            fetch("hf://org/name")
    folder = fetch("hf://org/name")
    assert {name: (folder / name).read_bytes() for name in MODEL} == MODEL


def test_fetch_without_room_names_what_it_takes_and_fetches_nothing(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("org/name", MODEL)
    pinned = pin_directory("hf://org/name", FIELD)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"no room for hf://org/name.*HF_HUB_CACHE"):
        fetch_directory(pinned, FIELD)
    assert hub.sent_of(WEIGHTS) == 0


def test_fetch_offline_takes_what_was_fetched_before_and_asks_nobody(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    hub.publish("org/name", MODEL)
    hub.publish("org/other", MODEL)
    folder = fetch("hf://org/name")
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch("hf://org/name") == folder
    with pytest.raises(UserError, match=r"model\.path: hf://org/other is not .*HF_HUB_OFFLINE=1"):
        fetch("hf://org/other")
    assert hub.requests == []


def kill_at(
    process: list["subprocess.Popen[str]"], part: str
) -> Callable[[str, int], Fault | None]:
    """Return a rule that kills a process when its request arrives, and answers nothing."""

    def rule(request: str, times: int) -> Fault | None:
        if part not in request or times:
            return None
        process[0].kill()
        process[0].wait()
        return Fault(cut_after=0)

    return rule


def test_fetch_killed_in_the_middle_is_not_taken_for_whole_and_is_completed_later(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    hub.publish("org/name", MODEL)
    process: list[subprocess.Popen[str]] = []
    hub.fault = kill_at(process, "GET /large")
    process.append(start_fetch("hf://org/name", hub_environment(hub, tmp_path)))
    assert process[0].wait() != 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"only in part.*HF_HUB_OFFLINE"):
        fetch("hf://org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert names(fetch("hf://org/name")) == set(MODEL)


def test_fetch_by_several_processes_of_a_node_is_one(hub: HubServer, tmp_path: Path) -> None:
    hub.publish("org/name", MODEL)
    environment = hub_environment(hub, tmp_path)
    running = [start_fetch("hf://org/name", environment) for _ in range(2)]
    found = {process.communicate()[0] for process in running}
    assert len(found) == 1
    assert hub.sent_of(WEIGHTS) == len(WEIGHTS)
    hub.requests.clear()
    pinned = pin_directory("hf://org/name", FIELD)
    hub.requests.clear()
    assert fetch_elsewhere(pinned, environment) in next(iter(found))
    assert hub.requests == []
