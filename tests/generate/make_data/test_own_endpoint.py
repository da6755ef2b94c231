"""Data made by the endpoint of this package, whose model says what the test dictates."""

import hashlib
from pathlib import Path

import pytest

from raytune_llama.config.errors import UserError
from raytune_llama.generate.make_data.job import make_data
from raytune_llama.serve.http.keys import ApiKeys
from tests.generate.make_data.conftest import config_of, fast, read_rows
from tests.generate.make_data.fake_endpoint import as_json, make_rows
from tests.serve.http.scripted import Scripted
from tests.serve.http.test_routes import Server

TEXT = as_json(make_rows(1))


def test_own_endpoint_without_keys_makes_rows(run_dir: Path) -> None:
    model = Scripted(TEXT[:40], TEXT[40:])
    server = Server({"demo": model})
    try:
        sampling = {"max_tokens": 500, "extra_body": {"top_k": 9}}
        config = config_of(f"{server.url}/v1", run_dir, max_requests=1, sampling=sampling)
        summary = make_data(config, None, **fast())
    finally:
        server.close()
    assert read_rows(run_dir) == make_rows(1)
    assert summary.counts.models == {"demo": 1}
    assert summary.counts.completion_tokens == 2
    sent = {name: model.fields[name] for name in ("max_tokens", "top_k", "temperature")}
    assert sent == {"max_tokens": 500, "top_k": 9, "temperature": 1.0}


def test_own_endpoint_refuses_a_wrong_key_and_takes_the_right_one(run_dir: Path) -> None:
    keys = ApiKeys((hashlib.sha256(b"sk-right").digest(),))
    server = Server({"demo": Scripted(TEXT)}, keys)
    try:
        config = config_of(f"{server.url}/v1", run_dir, max_requests=1)
        with pytest.raises(UserError, match=r"answered 401: .*api_key_variable"):
            make_data(config, "sk-wrong", **fast())
        assert not run_dir.exists()
        make_data(config, "sk-right", **fast())
    finally:
        server.close()
    assert read_rows(run_dir) == make_rows(1)
