"""Promise: a place is the same on a disk and in object storage, and is never met half written."""

import os
import pickle
import re
import threading
from http import HTTPStatus
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_llama.storage import buckets
from raytune_llama.storage import place as storage
from raytune_llama.storage.hashes import hash_bytes
from raytune_llama.storage.place import Place, check_place, check_run_dir, local_path
from tests.faulty_s3 import FaultyServer

NAMES = ["plain", "a b", "a#b", "a%20b", "a+b&c=d", "[x]*", "日报", "sub/deep/file"]
MIB = 2**20


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A folder that does not exist yet, on the disk and in object storage."""
    if request.param == "local":
        return Place.local(tmp_path / "folder")
    return request.getfixturevalue("s3_path")


def relative(folder: Place, places: object) -> list[str]:
    assert isinstance(places, dict | list)
    return [place.relative_to(folder) for place in places]


def test_local_path_relative_becomes_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert local_path("a/b", "field") == tmp_path / "a/b"


@pytest.mark.parametrize("text", ["s3://bucket/key", "gs://bucket", "file:///tmp/x", ""])
def test_local_path_unsupported_is_refused_with_its_field(text: str) -> None:
    with pytest.raises(ValueError, match=r"^data\.store_dir: "):
        local_path(text, "data.store_dir")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty path"),
        (" ", "empty path"),
        ("file:///tmp/x", "s3://bucket/key"),
        ("http://host/x", "s3://bucket/key"),
        ("s3://", "no bucket"),
        ("s3:///key", "no bucket"),
        ("s3://name:secret@bucket/key", "credentials"),
        ("s3://bucket/key?access_key=a&secret_key=b", "access_key, secret_key"),
        ("s3://bucket/key?region", "region without a value"),
        ("gs://bucket/key?region=eu", "endpoint_override=..."),
    ],
)
def test_parse_what_is_no_place_is_refused_with_field_and_remedy(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"^data\\.store_dir: .*{re.escape(said)}") as caught:
        Place.parse(text, "data.store_dir")
    assert "secret@" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a/../b/", "{here}/b"),
        ("~/x", "/home/someone/x"),
        ("/a/b", "/a/b"),
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("s3://bucket/a#b%20c", "s3://bucket/a#b%20c"),
        ("s3://bucket/a?region=eu-west-1", "s3://bucket/a?region=eu-west-1"),
        ("gs://bucket/a?endpoint_override=host:1", "gs://bucket/a?endpoint_override=host:1"),
    ],
)
def test_parse_is_shown_as_a_user_would_write_it(
    text: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    place = Place.parse(text, "field")
    assert str(place) == shown.format(here=tmp_path)
    assert Place.parse(str(place), "field") == place
    assert pickle.loads(pickle.dumps(place)) == place  # noqa: S301 - our own bytes


@given(
    st.sampled_from(["/top", "s3://bucket", "gs://bucket/a?endpoint_override=h:1"]),
    st.lists(st.text("ab.#%日 -", min_size=1).filter(lambda part: part not in {".", ".."})),
)
def test_place_parts_are_those_that_it_was_made_of(root: str, parts: list[str]) -> None:
    start = Place.parse(root, "field")
    place = start
    for part in parts:
        below = place / part
        assert (below.name, below.parent) == (part, place)
        assert below.is_below(place)
        assert below.is_below(below)
        assert not place.is_below(below)
        assert below.with_name("x") == place / "x"
        place = below
    if parts:
        assert place.relative_to(start) == "/".join(parts)


def test_place_below_another_server_is_not_below() -> None:
    ours = Place.parse("s3://bucket/a?endpoint_override=one:1", "field")
    other = Place.parse("s3://bucket/a?endpoint_override=two:2", "field")
    assert not (other / "b").is_below(ours)
    assert not Place.parse("s3://bucket/ab", "field").is_below(
        Place.parse("s3://bucket/a", "field")
    )


def test_place_of_a_bucket_is_its_own_parent() -> None:
    bucket = Place.parse("s3://bucket", "field")
    assert bucket.parent == bucket
    assert Place.parse("/", "field").parent == Place.parse("/", "field")


def test_files_written_are_listed_and_read_under_any_name(folder: Place) -> None:
    assert (folder.exists(), folder.files(), folder.folders()) == (False, {}, [])
    for name in NAMES:
        (folder / name).write_bytes(name.encode())
    assert relative(folder, folder.files(recursive=True)) == sorted(NAMES)
    assert relative(folder, folder.files()) == sorted(set(NAMES) - {"sub/deep/file"})
    assert relative(folder, folder.folders()) == ["sub"]
    for name in NAMES:
        place = folder / name
        assert place.read_bytes() == name.encode()
        status = place.status()
        assert status is not None
        assert status.num_bytes == len(name.encode())
        assert status == folder.files(recursive=True)[place]
    assert (folder.exists(), folder.is_dir(), folder.status()) == (True, True, None)
    assert not (folder / "plain").is_dir()


def test_files_of_a_folder_that_others_write_in_are_listed(tmp_path: Path) -> None:
    folder = Place.local(tmp_path)
    over = threading.Event()

    def write() -> None:
        while not over.is_set():
            (folder / "changing").write_bytes(b"1")

    thread = threading.Thread(target=write)
    thread.start()
    try:
        # Its temporary names come and go.
        for _ in range(5000):
            assert len(folder.files()) <= 2
    finally:
        over.set()
        thread.join()


def test_folders_of_one_that_appears_and_disappears_are_listed(tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    ended = threading.Event()

    def churn() -> None:
        while not ended.is_set():
            parent.mkdir()
            parent.rmdir()

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(20_000):
            assert Place.local(parent).folders() == []
    finally:
        ended.set()
        thread.join()


def test_files_of_a_local_link_to_a_folder_are_left_out(tmp_path: Path) -> None:
    folder = Place.local(tmp_path / "folder")
    (folder / "real/file").write_bytes(b"x")
    (folder.path / "link").symlink_to(folder.path / "real")
    assert relative(folder, folder.files(recursive=True)) == ["real/file"]


def test_open_reads_a_range(folder: Place) -> None:
    data = os.urandom(100_000)
    (folder / "file").write_bytes(data)
    with (folder / "file").open() as file:
        file.seek(70_001)
        assert file.read(10) == data[70_001:70_011]
        file.seek(5)
        assert file.read() == data[5:]
    with pytest.raises(FileNotFoundError):
        (folder / "other").read_bytes()


def test_write_again_replaces_and_changes_the_version(folder: Place) -> None:
    file = folder / "file"
    file.write_bytes(b"old, and longer")
    before = file.status()
    file.write_bytes(b"new")
    assert file.read_bytes() == b"new"
    assert file.status() != before
    assert relative(folder, folder.files()) == ["file"]


def test_status_of_a_local_file_changed_in_place_differs(tmp_path: Path) -> None:
    file = Place.local(tmp_path / "file")
    file.write_bytes(b"one")
    before, stat = file.status(), file.path.stat()
    # Another content of the same size, time and inode: only the change time tells.
    file.path.write_bytes(b"two")
    os.utime(file.path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.status() != before


def test_json_is_read_as_written_and_not_a_number_is_refused(folder: Place) -> None:
    (folder / "a.json").write_json({"x": [1, "é"]})
    assert (folder / "a.json").read_json() == {"x": [1, "é"]}
    with pytest.raises(ValueError, match="JSON"):
        (folder / "a.json").write_json(float("nan"))
    assert (folder / "a.json").read_json() == {"x": [1, "é"]}
    (folder / "half.json").write_bytes(b'{"a": ')
    with pytest.raises(ValueError, match=re.escape(str(folder / "half.json"))):
        (folder / "half.json").read_json()


def test_delete_takes_a_file_or_a_whole_folder_and_leaves_the_rest(folder: Place) -> None:
    for name in ("a/one", "a/deep/two", "ab/three", "b"):
        (folder / name).write_bytes(b"x")
    (folder / "a").delete()
    assert relative(folder, folder.files(recursive=True)) == ["ab/three", "b"]
    assert not (folder / "a").exists()
    (folder / "b").delete()
    (folder / "b").delete()
    assert relative(folder, folder.files(recursive=True)) == ["ab/three"]


def test_delete_of_a_local_link_leaves_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    Place.local(tmp_path / "link").delete()
    assert (tmp_path / "real/file").read_text() == "x"
    assert not (tmp_path / "link").is_symlink()


def test_delete_empty_takes_only_a_folder_without_anything(folder: Place) -> None:
    (folder / "a/file").write_bytes(b"x")
    (folder / "a").delete_empty()
    folder.delete_empty()
    assert (folder / "a/file").read_bytes() == b"x"
    (folder / "a/file").delete()
    (folder / "a").delete_empty()
    assert not (folder / "a").exists()
    (folder / "never").delete_empty()


@pytest.mark.parametrize("server_copies", [True, False])
def test_move_gives_a_folder_another_name_and_replaces_what_has_it(
    folder: Place, monkeypatch: pytest.MonkeyPatch, *, server_copies: bool
) -> None:
    if not server_copies:
        monkeypatch.setattr(storage, "_SERVER_COPY_BYTES", 0)
    for name in ("a/manifest", "a/deep/shard", "b/old"):
        (folder / name).write_bytes(name.encode())
    (folder / "a").move(folder / "b", first="manifest")
    assert relative(folder, folder.files(recursive=True)) == ["b/deep/shard", "b/manifest"]
    assert (folder / "b/deep/shard").read_bytes() == b"a/deep/shard"
    assert not (folder / "a").exists()


def test_move_killed_after_the_first_deletion_leaves_no_folder_to_trust(
    faulty_s3: FaultyServer, s3_path: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "NUM_ATTEMPTS", 1)
    folder = faulty_s3.front_of(s3_path)
    for name in ("a/manifest", "a/another", "a/shard"):
        (folder / name).write_bytes(b"x")
    # Folders are deleted by a POST of many keys.
    faulty_s3.fault = lambda request, _: (
        HTTPStatus.FORBIDDEN if request.startswith("POST /bucket?delete") else None
    )
    with pytest.raises(OSError, match="DeleteObjects"):
        (folder / "a").move(folder / "b", first="manifest")
    assert relative(folder, (folder / "a").files()) == ["a/another", "a/shard"]
    assert relative(folder, (folder / "b").files()) == ["b/another", "b/manifest", "b/shard"]


@pytest.mark.parametrize("num_bytes", [0, 1, 12 * MIB])
def test_upload_and_download_copy_every_byte(folder: Place, tmp_path: Path, num_bytes: int) -> None:
    data = os.urandom(num_bytes)
    (tmp_path / "source").write_bytes(data)
    (folder / "deep/file").upload(tmp_path / "source")
    assert (folder / "deep/file").read_bytes() == data
    assert (folder / "deep/file").hash() == hash_bytes(data)
    (folder / "deep/file").download(tmp_path / "copy", wanted=hash_bytes(data))
    assert (tmp_path / "copy").read_bytes() == data


def test_download_of_other_bytes_is_refused_and_leaves_nothing(
    folder: Place, tmp_path: Path
) -> None:
    (folder / "file").write_bytes(b"x")
    (tmp_path / "here").mkdir()
    with pytest.raises(ValueError, match="its hash is BLAKE3"):
        (folder / "file").download(tmp_path / "here/copy", wanted="blake3:" + "0" * 64)
    with pytest.raises(FileNotFoundError):
        (folder / "other").download(tmp_path / "here/copy")
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize("source", ["no_such_file", "."])
def test_upload_of_what_cannot_be_read_leaves_the_old_file(
    folder: Place, tmp_path: Path, source: str
) -> None:
    (folder / "file").write_bytes(b"old")
    with pytest.raises(OSError, match=r"\w"):
        (folder / "file").upload(tmp_path / source)
    assert (folder / "file").read_bytes() == b"old"
    assert relative(folder, folder.files()) == ["file"]


def test_read_that_is_refused_names_the_file(
    faulty_s3: FaultyServer, s3_path: Place, tmp_path: Path
) -> None:
    file = faulty_s3.front_of(s3_path) / "file"
    file.write_bytes(b"x")
    faulty_s3.fault = lambda request, _: HTTPStatus.FORBIDDEN if request.startswith("GET") else None
    for read in (file.read_bytes, file.hash, lambda: file.download(tmp_path / "copy")):
        with pytest.raises(OSError, match=re.escape(str(file))):
            read()


def test_check_place_that_can_be_used_has_no_problem(folder: Place) -> None:
    assert check_place(folder, "run_dir") is None
    (folder / "file").write_bytes(b"x")
    assert check_place(folder, "run_dir") is None


def test_check_place_without_bucket_says_so(s3: Place) -> None:
    missing = Place(s3.scheme, "no-such-bucket/run", s3.options)
    problem = check_place(missing, "run_dir")
    assert problem is not None
    assert problem.startswith(f"run_dir: {missing}: there is no bucket no-such-bucket; create it")


def test_check_place_with_wrong_credentials_names_place_and_remedy(
    faulty_s3: FaultyServer, s3_path: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0)
    place = faulty_s3.front_of(s3_path)
    problem = check_place(place, "run_dir")
    assert problem is not None
    assert problem.startswith(f"run_dir: {place} cannot be reached (")
    assert "credentials" in problem
    assert faulty_s3.requests


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_check_place_that_does_not_answer_names_place_and_remedy(
    monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.setattr(buckets, "NUM_ATTEMPTS", 1)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/no/such/file")
    options = "endpoint_override=127.0.0.1:1&scheme=http"
    place = Place.parse(f"{scheme}://bucket/run?{options}", "run_dir")
    problem = check_place(place, "run_dir")
    assert problem is not None
    assert problem.startswith(f"run_dir: {place} cannot be reached (")
    assert "check the endpoint" in problem


@pytest.mark.parametrize(
    ("run_dir", "is_kept"),
    [("runs/a", False), ("./a", False), ("/runs/a", True), ("~/a", True), ("s3://bucket/a", True)],
)
def test_run_dir_of_a_submitted_job_has_to_outlive_it(
    run_dir: str,
    is_kept: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert check_run_dir(run_dir) == []
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert (check_run_dir(run_dir) == []) == is_kept
