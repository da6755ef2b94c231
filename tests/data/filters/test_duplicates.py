"""Promise: of duplicates the first is kept, whatever the units, workers, timing and restarts."""

import contextlib
import random
import string
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_llama.data.filters.config import DuplicatesConfig, NearDuplicatesConfig
from raytune_llama.data.filters.duplicate_steps import join_pairs
from raytune_llama.data.filters.duplicates import (
    DuplicateCounts,
    ShuffleSizes,
    TaskRunner,
    dropped_file,
    find_duplicates_with,
    read_dropped,
)
from raytune_llama.data.filters.signatures import (
    compute_signatures,
    signature_file,
    write_signatures,
)
from raytune_llama.data.store.manifest import StoreError
from raytune_llama.storage.place import Place

EXACT = DuplicatesConfig(exact=True)
SMALL = ShuffleSizes(chunk_batches=1, partition_rows=20)


def run_here(
    name: str, run: Callable[[int], Mapping[str, int]], num_tasks: int, attempts: Place
) -> Counter[str]:
    counts: Counter[str] = Counter()
    for number in range(num_tasks):
        counts.update(run(number))
    return counts


def run_backwards(
    name: str, run: Callable[[int], Mapping[str, int]], num_tasks: int, attempts: Place
) -> Counter[str]:
    return run_here(name, lambda number: run(num_tasks - 1 - number), num_tasks, attempts)


def write_units(
    folder: Path, units: Sequence[Sequence[str]], config: DuplicatesConfig, batch_documents: int = 2
) -> Place:
    place = Place.local(folder)
    for number, texts in enumerate(units):
        write_signatures(place, number, [texts], config, batch_documents=batch_documents)
    return place


def find(
    folder: Path,
    units: Sequence[Sequence[str]],
    config: DuplicatesConfig,
    *,
    run: TaskRunner = run_here,
    sizes: ShuffleSizes = SMALL,
    batch_documents: int = 2,
) -> tuple[list[str | None], DuplicateCounts]:
    """Return the reason of every document, all units in a row."""
    written = write_units(folder / "signatures", units, config, batch_documents)
    dropped = Place.local(folder / "dropped")
    counts = find_duplicates_with(run, written, len(units), config, dropped, sizes=sizes)
    return reasons_of(dropped, units), counts


def reasons_of(dropped: Place, units: Sequence[Sequence[str]]) -> list[str | None]:
    reasons: list[str | None] = []
    for number, texts in enumerate(units):
        marks = read_dropped(dropped, number)
        reasons += [marks.reason(ordinal) for ordinal in range(len(texts))]
        assert marks.reason(len(texts)) is None
    return reasons


def expected_reasons(texts: Sequence[str], config: DuplicatesConfig) -> list[str | None]:
    """Compare every pair of documents."""
    bands = (
        compute_signatures(texts, config).column("bands").to_pylist()
        if config.near
        else [[]] * len(texts)
    )
    group = list(range(len(texts)))
    for later in range(len(texts)):
        for earlier in range(later):
            is_same = config.exact and texts[later] == texts[earlier]
            if is_same or any(map(int.__eq__, bands[later], bands[earlier])):
                joined_group = {group[later], group[earlier]}
                group = [min(joined_group) if one in joined_group else one for one in group]
    return [
        "exact_duplicate"
        if config.exact and text in texts[:number]
        else "near_duplicate"
        if group[number] != number
        else None
        for number, text in enumerate(texts)
    ]


@pytest.fixture(scope="module")
def memory_dir() -> Iterator[Path]:
    """A folder in memory: every file is synced, and a disk takes milliseconds for each."""
    shared = Path("/dev/shm")  # noqa: S108 - a folder below it, of a name of its own
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as name:
        yield Path(name)


