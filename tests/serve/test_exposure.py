"""Without keys nothing of the endpoint listens beyond loopback; see `raytune_llama.serve.proxy`."""

import contextlib
import os
import socket
import stat
from pathlib import Path

import httpx2
import psutil
import pytest
import ray

from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import ConfigError
from raytune_llama.serve.config import RequestLimits
from raytune_llama.serve.http.keys import ApiKeys, make_key
from raytune_llama.serve.proxy import (
    BINARY_VARIABLE,
    HAPROXY_SWITCH,
    WRAPPER,
    check_exposure,
    check_port,
    choose_proxy,
    is_loopback,
    missing_variables,
    proxy_environment,
)
from tests.conftest import PROXY
from tests.serve.test_scaling import run_model, url

__all__ = ["url"]

KEYS = ApiKeys((bytes.fromhex(make_key()[1]),))
WRAPPED = {HAPROXY_SWITCH: "1", BINARY_VARIABLE: str(WRAPPER)}


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
@pytest.mark.parametrize("environment", [{}, {HAPROXY_SWITCH: "0"}, WRAPPED])
def test_loopback_needs_no_keys(host: str, environment: dict[str, str]) -> None:
    check_exposure(host, ApiKeys(), environment)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org", "", None])  # noqa: S104
@pytest.mark.parametrize("environment", [{}, WRAPPED])
def test_other_addresses_need_keys(host: str | None, environment: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="keys_file"):
        check_exposure(host, ApiKeys(), environment)
    check_exposure(host, KEYS, environment)


def test_haproxy_started_by_hand_needs_keys_for_its_open_ports() -> None:
    by_hand = {HAPROXY_SWITCH: "1"}
    with pytest.raises(ConfigError, match=rf"start Ray with {BINARY_VARIABLE}="):
        check_exposure("127.0.0.1", ApiKeys(), by_hand)
    check_exposure("127.0.0.1", KEYS, by_hand)


def test_haproxy_with_an_address_that_its_replicas_cannot_share_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"host: got 192\.168\.1\.5"):
        choose_proxy("haproxy", "192.168.1.5")
    assert choose_proxy("auto", "192.168.1.5") == "python"
    assert choose_proxy("auto", "0.0.0.0") == "haproxy"  # noqa: S104


def test_limits_of_haproxy_are_wider_than_those_of_the_replicas(tmp_path: Path) -> None:
    limits = RequestLimits(header_bytes=100_000, request_seconds=5000)
    variables = proxy_environment("haproxy", limits, tmp_path, free_ports=False)
    assert int(variables["RAY_SERVE_HAPROXY_TUNE_BUFSIZE"]) > 100_000
    assert int(variables["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) > 5000


def test_taken_port_is_refused_by_name_and_a_free_one_is_not() -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        port = one.getsockname()[1]
        with pytest.raises(UserError, match=f"port: 127.0.0.1:{port} can't be listened on"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)


def serve_pids() -> set[int]:
    """Processes of this cluster's endpoint: proxies, HAProxy and replicas."""
    signs = ("ServeReplica", "ProxyActor", "HAProxyMan", "haproxy")
    pids: set[int] = set()
    for one in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # a HAProxy that was replaced
            if any(sign in " ".join(one.cmdline()) for sign in signs):
                pids.add(one.pid)
    return pids


def speaks_http(address: str, port: int) -> bool:
    """Whether a server answers HTTP/1.1, as proxies, replicas and HAProxy's statistics do."""
    try:
        httpx2.get(f"http://{address}:{port}/", timeout=5, trust_env=False)
    except httpx2.HTTPError:
        return False  # Ray's own channels, which want its token
    return True


def test_loopback_of_several_machines_is_refused_with_haproxy_only() -> None:
    machines = ["10.0.0.1", "10.0.0.2"]
    with pytest.raises(ConfigError, match=r"http_options\.host: got 127\.0\.0\.1, but the cluster"):
        check_exposure("127.0.0.1", KEYS, WRAPPED, machines)
    check_exposure("0.0.0.0", KEYS, WRAPPED, machines)  # noqa: S104
    check_exposure("127.0.0.1", KEYS, {}, machines)
    # Several nodes of one machine reach each other, and so does one machine's address itself.
    check_exposure("127.0.0.1", KEYS, WRAPPED, ["10.0.0.1"])
    check_exposure("127.0.0.1", KEYS, WRAPPED, ["127.0.77.1", "127.0.77.2"])


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_variables_that_a_running_cluster_lacks_are_named() -> None:
    names = (HAPROXY_SWITCH, BINARY_VARIABLE)
    own = {name: os.environ[name] for name in names if name in os.environ}
    assert missing_variables(own) == []
    other = {HAPROXY_SWITCH: str(int(PROXY != "haproxy"))}
    assert missing_variables(other) == [f"{HAPROXY_SWITCH}={other[HAPROXY_SWITCH]}"]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_no_port_of_the_endpoint_listens_beyond_loopback(url: str, served_dir: Path) -> None:
    run_model(served_dir)
    pids = serve_pids()
    listening = {
        (found.laddr[0], found.laddr[1])
        for found in psutil.net_connections(kind="tcp")
        if found.status == psutil.CONN_LISTEN and found.pid in pids and found.laddr
    }
    closed = [port for address, port in listening if is_loopback(address)]
    # The endpoint; with HAProxy also its statistics and metrics, and the replica's own.
    assert int(url.rpartition(":")[2]) in closed
    names = ("STATS_PORT", "METRICS_PORT") if PROXY == "haproxy" else ()
    assert {int(os.environ[f"RAY_SERVE_HAPROXY_{name}"]) for name in names} <= set(closed)
    assert all(map(speaks_http, ["127.0.0.1"] * len(closed), closed))
    opened = [(address, port) for address, port in listening if not is_loopback(address)]
    assert not [one for one in opened if speaks_http("127.0.0.1", one[1])]
    if PROXY == "haproxy":
        check_haproxy(url)


def check_haproxy(url: str) -> None:
    """Check that HAProxy is closed to other users, and leaves limits to the replica."""
    node = ray.nodes()[0]["NodeID"]
    folder = Path(os.environ["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent
    assert stat.S_IMODE((folder / node / "admin.sock").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    # Wider than HAProxy's default buffer, which would refuse it with a page of its own.
    wide = httpx2.get(f"{url}/v1/models", headers={"X-Note": "x" * 40_000}, trust_env=False)
    assert wide.status_code == 200
    beyond = httpx2.get(f"{url}/v1/models", headers={"X-Note": "x" * 70_000}, trust_env=False)
    assert beyond.status_code == 431
    assert beyond.json()["error"]["type"] == "invalid_request_error"
