"""Promise: files and directories appear whole or not at all."""

from pathlib import Path

import pytest

from raytune_llama.storage.files import (
    publish_directory,
    read_json,
    sha256_file,
    write_bytes_atomic,
    write_json_atomic,
)


class _StopError(Exception):
    pass


def test_sha256_file_equals_known_digest(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "file") == expected


def test_write_json_equal_values_give_equal_bytes(tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "a", {"x": 1, "y": ["é"]})
    write_json_atomic(tmp_path / "b", {"y": ["é"], "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert read_json(tmp_path / "a") == {"x": 1, "y": ["é"]}


def test_write_json_not_a_number_is_refused_and_keeps_the_old_file(tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "a", 1)
    with pytest.raises(ValueError, match="JSON"):
        write_json_atomic(tmp_path / "a", float("nan"))
    assert read_json(tmp_path / "a") == 1


def test_write_bytes_failed_rename_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "target" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="target"):
        write_bytes_atomic(tmp_path / "target", b"data")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_read_json_damaged_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "half.json").write_text('{"a": ')
    with pytest.raises(ValueError, match=r"half\.json"):
        read_json(tmp_path / "half.json")


def test_publish_directory_success_shows_all_files_at_once(tmp_path: Path) -> None:
    target = tmp_path / "below" / "target"
    with publish_directory(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
        assert not target.exists()
    assert (target / "sub" / "file").read_text() == "x"
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_publish_directory_exception_leaves_nothing(tmp_path: Path) -> None:
    def publish() -> None:
        with publish_directory(tmp_path / "target") as folder:
            (folder / "file").write_text("x")
            raise _StopError

    with pytest.raises(_StopError):
        publish()
    assert list(tmp_path.iterdir()) == []


def test_publish_directory_existing_target_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    with (
        pytest.raises(FileExistsError, match="target exists"),
        publish_directory(tmp_path / "target"),
    ):
        pytest.fail("the block must not run")


def test_publish_directory_target_made_meanwhile_is_kept(tmp_path: Path) -> None:
    # An empty folder is what rename() would silently replace.
    with (
        pytest.raises(FileExistsError, match="target exists"),
        publish_directory(tmp_path / "target"),
    ):
        (tmp_path / "target").mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
