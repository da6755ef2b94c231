import logging
import stat
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from raytune_llama.config.settings import ConfigError
from raytune_llama.serve.http import keys as keys_module
from raytune_llama.serve.http.keys import (
    ENVIRONMENT_NAME,
    ApiKeys,
    WatchedKeys,
    append_hash,
    keys_from_environment,
    load_keys,
    make_key,
    read_keys,
)
from tests.serve.many_clients import wait_until


def test_key_that_was_made_is_let_in_and_no_other(tmp_path: Path) -> None:
    (key, line), (other, _) = make_key(), make_key()
    (tmp_path / "keys").write_text(f"# first\n\n{line.upper()}  # alice\n")
    keys = read_keys(tmp_path / "keys")
    assert keys.find(key)
    assert keys.find(other) is None
    assert keys.find("") is None
    assert keys.find(line) is None  # the hash is no key
    assert key not in repr(keys)


def test_no_keys_let_nobody_in_by_name() -> None:
    assert ApiKeys().find("anything") is None


@pytest.mark.parametrize("text", ["", "# nobody\n", "sk-secret\n", "abcd\n", "g" * 64])
def test_file_without_hashes_is_refused_and_never_shown(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_keys(tmp_path / "keys")
    assert "sk-secret" not in str(caught.value)


def test_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"keys_file: .*nowhere"):
        read_keys(tmp_path / "nowhere")


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WatchedKeys]:
    """Keys of the file `keys`, which has one, and another key."""
    monkeypatch.setattr(keys_module, "POLL_SECONDS", 0.02)
    (tmp_path / "keys").write_text(FIRST[1])
    accepted = WatchedKeys(tmp_path / "keys", ApiKeys((bytes.fromhex(OTHER[1]),)))
    yield accepted
    accepted.close()


FIRST, SECOND, OTHER = make_key(), make_key(), make_key()
wait_until_it_is_so = partial(wait_until, seconds=60, what="the keys have changed")


def test_keys_that_are_added_to_a_file_or_deleted_count_without_a_restart(
    tmp_path: Path, watched: WatchedKeys
) -> None:
    assert watched.find(FIRST[0])
    assert not watched.find(SECOND[0])
    append_hash(tmp_path / "keys", SECOND[1])
    wait_until_it_is_so(lambda: watched.find(SECOND[0]) is not None)
    assert watched.find(FIRST[0])
    (tmp_path / "new").write_text(SECOND[1])
    (tmp_path / "new").replace(tmp_path / "keys")
    wait_until_it_is_so(lambda: not watched.find(FIRST[0]))
    (tmp_path / "keys").write_text("# nobody\n")
    wait_until_it_is_so(lambda: not watched.find(SECOND[0]))
    assert watched.is_required
    assert watched.find(OTHER[0])


@pytest.mark.parametrize("text", ["sk-secret\n", None], ids=["no hash", "deleted"])
def test_keys_stay_accepted_while_their_file_cannot_be_read(
    tmp_path: Path, watched: WatchedKeys, caplog: pytest.LogCaptureFixture, text: str | None
) -> None:
    caplog.set_level(logging.ERROR)
    if text is None:
        (tmp_path / "keys").unlink()
    else:
        (tmp_path / "keys").write_text(text)
    wait_until_it_is_so(lambda: "stay accepted" in caplog.text)
    assert "sk-secret" not in caplog.text
    assert watched.find(FIRST[0])
    (tmp_path / "keys").write_text(SECOND[1])
    wait_until_it_is_so(lambda: watched.find(SECOND[0]) is not None)
    assert not watched.find(FIRST[0])


def test_keys_of_file_and_environment_add_up(tmp_path: Path) -> None:
    (one, first), (two, second), (three, third) = make_key(), make_key(), make_key()
    (tmp_path / "keys").write_text(first + "\n")
    environment = {ENVIRONMENT_NAME: f" {second},\n{third.upper()} "}
    keys = load_keys(tmp_path / "keys", environment)
    assert all(keys.find(key) for key in (one, two, three))
    assert load_keys(None, environment).find(one) is None
    assert load_keys(None, {}) == ApiKeys()


@pytest.mark.parametrize("text", ["", " , ", "sk-secret", "00, sk-secret"])
def test_environment_without_hashes_is_refused_and_never_shown(text: str) -> None:
    with pytest.raises(ConfigError, match=ENVIRONMENT_NAME) as caught:
        keys_from_environment({ENVIRONMENT_NAME: text})
    assert "sk-secret" not in str(caught.value)


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "jobs/make_key.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_keys_that_the_command_makes_are_let_in(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# those who may")  # no end of the line
    file.chmod(0o644)
    told = [make(str(file), name) for name in ("alice", "bob\n# x")]
    keys = [one.stdout.split()[0] for one in told]
    assert len(set(keys)) == 2
    found = read_keys(file)
    assert len(found.hashes) == 2
    assert all(found.find(key) for key in keys)
    text = file.read_text()
    assert "# alice" in text
    assert not [key for key in keys if key in text]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_command_adds_nothing_to_a_file_that_is_none_of_hashes(tmp_path: Path) -> None:
    file = tmp_path / "notes"
    file.write_text("buy milk\n")
    told = make(str(file))
    assert told.returncode == 2
    assert "notes:1 is not a SHA-256 hash" in told.stderr
    assert file.read_text() == "buy milk\n"
