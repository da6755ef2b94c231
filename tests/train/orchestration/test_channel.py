"""Promise: what workers say reaches the driver, and its request to stop reaches them."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError
from ray.util.state import list_actors

from raytune_llama.train.orchestration.channel import (
    Channel,
    ChannelActor,
    StopRequest,
    WorkerLogHandler,
)
from raytune_llama.train.orchestration.failure_policy import FailurePolicy

NAME = "raytune_llama.somewhere"


@pytest.fixture
def channel(ray_cluster: None) -> Iterator[Channel]:
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
    logger.addHandler(WorkerLogHandler(actor, rank))
    logger.debug("too much detail")
    logger.info("100%% of rank %d", rank)
    logger.error("failed", exc_info=ArithmeticError("nothing adds up"))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
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
    records = sorted((r for r in caplog.records if r.name == NAME), key=lambda r: r.created)
    assert [r.levelno for r in records] == [logging.INFO, logging.ERROR, logging.ERROR]
    first, second, third = (record.getMessage() for record in records)
    assert first == "100% of rank 0"
    assert "nothing adds up" in second
    # What all do alike is said once, and what fails names its worker.
    assert "worker 1" in third


def test_channel_actor_drain_is_in_the_order_of_time_and_forgets() -> None:
    async def drained_twice() -> list[list[float]]:
        actor = ChannelActor(FailurePolicy(max_failures=1))
        for created in (2.0, 3.0, 1.0):
            await actor.put_log_record({"created": created})
        return [[r["created"] for r in (await actor.drain()).records] for _ in range(2)]

    assert asyncio.run(drained_twice()) == [[1.0, 2.0, 3.0], []]


@pytest.mark.ray
def test_stop_request_is_seen_only_after_it_was_made(channel: Channel) -> None:
    first, second = StopRequest(channel.actor), StopRequest(channel.actor)
    assert not first()
    channel.request_stop()
    assert holds_soon(first)
    assert holds_soon(second)
    # A worker that starts later, after a failure, sees it too.
    assert holds_soon(StopRequest(channel.actor))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_stop_request_lost_channel_is_no_request() -> None:
    channel = Channel()
    stop = StopRequest(channel.actor)
    assert not stop()
    channel.close()
    with pytest.raises(RayActorError):
        holds_soon(stop)


@pytest.mark.ray
def test_channel_actor_takes_no_cpu(channel: Channel) -> None:
    ray.get(channel.actor.drain.remote())  # it is there
    alive: list[Any] = [("class_name", "=", "ChannelActor"), ("state", "=", "ALIVE")]
    states: list[Any] = list_actors(
        address=ray.get_runtime_context().gcs_address, filters=alive, detail=True
    )
    assert states
    assert not any((state.required_resources or {}).get("CPU") for state in states)
