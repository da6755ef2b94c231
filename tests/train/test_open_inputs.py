"""Promise: a start lists its sources, reads the beginning of each and loads its tokenizer once."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from raytune_llama.data.build.preparation import prepare_data
from raytune_llama.storage.place import Place
from raytune_llama.train.identity import check_identity, identify
from raytune_llama.train.preflight import open_inputs
from tests.faulty_s3 import FaultyServer
from tests.train.conftest import MakeConfig


class WorkersAreNextError(Exception):
    """Raised where Ray would be started."""


def stop() -> None:
    raise WorkersAreNextError


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every directory that a tokenizer is loaded from, as it is loaded."""
    loaded: list[Path] = []
    load = AutoTokenizer.from_pretrained

    def counted(path: Path, **options: Any) -> Any:  # noqa: ANN401
        loaded.append(path)
        return load(path, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", counted)
    return loaded


def test_start_looks_at_its_inputs_once(  # noqa: PLR0917  # fixtures
    make_config: MakeConfig,
    model_dir: Path,
    s3_path: Place,
    faulty_s3: FaultyServer,
    tmp_path: Path,
    loads: list[Path],
) -> None:
    model = Path(shutil.copytree(model_dir, tmp_path / "model"))
    corpus = faulty_s3.front_of(s3_path)
    for name in ("a.txt", "b.txt"):
        (corpus / name).write_bytes(b"one line of text\n" * 100)
    faulty_s3.requests.clear()
    config = make_config(
        model__path=str(model),
        data__sources=[{"path": str(corpus)}],
        data__store_dir=str(tmp_path / "store"),
    )

    inputs = open_inputs(config)
    check_identity(config.run_place, identify(config))
    first = list(faulty_s3.requests)
    # Where the workers would start, all that is known on the driver is known.
    with pytest.raises(WorkersAreNextError):
        prepare_data(config.encoded_data, inputs.data, start_ray=stop)

    # One whole listing; a key of at most one only asks whether the path is a folder.
    listings = [request for request in faulty_s3.requests if "max-keys=1000" in request]
    heads = [request for request in first if request.startswith("GET") and ".txt" in request]
    assert len(listings) == 1, faulty_s3.requests
    assert not [request for request in faulty_s3.requests[len(first) :] if "list-type" in request]
    # The beginning of each file, and of the source's first one for the example in the log.
    assert len(heads) == 3, first
    assert [str(path) for path in loads] == [str(model)]