@st.composite
def corpora(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> tuple[list[str], list[list[str]]]:
    """Documents, and the same documents in units."""
    documents = draw(st.lists(texts, max_size=16))
    cuts = sorted(draw(st.lists(st.integers(0, len(documents)), max_size=4)))
    bounds = pairwise([0, *cuts, len(documents)])
    return documents, [documents[start:stop] for start, stop in bounds]


@dataclass(frozen=True)
class Setting:
    """What must not have an influence, and what is looked for."""

    config: DuplicatesConfig
    sizes: ShuffleSizes
    run: TaskRunner
    batch_documents: int


# One row of one word a band: similar pairs and long chains abound.
LOOSE = NearDuplicatesConfig(shingle_words=1, bands=2, rows=1)
WORDS = st.text(st.sampled_from(string.ascii_lowercase[:12]), min_size=1, max_size=2)
SETTINGS = st.builds(
    Setting,
    config=st.sampled_from(
        [EXACT, DuplicatesConfig(near=LOOSE), DuplicatesConfig(exact=True, near=LOOSE)]
    ),
    sizes=st.builds(
        ShuffleSizes, chunk_batches=st.integers(1, 4), partition_rows=st.sampled_from([5, 1000])
    ),
    run=st.sampled_from([run_here, run_backwards]),
    batch_documents=st.integers(1, 5),
)


@given(corpora(st.lists(WORDS, max_size=3).map(" ".join)), SETTINGS)
def test_find_duplicates_equals_comparing_all_pairs(
    memory_dir: Path, corpus: tuple[list[str], list[list[str]]], setting: Setting
) -> None:
    documents, units = corpus
    with tempfile.TemporaryDirectory(dir=memory_dir) as name:
        folder = Path(name)
        reasons, counts = find(
            folder,
            units,
            setting.config,
            run=setting.run,
            sizes=setting.sizes,
            batch_documents=setting.batch_documents,
        )
        names = {path.name for path in (folder / "dropped").iterdir()}
    assert reasons == expected_reasons(documents, setting.config)
    assert counts.documents == len(documents)
    assert counts.dropped == {
        reason: reasons.count(reason) for reason in ("exact_duplicate", "near_duplicate")
    }
    # Nothing is left but the result.
    assert names == {"manifest.json", *(f"{number:05d}.arrow" for number in range(len(units)))}


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=60))
def test_joined_ties_every_document_to_the_first_of_its_group(
    edges: list[tuple[int, int]],
) -> None:
    edges = [edge for edge in edges if edge[0] != edge[1]]
    group = list(range(31))
    for edge in edges:
        groups = {group[edge[0]], group[edge[1]]}
        group = [min(groups) if one in groups else one for one in group]
    later = np.array([max(edge) for edge in edges], dtype=np.uint64)
    earlier = np.array([min(edge) for edge in edges], dtype=np.uint64)
    found = [one.tolist() for one in join_pairs(later, earlier)]
    wanted = [(node, first) for node, first in enumerate(group) if node != first]
    assert list(zip(*found, strict=True)) == wanted


def chinese_article(number: int) -> str:
    generator = random.Random(number)
    return "".join(chr(0x4E00 + generator.randrange(3000)) for _ in range(600))


def changed(text: str, share: float) -> str:
    """Replace a share of the characters, spread evenly."""
    step = round(1 / share)
    return "".join("变" if place % step == step - 1 else one for place, one in enumerate(text))


def test_find_duplicates_near_ones_by_share_of_changed_characters(tmp_path: Path) -> None:
    """By the formula, 0.7 % changed are found but once in 10**5 times, 20 % once in 10**4."""
    articles = [chinese_article(number) for number in range(40)]
    units = [
        articles,
        [changed(text, 0.007) for text in articles[:20]]
        + [text + "。\n" for text in articles[20:]],
        [changed(text, 0.2) for text in articles],
    ]
    config = DuplicatesConfig(exact=True, near=NearDuplicatesConfig())
    reasons, _ = find(tmp_path, units, config, sizes=ShuffleSizes(), batch_documents=16)
    assert reasons == [None] * 40 + ["near_duplicate"] * 40 + [None] * 40


def test_find_duplicates_chain_keeps_only_its_first(memory_dir: Path) -> None:
    """Each document is like two others, and they come in any order, each in a chunk of its own."""
    words = [chr(0x4E00 + number) for number in range(900)]
    units = [["".join(words[start : start + 40])] for start in range(0, 800, 20)]
    random.Random(0).shuffle(units)
    config = DuplicatesConfig(near=NearDuplicatesConfig(shingle_words=1, bands=30, rows=1))
    # Few pairs meet in a partition: that they belong together is found out in rounds.
    sizes = ShuffleSizes(chunk_batches=1, partition_rows=20)
    folder = memory_dir / "chain"
    reasons, counts = find(folder, units, config, sizes=sizes, batch_documents=1)
    assert reasons == [None] + ["near_duplicate"] * 39
    assert counts.dropped == {"exact_duplicate": 0, "near_duplicate": 39}


def test_find_duplicates_unit_of_many_chunks_is_seen_to_its_end(tmp_path: Path) -> None:
    texts = [f"text{number}" for number in range(20)]
    # With so many bands, the size of the file tells the number of documents exactly.
    config = DuplicatesConfig(near=NearDuplicatesConfig(shingle_words=1, bands=256))
    sizes = ShuffleSizes(chunk_batches=1)
    reasons, counts = find(
        tmp_path, [["a"], [*texts, "text3"]], config, sizes=sizes, batch_documents=8
    )
    assert reasons == [None] * 21 + ["near_duplicate"]
    assert counts.documents == 22


