"""One computation for all who ask at the same time."""

import asyncio

import pytest

from prefill_workers.flights import Flights


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


class Work:
    def __init__(self):
        self.starts, self.cancelled = 0, 0
        self.go = asyncio.Event()

    async def __call__(self):
        self.starts += 1
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return f"result {self.starts}"


async def test_all_who_ask_meanwhile_share_one_start():
    flights, work = Flights(), Work()
    asked = [asyncio.create_task(flights.join("k", work)) for _ in range(5)]
    await settle()
    work.go.set()
    assert await asyncio.gather(*asked) == [("result 1", False)] + [("result 1", True)] * 4
    assert len(flights) == 0
    assert (await flights.join("k", work)) == ("result 2", False)


async def test_one_who_leaves_does_not_stop_the_others():
    flights, work = Flights(), Work()
    first, second = (asyncio.create_task(flights.join("k", work)) for _ in range(2))
    await settle()
    first.cancel()
    await settle()
    work.go.set()
    assert await second == ("result 1", True)
    assert work.cancelled == 0


async def test_the_last_who_leaves_cancels_the_work():
    flights, work = Flights(), Work()
    asked = [asyncio.create_task(flights.join("k", work)) for _ in range(2)]
    await settle()
    for task in asked:
        task.cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    assert work.cancelled == 1
    assert len(flights) == 0


async def test_failure_reaches_everyone_and_is_not_remembered():
    flights, ready = Flights(), asyncio.Event()

    async def fail():
        await ready.wait()
        raise ValueError("no")

    asked = [asyncio.create_task(flights.join("k", fail)) for _ in range(2)]
    await settle()
    ready.set()
    assert [type(e) for e in await asyncio.gather(*asked, return_exceptions=True)] == [ValueError, ValueError]
    assert "k" not in flights


async def test_keys_do_not_share():
    flights, work = Flights(), Work()
    work.go.set()
    results = await asyncio.gather(flights.join("a", work), flights.join("b", work))
    assert [shared for _, shared in results] == [False, False]
    assert work.starts == 2
    with pytest.raises(asyncio.CancelledError):
        await asyncio.gather(_cancel_self(flights))


async def _cancel_self(flights):
    asyncio.current_task().cancel()
    await flights.join("c", Work())
