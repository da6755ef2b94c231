"""Promise: the store's bytes are the same whatever the workers, their timing or restarts."""

import json
import os
import re
import shutil
import signal
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from raytune_llama.config.settings import ConfigError
from raytune_llama.data.build import actors as workers
from raytune_llama.data.build import preparation as encode
from raytune_llama.data.build.file_hashes import HASHES_NAME
from raytune_llama.data.config import DataConfig
from raytune_llama.data.readers.config import SourceConfig
from raytune_llama.data.readers.rows import SourceError
from raytune_llama.data.store.manifest import SPLITS, StoreError
from raytune_llama.data.store.token_store import TokenStore
from raytune_llama.storage.place import Place
from raytune_llama.tokenizer.loader import load_tokenizer
from tests.data.stores import build_store

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


NUM_LINES = [31_000, 500, 800, 32_000]
"""Of four files: with ranges of 1 MiB the first and last are cut, the others share a unit."""


def write_corpus(folder: Path) -> Path:
    folder.mkdir()
    for number in (2, 0, 3, 1):  # their order on the disk is not that of their names
        lines = [f"file {number} line {line} 人民日报 </s>" for line in range(NUM_LINES[number])]
        lines[300:300] = ["", "the same text"]
        (folder / f"{number}.txt").write_text("\n".join(lines))
        with (folder / f"{number}.txt").open("ab") as file:
            file.write(b"\nbad \xff line\n" * (number == 3))
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus")


def make_config(corpus: Path, store: Path | Place, **fields: Any) -> DataConfig:  # noqa: ANN401
    return DataConfig(
        sources=(SourceConfig(path=str(corpus)),),
        store_dir=str(store),
        **{"validation_fraction": 0.2, "range_mib": 1, **fields},
    )


def content(store: TokenStore) -> dict[str, bytes]:
    """Return the files of a store, without what it remembers of its sources' times."""
    names = [path for path in store.place.path.iterdir() if path.name != HASHES_NAME]
    return {path.name: path.read_bytes() for path in names}


