"""Running the job in this process, against an endpoint that a test scripts."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raytune_llama.config.settings import from_dict
from raytune_llama.generate.make_data.config import MakeDataConfig
from raytune_llama.generate.make_data.endpoint import Delays
from raytune_llama.generate.make_data.job import DataSummary, make_data
from raytune_llama.storage.lease import LeaseTimes
from tests.generate.make_data.fake_endpoint import FakeEndpoint

FAST = LeaseTimes(settle_seconds=0.05, heartbeat_seconds=0.2, stale_seconds=2.0)
SOON = Delays(first_seconds=0.01, max_seconds=0.05)

MakeData = Callable[..., DataSummary]
"""Runs the job on `run_dir`, with other fields by dotted path."""


@pytest.fixture
def endpoint() -> Iterator[FakeEndpoint]:
    with FakeEndpoint() as server:
        yield server


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "made"


@pytest.fixture
def run(endpoint: FakeEndpoint, run_dir: Path) -> MakeData:
    def run_job(**fields: Any) -> DataSummary:  # noqa: ANN401
        key = fields.pop("key", None)
        return make_data(config_of(endpoint.url, run_dir, **fields), key, **fast())

    return run_job


def fast() -> dict[str, Any]:
    return {"delays": SOON, "lease_times": FAST}


def config_of(url: str, run_dir: Path, **fields: Any) -> MakeDataConfig:  # noqa: ANN401
    prompt = {"num_items": 3, **fields.pop("prompt", {})}
    given = {"concurrency": 1, "base_url": url, "run_dir": str(run_dir), "prompt": prompt}
    return from_dict(MakeDataConfig, given | fields)


def read_rows(run_dir: Path) -> list[dict[str, str]]:
    return json.loads((run_dir / "alpaca.json").read_bytes())


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_bytes().split(b"\n") if line]


def read_journal(run_dir: Path) -> list[dict[str, Any]]:
    return read_lines(run_dir / "requests.jsonl")[1:]


def read_quarantine(run_dir: Path) -> list[dict[str, Any]]:
    return read_lines(run_dir / "quarantine.jsonl")