class StopError(Exception):
    """A job that is killed."""


def stopping(after: int) -> TaskRunner:
    """Run tasks here, and be killed after some of them."""
    left = iter(range(after))

    def run_some(
        name: str, run: Callable[[int], Mapping[str, int]], num_tasks: int, attempts: Place
    ) -> Counter[str]:
        def run_one(number: int) -> Mapping[str, int]:
            if next(left, None) is None:
                raise StopError
            return run(number)

        return run_here(name, run_one, num_tasks, attempts)

    return run_some


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def files_of(folder: Path) -> dict[str, int]:
    """Finished files of the steps, and the inode of each."""
    return {str(path.relative_to(folder)): path.stat().st_ino for path in folder.rglob("*.rows")}


def test_find_duplicates_killed_anywhere_goes_on_to_the_same_bytes(memory_dir: Path) -> None:
    generator = random.Random(0)
    units = [["".join(generator.choices("abcdefgh", k=2)) for _ in range(7)] for _ in range(4)]
    config = DuplicatesConfig(exact=True, near=LOOSE)
    sizes = ShuffleSizes(chunk_batches=2, partition_rows=20)
    find(memory_dir / "undisturbed", units, config, sizes=sizes)
    expected = content(memory_dir / "undisturbed" / "dropped")
    written = write_units(memory_dir / "signatures", units, config)
    dropped = memory_dir / "dropped"
    after = 0
    for after in range(1, 1000, 4):
        before = files_of(dropped)
        with contextlib.suppress(StopError):
            find_duplicates_with(
                stopping(after), written, 4, config, Place.local(dropped), sizes=sizes
            )
            break
        # What was finished is not made again.
        assert before.items() <= files_of(dropped).items()
    assert after > 20
    found = content(dropped)
    assert found.keys() == expected.keys()
    assert {name for name in found if found[name] != expected[name]} <= {"manifest.json"}


def test_find_duplicates_done_before_runs_nothing(tmp_path: Path) -> None:
    units = [["a", "b"], ["a"]]
    _, counts = find(tmp_path, units, EXACT)
    written, dropped = Place.local(tmp_path / "signatures"), Place.local(tmp_path / "dropped")
    before = content(tmp_path / "dropped")
    # As if it had been killed before the files of the steps were deleted.
    fingerprint = (dropped / "manifest.json").read_json()["fingerprint"]
    (dropped / f"work-{fingerprint[:12]}/texts/rows/000000.rows").write_bytes(b"left")
    assert find_duplicates_with(stopping(0), written, 2, EXACT, dropped, sizes=SMALL) == counts
    assert content(tmp_path / "dropped") == before


def test_find_duplicates_other_signatures_make_it_anew(tmp_path: Path) -> None:
    assert find(tmp_path, [["a", "b"], ["a"]], EXACT)[0] == [None, None, "exact_duplicate"]
    written, dropped = Place.local(tmp_path / "signatures"), Place.local(tmp_path / "dropped")
    write_signatures(written, 1, [["b"]], EXACT, batch_documents=2)
    with pytest.raises(StopError):
        find_duplicates_with(stopping(1), written, 2, EXACT, dropped)
    # Nothing of the old result is there that could be taken for the new one.
    assert not dropped_file(dropped, 1).exists()
    assert find(tmp_path, [["a"], ["b"]], EXACT)[0] == [None, None]


def test_find_duplicates_missing_signatures_are_named(tmp_path: Path) -> None:
    written = write_units(tmp_path / "signatures", [["a"], ["b"], ["c"]], EXACT)
    signature_file(written, 1).delete()
    with pytest.raises(StoreError, match=r"1 of 3 signature files are missing.* 00001\.arrow"):
        find_duplicates_with(run_here, written, 3, EXACT, Place.local(tmp_path / "dropped"))


def test_find_duplicates_signatures_of_other_settings_are_refused(tmp_path: Path) -> None:
    written = write_units(
        tmp_path / "signatures", [["a"]], DuplicatesConfig(near=NearDuplicatesConfig())
    )
    config = DuplicatesConfig(near=NearDuplicatesConfig(seed=1))
    with pytest.raises(StoreError, match=r"00000\.arrow: was made with other settings"):
        find_duplicates_with(run_here, written, 1, config, Place.local(tmp_path / "dropped"))


def test_find_duplicates_leaves_foreign_files_alone(tmp_path: Path) -> None:
    (tmp_path / "dropped" / "mine").mkdir(parents=True)
    (tmp_path / "dropped" / "notes.txt").write_text("keep")
    find(tmp_path, [["a"]], EXACT)
    assert (tmp_path / "dropped" / "mine").is_dir()
    assert (tmp_path / "dropped" / "notes.txt").read_text() == "keep"
