"""One key at a time, each as often as needed and no more."""

import asyncio

import pytest

from weightsync_operator.workqueue import WorkQueue


async def take(queue: WorkQueue[str]) -> str:
    async with asyncio.timeout(2):
        return await queue.take(tick_seconds=0.01)


async def nothing(queue: WorkQueue[str], seconds: float = 0.03) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await queue.take(tick_seconds=0.01)
    except TimeoutError:
        return True
    return False


async def test_a_key_added_often_is_taken_once() -> None:
    queue: WorkQueue[str] = WorkQueue()
    for _ in range(10_000):
        queue.add("a")
    queue.add("b")
    assert [await take(queue), await take(queue)] == ["a", "b"]
    assert await nothing(queue)


async def test_a_key_is_never_worked_on_twice_at_a_time() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.add("a")
    await take(queue)
    queue.add("a")
    assert await nothing(queue)
    queue.done("a")
    assert await take(queue) == "a"
    queue.done("a")
    assert await nothing(queue)


async def test_a_waiting_worker_is_woken() -> None:
    queue: WorkQueue[str] = WorkQueue()
    waiting = asyncio.create_task(queue.take(tick_seconds=60))
    await asyncio.sleep(0)
    queue.add("a")
    async with asyncio.timeout(1):
        assert await waiting == "a"


async def test_each_of_two_waiting_workers_gets_a_key() -> None:
    queue: WorkQueue[str] = WorkQueue()
    waiting = [asyncio.create_task(queue.take(tick_seconds=60)) for _ in range(2)]
    await asyncio.sleep(0)
    queue.add("a")
    queue.add("b")
    async with asyncio.timeout(1):
        assert sorted(await asyncio.gather(*waiting)) == ["a", "b"]


async def test_the_earliest_delay_counts() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.add_after("a", 60)
    queue.add_after("a", 0.02)
    queue.add_after("a", 60)
    assert await take(queue) == "a"
    queue.done("a")
    assert await nothing(queue)


async def test_now_overtakes_a_delay() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.add_after("a", 0.02)
    queue.add("a")
    assert await take(queue) == "a"
    queue.done("a")
    assert await nothing(queue, 0.06)


async def test_failures_back_off_and_success_forgets_them() -> None:
    queue: WorkQueue[str] = WorkQueue(base_seconds=0.01, max_seconds=0.05)
    delays = []
    for _ in range(5):
        delays.append(queue.retry("a"))
        assert await take(queue) == "a"
        queue.done("a")
    assert delays == pytest.approx([0.01, 0.02, 0.04, 0.05, 0.05])
    queue.succeeded("a")
    assert queue.retry("a") == pytest.approx(0.01)
    queue.close()


async def test_a_forgotten_key_is_not_taken() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.add_after("a", 0.01)
    queue.forget("a")
    assert await nothing(queue)


async def test_an_idle_queue_ticks_and_a_stuck_one_does_not() -> None:
    queue: WorkQueue[str] = WorkQueue()
    first = queue.ticked_at
    assert await nothing(queue)
    idle = queue.ticked_at
    assert idle > first
    queue.add("a")
    await take(queue)
    stuck = queue.ticked_at
    await asyncio.sleep(0.03)
    assert queue.ticked_at == stuck
