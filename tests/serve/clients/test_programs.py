"""The quick start of each client runs against an endpoint: `make test-clients`.

Clients are in environments of their own, which `environments.py` makes; what is not installed is
skipped. The requests that they send are also sent without them, in `http/test_client_requests.py`.
"""

import subprocess

import pytest

from tests.serve.clients.conftest import RunningEndpoint
from tests.serve.clients.environments import CLIENTS, Client, choose, variables

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PROGRAM_SECONDS = 900


def needs(client: Client) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not client.is_ready, reason=f"{client.name} is not installed: `make test-clients`"
    )


def run_program(client: Client, endpoint: RunningEndpoint, model: str, *steps: str) -> None:
    given = ["--url", endpoint.url, "--model", model, "--model-dir", endpoint.model_dir]
    done = subprocess.run(
        [*client.command(), *given, *steps],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=PROGRAM_SECONDS,
        env=variables(endpoint.key),
    )
    assert done.returncode == 0, f"\n{done.stdout}"
    assert "ok " in done.stdout, f"no step was run:\n{done.stdout}"


@pytest.mark.timeout(PROGRAM_SECONDS + 300)
@pytest.mark.parametrize(
    "client", [pytest.param(one, marks=needs(one), id=one.name) for one in CLIENTS]
)
def test_every_step_of_a_client_gets_what_it_expects(
    client: Client, endpoint: RunningEndpoint
) -> None:
    run_program(client, endpoint, endpoint.model)


OPENAI = choose(["openai"])[0]


@needs(OPENAI)
def test_client_gets_the_answers_of_an_adapter_by_its_name(endpoint: RunningEndpoint) -> None:
    steps = ["chat", "chat_stream", "chat_tools", "completion", "responses"]
    run_program(OPENAI, endpoint, endpoint.adapter, *steps)
