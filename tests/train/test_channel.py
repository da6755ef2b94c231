"""Promise: workers' log records reach the driver's log, and its request to stop reaches them."""

import logging
import time
from collections.abc import Callable, Iterator

import pytest
import ray
from ray.exceptions import RayActorError

from raytune_llama.train.channel import Channel, StopRequest, WorkerHandler

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

NAME = "raytune_llama.somewhere"


@pytest.fixture
def channel() -> Iterator[Channel]:
    opened = Channel()
    yield opened
    opened.close()


def holds_soon(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def log_as_worker(actor: object, rank: int) -> None:
    """Log through the worker's handler, as a process of its own would."""
    logger = logging.Logger(NAME)
    logger.addHandler(WorkerHandler(actor, rank))
    logger.debug("too much detail")
    logger.info("100%% of rank %d", rank)
    logger.error("failed", exc_info=ArithmeticError("nothing adds up"))


def test_channel_shows_each_record_once_with_name_and_level(
    caplog: pytest.LogCaptureFixture,
) -> None:
    channel = Channel()
    with caplog.at_level(logging.INFO):
        for rank in (0, 1):
            log_as_worker(channel.actor, rank)
        # What is left is shown before the channel ends.
        assert holds_soon(lambda: len(caplog.records) >= 3)
        channel.close()
    shown = [(r.name, r.levelno, r.getMessage()) for r in caplog.records if r.name == NAME]
    assert [level for _, level, _ in shown] == [logging.INFO, logging.ERROR, logging.ERROR]
    assert shown[0][2] == "100% of rank 0"
    assert "nothing adds up" in shown[1][2]
    # What all do alike is said once, and what fails names its worker.
    assert "worker 1" in shown[2][2]


def test_stop_request_is_seen_only_after_it_was_made(channel: Channel) -> None:
    first, second = StopRequest(channel.actor), StopRequest(channel.actor)
    assert not first()
    channel.request_stop()
    assert holds_soon(first)
    assert holds_soon(second)
    # A worker that starts later, after a failure, sees it too.
    assert holds_soon(StopRequest(channel.actor))


def test_stop_request_lost_channel_is_no_request() -> None:
    channel = Channel()
    stop = StopRequest(channel.actor)
    assert not stop()
    channel.close()
    with pytest.raises(RayActorError):
        holds_soon(stop)


def test_channel_actor_takes_no_cpu(channel: Channel) -> None:
    total = ray.cluster_resources()["CPU"]
    assert holds_soon(lambda: ray.available_resources().get("CPU") == total)
    assert not StopRequest(channel.actor)()