@pytest.fixture(scope="module")
def undisturbed(
    ray_cluster: str, tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path
) -> TokenStore:
    """The store of the same corpus, elsewhere, made by one worker without an incident."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = make_config(write_corpus(folder / "corpus"), folder / "store", num_workers=1)
    return build_store(config, tokenizer_dir)


@pytest.fixture
def expected(undisturbed: TokenStore) -> dict[str, bytes]:
    return content(undisturbed)


def test_prepare_data_in_object_storage_gives_the_same_bytes_after_a_failed_run(
    corpus: Path,
    s3_path: Place,
    tokenizer_dir: Path,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store_dir = s3_path / "store"
    config = make_config(corpus, store_dir)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(encode, "publish", fail)
        with pytest.raises(KeyboardInterrupt):
            build_store(config, tokenizer_dir)
    assert len(store_dir.files()) > 2
    store = build_store(config, tokenizer_dir)
    store.verify()
    files = [file for file in store_dir.files() if file.name != HASHES_NAME]
    assert {file.name: file.read_bytes() for file in files} == expected
    assert s3_path.folders() == [store_dir]


def test_prepare_data_where_other_things_are_in_object_storage_is_refused_and_keeps_them(
    corpus: Path, s3_path: Place, tokenizer_dir: Path
) -> None:
    (s3_path / "thesis.tex").write_bytes(b"x")
    config = make_config(corpus, s3_path)
    with pytest.raises(ConfigError, match="exists but is not a token store"):
        build_store(config, tokenizer_dir)
    assert list(s3_path.files(recursive=True)) == [s3_path / "thesis.tex"]


def test_prepare_data_two_workers_elsewhere_give_the_bytes_of_one(
    corpus: Path, tmp_path: Path, tokenizer_dir: Path, expected: dict[str, bytes]
) -> None:
    config = make_config(corpus, tmp_path / "store", num_workers=2)
    store = build_store(config, tokenizer_dir)
    assert len(expected) == 3 + 5 * 2  # manifest, quarantine, report; five units of two splits
    assert content(store) == expected
    assert not list(tmp_path.glob("*.partial-*"))
    assert not any(str(tmp_path.parent).encode() in data for data in expected.values())


def test_prepare_data_manifest_accounts_for_every_line(undisturbed: TokenStore) -> None:
    undisturbed.verify()
    rows = undisturbed.manifest.rows
    total = sum(NUM_LINES) + 4 * 2 + 1
    assert (rows.total, rows.skipped, rows.quarantined) == (
        total,
        {"blank": 4},
        {"invalid_bytes": 1},
    )
    splits = [undisturbed.split("train"), undisturbed.split("validation")]
    assert sum(split.num_documents for split in splits) == rows.documents == total - 5
    corpus = undisturbed.place.path.with_name("corpus")
    data = b"".join(file.read_bytes() for file in corpus.iterdir()).replace(b"bad \xff line", b"")
    assert sum(split.num_bytes for split in splits) == len(data.replace(b"\n", b""))
    (bad,) = (undisturbed.place.path / "quarantine.jsonl").read_text().splitlines()
    row = json.loads(bad)
    # The line is that of the file, though the row was found in its second range.
    assert (row["file"], row["line"]) == ("3.txt", NUM_LINES[3] + 3)
    assert row["offset"] == (corpus / "3.txt").stat().st_size - len(b"bad \xff line\n")


def test_prepare_data_other_ranges_give_the_same_documents(
    corpus: Path, tmp_path: Path, tokenizer_dir: Path, undisturbed: TokenStore
) -> None:
    store = build_store(make_config(corpus, tmp_path / "store", range_mib=2), tokenizer_dir)
    assert store.fingerprint == undisturbed.fingerprint
    assert store.manifest.rows == undisturbed.manifest.rows
    for name in SPLITS:
        mine, other = store.split(name), undisturbed.split(name)
        assert len(mine.manifest.shards) != len(other.manifest.shards)
        assert (mine.tokens(0, mine.num_tokens) == other.tokens(0, other.num_tokens)).all()
        starts = [one.document_starts(0, one.num_tokens) for one in (mine, other)]
        assert (starts[0] == starts[1]).all()


def test_prepare_data_stream_is_in_source_order(
    undisturbed: TokenStore, tokenizer_dir: Path
) -> None:
    split = undisturbed.split("train")
    text = str(load_tokenizer(tokenizer_dir).decode(split.tokens(0, split.num_tokens).tolist()))
    places = [tuple(map(int, found)) for found in re.findall(r"file (\d+) line (\d+)", text)]
    assert len(places) > 100
    assert places == sorted(places)


def test_prepare_data_same_text_in_many_files_is_on_one_side(undisturbed: TokenStore) -> None:
    sides = []
    for name in SPLITS:
        split = undisturbed.split(name)
        starts = [*split.document_starts(0, split.num_tokens).tolist(), split.num_tokens]
        sides.append([tuple(split.tokens(*pair).tolist()) for pair in pairwise(starts)])
    assert max(Counter(sides[0] + sides[1]).values()) == 4
    assert not set(sides[0]) & set(sides[1])


def test_prepare_data_killed_worker_gives_the_same_bytes(
    corpus: Path,
    tmp_path: Path,
    tokenizer_dir: Path,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A local class travels by value: the workers cannot import this module.
    class KillingEncoder(workers.EncodingActor):
        def __call__(self, batch: Any) -> Any:  # noqa: ANN401
            result = super().__call__(batch)
            marker = self._plan.work_dir.path / "killed-once"
            if not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return result

    monkeypatch.setattr(workers, "EncodingActor", KillingEncoder)
    config = make_config(corpus, tmp_path / "store", num_workers=1)
    assert content(build_store(config, tokenizer_dir)) == expected


def test_prepare_data_after_a_failed_run_keeps_its_work_and_gives_the_same_bytes(
    corpus: Path, tmp_path: Path, tokenizer_dir: Path, expected: dict[str, bytes]
) -> None:
    good = (corpus / "3.txt").read_bytes()
    (corpus / "3.txt").write_bytes(good + b"\xff\n" * 80)
    config = make_config(corpus, tmp_path / "store", num_workers=1)
    with pytest.raises(SourceError) as caught:
        build_store(config, tokenizer_dir)
    message = str(caught.value)
    assert message.startswith("data.max_bad_fraction: 81 of 64389 rows are unusable (81 invalid")
    listed = message.split("\n  ")[1:]
    assert len(listed) == 10
    assert listed[1].startswith(f"3.txt: line {NUM_LINES[3] + 4}, byte {len(good)}: invalid_bytes")
    assert not (tmp_path / "store").exists()
    (work,) = tmp_path.glob("store.partial-*")
    assert len((work / "store" / "quarantine.jsonl").read_text().splitlines()) == 81
    done = work / "store" / "train-00000.arrow"
    before = done.stat().st_ino
    # What a killed worker leaves behind, and a torn shard.
    (work / "store" / ".train-00003.arrow.0.tmp").write_bytes(b"half")
    torn = work / "store" / "train-00001.arrow"
    torn.write_bytes(torn.read_bytes()[:100])

    (corpus / "3.txt").write_bytes(good)
    store = build_store(config, tokenizer_dir)
    assert content(store) == expected
    assert (store.place.path / "train-00000.arrow").stat().st_ino == before


def test_prepare_data_crashing_file_is_refused_by_name(
    corpus: Path, tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class CrashingEncoder(workers.EncodingActor):
        def __call__(self, batch: Any) -> Any:  # noqa: ANN401
            if batch.column("unit")[0].as_py() == 2:
                # Where the tokenizer's native code would crash: after the attempt was noted.
                crash: Any = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
                reader: Any = self._reader
                reader._encoder.encode = crash
            return super().__call__(batch)

    monkeypatch.setattr(workers, "EncodingActor", CrashingEncoder)
    with pytest.raises(
        SourceError, match=r"1\.txt and 1 more files: encoding it crashed the process 3 times"
    ):
        build_store(make_config(corpus, tmp_path / "store", num_workers=1), tokenizer_dir)


def test_prepare_data_complete_store_is_reused(
    corpus: Path, tmp_path: Path, tokenizer_dir: Path, undisturbed: TokenStore
) -> None:
    copy = shutil.copytree(undisturbed.place.path, tmp_path / "store")
    inode = (copy / "manifest.json").stat().st_ino
    store = build_store(make_config(corpus, copy), tokenizer_dir)
    assert store.fingerprint == undisturbed.fingerprint
    assert (copy / "manifest.json").stat().st_ino == inode
    # The second time no source file is read: their sizes and times are those of the first.
    seen = json.loads((copy / HASHES_NAME).read_text())
    for file in seen.values():
        file["hash"] = "blake3:of another file"
    (copy / HASHES_NAME).write_text(json.dumps(seen))
    with pytest.raises(StoreError, match=r"sources\.0: 0\.txt: its content changed"):
        build_store(make_config(corpus, copy), tokenizer_dir)


def test_prepare_data_stale_store_is_refused_naming_the_fields(
    corpus: Path, tmp_path: Path, tokenizer_dir: Path, undisturbed: TokenStore
) -> None:
    copy = shutil.copytree(undisturbed.place.path, tmp_path / "store")
    (corpus / "1.txt").write_text("changed")
    with pytest.raises(StoreError) as caught:
        build_store(make_config(corpus, copy, eos=False), tokenizer_dir)
    assert "data.eos: id after each document: 1 -> None" in str(caught.value)
    assert "data.sources.0: 1.txt: its content changed" in str(caught.value)
    assert "0.txt" not in str(caught.value)
    assert content(TokenStore.open(copy)) == content(undisturbed)


def test_prepare_data_store_of_the_former_default_opens_by_a_config_that_names_no_bos(
    corpus: Path, tmp_path: Path, tokenizer_dir: Path
) -> None:
    store = build_store(make_config(corpus, tmp_path / "store", bos=True), tokenizer_dir)
    assert store.split("train").tokens(0, 1)[0] == 0
    again = build_store(make_config(corpus, tmp_path / "store"), tokenizer_dir)
    assert again.fingerprint == store.fingerprint
    # A new store begins as the tokenizer does, which puts nothing before a text.
    new = build_store(make_config(corpus, tmp_path / "new"), tokenizer_dir)
    assert new.manifest.inputs["tokenizer"]["bos_id"] is None
    assert new.split("train").tokens(0, 1)[0] != 0
    with pytest.raises(StoreError, match=r"data\.bos: id before each document: None -> 0"):
        build_store(make_config(corpus, tmp_path / "new", bos=True), tokenizer_dir)


def test_prepare_data_other_tokenizer_settings_make_the_store_stale(
    corpus: Path, tmp_path: Path, tokenizer_dir: Path, undisturbed: TokenStore
) -> None:
    # The tokenizer's own files stay as they are, and yet each text gets an id more.
    changed = shutil.copytree(tokenizer_dir, tmp_path / "tokenizer")
    settings = json.loads((changed / "tokenizer_config.json").read_text())
    settings.update(tokenizer_class="GPT2Tokenizer", add_prefix_space=True)
    (changed / "tokenizer_config.json").write_text(json.dumps(settings))
    copy = shutil.copytree(undisturbed.place.path, tmp_path / "store")
    with pytest.raises(StoreError, match=r"tokenizer: its content changed"):
        build_store(make_config(corpus, copy), changed)


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_prepare_data_empty_split_is_refused(
    corpus: Path, tmp_path: Path, tokenizer_dir: Path, fraction: float
) -> None:
    config = make_config(corpus, tmp_path / "store", validation_fraction=fraction)
    with pytest.raises(SourceError, match=r"^data\.validation_fraction: "):
        build_store(config, tokenizer_dir)
    assert not (tmp_path / "store").exists()


def test_prepare_data_blank_corpus_is_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("\n \n")
    with pytest.raises(SourceError, match=r"no document has any text .*2 blank"):
        build_store(make_config(tmp_path / "corpus", tmp_path / "store"), tokenizer_dir)
