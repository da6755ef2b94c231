"""Promise: no change of a pack's assignments is lost, and each result is passed on once."""

import asyncio

from raytune_llama.train.orchestration.pack_assignments import PackAssignments
from raytune_llama.train.result import RunResult


def test_assignments_changed_at_once_keep_every_change() -> None:
    async def change() -> None:
        actor = PackAssignments()
        waiting = asyncio.create_task(actor.wait_for_change(0))
        await asyncio.gather(*(actor.add(number, b"config") for number in range(20)))
        await asyncio.gather(*(actor.remove(number) for number in range(5)), actor.close())
        assert (await waiting).version > 0
        wanted = await actor.wait_for_change(-1)
        assert sorted(wanted.runs) == list(range(5, 20))
        assert wanted.is_last

    asyncio.run(change())


def test_assignments_no_longer_want_a_run_that_has_ended() -> None:
    async def end() -> None:
        actor = PackAssignments()
        await actor.add(3, b"config")
        await actor.add(4, b"config")
        await actor.put_result(3, RunResult("finished", 8))
        assert list((await actor.wait_for_change(-1)).runs) == [4]
        assert await actor.next_result() == (3, RunResult("finished", 8))

    asyncio.run(end())
