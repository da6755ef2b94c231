"""Promise: no change of a pack's assignments is lost, and each result is passed on once."""

import asyncio

from raytune_llama.storage.place import Place
from raytune_llama.train.orchestration.pack_assignments import PackAssignments
from raytune_llama.train.result import RunResult


def folder(number: int) -> Place:
    return Place.parse(f"/runs/{number}", "run_dir")


def test_assignments_changed_at_once_keep_every_change() -> None:
    async def change() -> None:
        actor = PackAssignments()
        waiting = asyncio.create_task(actor.wait_for_change(0))
        await asyncio.gather(
            *(actor.add(number, b"config", folder(number)) for number in range(20))
        )
        await asyncio.gather(*(actor.remove(number) for number in range(5)), actor.close())
        assert (await waiting).version > 0
        wanted = await actor.wait_for_change(-1)
        assert sorted(wanted.runs) == list(range(5, 20))
        assert wanted.is_last

    asyncio.run(change())


def test_assignments_no_longer_want_a_run_that_has_ended() -> None:
    async def end() -> None:
        actor = PackAssignments()
        await actor.add(3, b"config", folder(3))
        await actor.add(4, b"config", folder(4))
        await actor.put_result(3, RunResult("finished", 8))
        assert list((await actor.wait_for_change(-1)).runs) == [4]
        assert await actor.next_result() == (3, RunResult("finished", 8))

    asyncio.run(end())


def test_assignments_count_failures_in_a_row_without_a_newer_checkpoint() -> None:
    async def fail() -> list[int]:
        actor = PackAssignments()
        failures = [(3, 0), (3, 0), (4, 0), (3, 20), (3, 20), (3, 20)]
        return [await actor.count_failure(number, step) for number, step in failures]

    assert asyncio.run(fail()) == [1, 2, 1, 1, 2, 3]


def test_assignments_know_the_folders_of_runs_that_have_ended() -> None:
    async def end() -> list[Place]:
        actor = PackAssignments()
        await actor.add(3, b"config", folder(3))
        await actor.put_result(3, RunResult("finished", 8))
        return await actor.run_dirs()

    assert asyncio.run(end()) == [folder(3)]
