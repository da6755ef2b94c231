"""Promise: of equal and of similar documents the first is kept, and the others are counted."""

import gzip
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from raytune_llama.data.build import duplicates_pass as deduplication
from raytune_llama.data.build.file_hashes import HASHES_NAME
from raytune_llama.data.config import DataConfig
from raytune_llama.data.filters.config import DuplicatesConfig, NearDuplicatesConfig
from raytune_llama.data.readers.config import SourceConfig
from raytune_llama.data.readers.rows import SourceError
from raytune_llama.data.store.manifest import SPLITS
from raytune_llama.data.store.token_store import TokenStore
from raytune_llama.storage.place import Place
from raytune_llama.tokenizer.loader import load_tokenizer
from tests.data.stores import build_store

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

BOTH = DuplicatesConfig(exact=True, near=NearDuplicatesConfig())


def write_corpus(folder: Path) -> dict[str, list[str]]:
    """Write three files, the first of more than one unit; return the documents that are new."""
    generator = random.Random(5)
    alphabet = "人民日报记者北京国家经济发展我们市场企业"

    def document() -> str:
        words = ("".join(generator.choices(alphabet, k=2)) for _ in range(60))
        return " ".join(words)

    def similar(text: str) -> str:
        return text[:90] + "新" + text[91:]

    first = [document() for _ in range(2600)]
    second = [document() for _ in range(40)]
    third = [document() for _ in range(40)]
    files = {
        # Repeated in its own unit, in the next unit of its file, and in other files.
        "a": [*first[:50], *first[:10], *first[50:], *first[:20]],
        "b": [*second, *(similar(text) for text in first[100:130]), *first[:5], ""],
        "c": [*third, *second[:7], *(similar(text) for text in second[:3])],
    }
    folder.mkdir()
    for name, lines in files.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    assert (folder / "a.txt").stat().st_size > 1 << 20
    return {"a": first, "b": second, "c": third}


def make_config(corpus: Path, store: Path | Place, **fields: Any) -> DataConfig:  # noqa: ANN401
    return DataConfig(
        sources=(SourceConfig(path=str(corpus)),),
        store_dir=str(store),
        **{"range_mib": 1, "duplicates": BOTH, "bos": False, **fields},
    )


def documents(store: TokenStore, tokenizer_dir: Path, split_name: Any = "train") -> list[str]:  # noqa: ANN401
    split = store.split(split_name)
    text = load_tokenizer(tokenizer_dir).decode(split.tokens(0, split.num_tokens).tolist())
    return str(text).split("</s>")[:-1]


def content(place: Place) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in place.files() if file.name != HASHES_NAME}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus")
    return tmp_path / "corpus"


@pytest.fixture(scope="module")
def undisturbed(
    ray_cluster: str, tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path
) -> tuple[TokenStore, dict[str, list[str]]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    kept = write_corpus(folder / "corpus")
    config = make_config(folder / "corpus", folder / "store", num_workers=1)
    return build_store(config, tokenizer_dir), kept


def test_prepare_data_keeps_the_first_of_its_duplicates_and_counts_the_others(
    undisturbed: tuple[TokenStore, dict[str, list[str]]], tokenizer_dir: Path
) -> None:
    store, kept = undisturbed
    assert documents(store, tokenizer_dir) == kept["a"] + kept["b"] + kept["c"]
    rows = store.manifest.rows
    assert rows.skipped == {"blank": 1, "exact_duplicate": 42, "near_duplicate": 33}
    assert rows.total == 2680 + 76
    assert store.manifest.inputs["duplicates"] == BOTH.fingerprint_inputs
    assert "exact duplicate" in (store.place / "report.html").read_bytes().decode()


def test_prepare_data_exact_only_keeps_similar_documents(
    corpus: Path, tmp_path: Path, tokenizer_dir: Path
) -> None:
    config = make_config(
        corpus,
        tmp_path / "store",
        duplicates=DuplicatesConfig(exact=True),
        validation_fraction=0.2,
        num_workers=2,
    )
    store = build_store(config, tokenizer_dir)
    assert store.manifest.rows.skipped == {"blank": 1, "exact_duplicate": 42}
    texts = [text for name in SPLITS for text in documents(store, tokenizer_dir, name)]
    assert max(Counter(texts).values()) == 1
    assert len(texts) == 2680 + 33


def test_prepare_data_stopped_between_the_passes_goes_on_to_the_same_bytes(
    corpus: Path,
    s3_path: Place,
    tokenizer_dir: Path,
    undisturbed: tuple[TokenStore, dict[str, list[str]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_config(corpus, s3_path / "store", num_workers=2)

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(deduplication, "find_duplicates", fail)
        with pytest.raises(KeyboardInterrupt):
            build_store(config, tokenizer_dir)
    (work,) = [folder for folder in s3_path.folders() if "partial" in folder.name]
    before = (work / "duplicates" / "signatures").files()
    assert len(before) == 3

    seen: list[dict[Place, Any]] = []
    find = deduplication.find_duplicates

    def watch(signatures: Place, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        seen.append(signatures.files())
        return find(signatures, *args, **kwargs)

    monkeypatch.setattr(deduplication, "find_duplicates", watch)
    store = build_store(config, tokenizer_dir)
    # Nothing was signed again: the files are of the same version.
    assert seen == [before]
    assert content(store.place) == content(undisturbed[0].place)
    assert s3_path.folders() == [s3_path / "store"]


def test_prepare_data_finished_units_follow_a_change_in_an_earlier_file(
    corpus: Path, tmp_path: Path, tokenizer_dir: Path
) -> None:
    good = (corpus / "c.txt").read_bytes()
    (corpus / "c.txt").write_bytes(good + b"\xff\n" * 80)
    config = make_config(corpus, tmp_path / "store", range_mib=1, num_workers=1)
    with pytest.raises(SourceError, match="max_bad_fraction"):
        build_store(config, tokenizer_dir)
    # All units are done now. What the other files repeat of this one is no repetition any more.
    first = (corpus / "a.txt").read_text().split("\n")
    (corpus / "a.txt").write_text("\n".join(first[130:]))
    (corpus / "c.txt").write_bytes(good)
    store = build_store(config, tokenizer_dir)
    fresh = build_store(make_config(corpus, tmp_path / "fresh"), tokenizer_dir)
    assert content(store.place) == content(fresh.place)
    again = set(first[:5])
    assert again <= set(documents(store, tokenizer_dir))


def test_prepare_data_broken_file_is_told_in_the_first_pass(
    corpus: Path, tmp_path: Path, tokenizer_dir: Path
) -> None:
    whole = gzip.compress((corpus / "a.txt").read_bytes())
    (corpus / "d.txt.gz").write_bytes(whole[:-30])
    with pytest.raises(SourceError, match=r"d\.txt\.gz"):
        build_store(make_config(corpus, tmp_path / "store"), tokenizer_dir)
    (work,) = tmp_path.glob("store.partial-*")
    assert not list((work / "units").iterdir())
    (corpus / "d.txt.gz").write_bytes(whole)
    store = build_store(make_config(corpus, tmp_path / "store"), tokenizer_dir)
    assert store.manifest.rows.skipped["exact_duplicate"] == 42 + 2630
