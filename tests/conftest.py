"""What tests share: a tokenizer that is trained here, and one Ray cluster for the session."""

# ruff: noqa: E402 - the environment comes before what reads it at import.

import os
import secrets
import tempfile

# Before transformers is imported: a test that needs the hub is a mistake and must fail at once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:
    # As many processes as cores: with a thread per core in each they would wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Ray reads its authentication mode when it is imported, and would write a token to the home folder.
_TOKEN_FILE = tempfile.NamedTemporaryFile("w", prefix="ray-auth-token-")  # noqa: SIM115
_TOKEN_FILE.write(secrets.token_hex(32))
_TOKEN_FILE.flush()
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN_PATH"] = _TOKEN_FILE.name
os.environ.pop("RAY_ADDRESS", None)  # never another cluster than the tests' own

# Never anyone's own account, and no search for one on the network. Ray's workers inherit this too.
for _name in ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
    os.environ.pop(_name, None)
os.environ |= {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}

import gc
import logging
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path

from raytune_llama.serve.config import RequestLimits
from raytune_llama.serve.proxy import proxy_environment

# Ray Serve reads the choice of its proxy when it is imported.
PROXY = "python" if os.environ.get("RAYTUNE_TEST_PROXY") == "python" else "haproxy"
_PROXY_FOLDER = tempfile.TemporaryDirectory(prefix="raytune-tests-", dir="/tmp")
os.environ |= {
    **proxy_environment(PROXY, RequestLimits(), Path(_PROXY_FOLDER.name), free_ports=True),
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
}

import hypothesis
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from raytune_llama.storage.place import Place
from tests.faulty_s3 import FaultyServer
from tests.hub_server import HubServer

# A busy machine is no failure.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep the garbage collector away from what is imported, while it is and ever after.

    To look through these objects again and again took a quarter of the time of collecting tests.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


CONTROL_TOKENS = ("<s>", "</s>", "<|im_end|>")
"""The control tokens of `tokenizer_dir`: beginning, end, and one that only a template uses."""

_TEXT = (
    "The quick brown fox jumps over the lazy dog.",
    "Data stages meet only through directories, and nothing is silent.",
    "人民日报一九九八年一月一日。新年的钟声敲响了。",
    "for index in range(10): total += index",
)


def train_tokenizer(path: Path, *, special: bool = True) -> Path:
    """Train a byte-level BPE of 400 pieces and save it; without `special` it has no bos and eos."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(CONTROL_TOKENS) if special else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT * 4, trainer)
    bos, eos, extra = CONTROL_TOKENS
    names = (
        {"bos_token": bos, "eos_token": eos, "additional_special_tokens": [extra]}
        if special
        else {}
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def s3() -> Iterator[Place]:
    """A bucket of a real S3 server that all tests share; other processes of this machine see it."""
    import pyarrow.fs as pafs
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {"endpoint_override": f"{host}:{port}", "scheme": "http"}
    pafs.S3FileSystem(**options, allow_bucket_creation=True).create_dir("bucket")
    query = "&".join(f"{name}={value}" for name, value in options.items())
    yield Place.parse(f"s3://bucket?{query}", "s3")
    server.stop()


@pytest.fixture
def s3_path(s3: Place) -> Place:
    """A folder of a test's own in object storage, as `tmp_path` is one on the disk."""
    return s3 / uuid.uuid4().hex


@pytest.fixture(params=["local", "s3"])
def run_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """The directory of a run, on the disk and in object storage; not there yet."""
    if request.param == "local":
        return Place.local(tmp_path / "run")
    return request.getfixturevalue("s3_path")


@pytest.fixture
def faulty_s3(s3: Place) -> Iterator[FaultyServer]:
    """A front of the same buckets that can be told to fail."""
    server = FaultyServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def hub_server() -> Iterator[HubServer]:
    """A hub on loopback that all tests share; other processes of this machine see it."""
    server = HubServer()
    yield server
    server.close()


@pytest.fixture
def hub(
    hub_server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[HubServer]:
    """An empty hub that this process's client of it asks, with empty caches of the test's own.

    The library reads its environment when it is imported, so its constants are changed too.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    close_session()
    monkeypatch.setattr(constants, "ENDPOINT", hub_server.url)
    template = f"{hub_server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_URL_HOSTS", frozenset({"127.0.0.1"}))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name, value in hub_environment(hub_server, tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    hub_server.clear()
    yield hub_server
    hub_server.clear()


def hub_environment(server: HubServer, folder: Path) -> dict[str, str]:
    """Return the environment of another process that asks a hub, with caches in a folder."""
    return {
        "HF_ENDPOINT": server.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_CACHE": str(folder / "hub-cache"),
        "RAYTUNE_LLAMA_CACHE_DIR": str(folder / "cache"),
    }


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """A cluster of two CPUs that all tests with the marker `ray` share; its dashboard's address."""
    import ray

    from raytune_llama.connection import quoted_python

    context = ray.init(
        address="local",  # not what a killed cluster has left behind
        num_cpus=2,
        object_store_memory=200 * 2**20,
        _node_ip_address="127.0.0.1",
        log_to_driver=False,
        runtime_env=quoted_python(),
    )
    yield f"http://{context.dashboard_url}"
    ray.shutdown()
