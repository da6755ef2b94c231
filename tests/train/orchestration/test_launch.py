"""Whether a run goes on after nodes were taken away under its workers."""

import logging
from typing import Any

import pytest

from raytune_llama.signals import StopSignal
from raytune_llama.train.orchestration import launch
from raytune_llama.train.orchestration.config import ScaleConfig
from raytune_llama.train.orchestration.launch import has_room
from raytune_llama.train.orchestration.resources import find_shortage


def node(name: str, *, alive: bool = True) -> dict[str, Any]:
    resources = {"CPU": 1.0, "memory": 2.0**34}
    return {"NodeID": name, "Alive": alive, "NodeManagerAddress": name, "Resources": resources}


@pytest.mark.parametrize(
    ("nodes", "draining", "has_drained", "expected"),
    [
        ([node("a"), node("b")], [], False, True),
        ([node("a"), node("b"), node("c")], ["b"], True, True),
        ([node("a"), node("b")], ["b"], True, False),
        # Drained and gone since, as a node is that has nothing to do.
        ([node("a"), node("b", alive=False)], [], True, False),
        # Lost without notice: Ray waits for another one.
        ([node("a"), node("b", alive=False)], [], False, True),
    ],
)
def test_run_stops_where_the_nodes_that_stay_are_too_few(
    *,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    nodes: list[dict[str, Any]],
    draining: list[str],
    has_drained: bool,
    expected: bool,
) -> None:
    monkeypatch.setattr(launch.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(launch, "draining_nodes", lambda: dict.fromkeys(draining, 0))
    scale = ScaleConfig(num_workers=2, wait_seconds=0.0)
    with caplog.at_level(logging.WARNING):
        assert has_room(scale, StopSignal(), has_drained=has_drained) is expected
    assert ("too few nodes remain" in caplog.text) is not expected


def test_run_that_may_wait_goes_on_once_another_node_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = iter([[node("a")], [node("a"), node("c")]])
    monkeypatch.setattr(launch.ray, "nodes", lambda: next(seen))
    monkeypatch.setattr(launch, "draining_nodes", dict)
    monkeypatch.setattr(f"{find_shortage.__module__}.RESOURCE_POLL_SECONDS", 0.01)
    assert has_room(ScaleConfig(num_workers=2, wait_seconds=60.0), StopSignal(), has_drained=True)
