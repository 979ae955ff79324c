"""Clients share what there is few of: no client has all of it, and who leaves makes room."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import psutil
import pytest

from qtool.sandbox import ChildDied, Sandbox, TooManyWaiting
from qtool.serve.prompts.pool import SandboxPool
from qtool.serve.threads import SMALL_BYTES, WORKERS, Threads
from qtool.serve.turns import Origin, Turns, client_at, set_origin


def take(turns: Turns, client: str) -> asyncio.Task[int]:
    return asyncio.create_task(turns.acquire(client))


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_one_client_never_has_all_workers_and_the_others_take_turns():
    async def main() -> None:
        turns = Turns(2, max_waiting=100, max_waiting_each=90)
        greedy = [take(turns, "greedy") for _ in range(80)]
        await settle()
        assert [task.done() for task in greedy].count(True) == 1
        others = [take(turns, name) for name in "abba"]
        await settle()
        assert [task.done() for task in others] == [True, False, False, False]
        turns.release("a", others[0].result())
        await settle()
        assert [task.done() for task in others] == [True, True, False, False]
        turns.release("b", others[1].result())
        await settle()
        assert [task.done() for task in others] == [True, True, False, True]  # in turn
        turns.release("greedy", greedy[0].result())
        await settle()
        assert greedy[1].done() != others[2].done()  # who waited longer
        for task in [*greedy, *others]:
            task.cancel()

    asyncio.run(main())


def test_one_client_cannot_fill_the_queue():
    async def main() -> None:
        turns = Turns(1, max_waiting=5, max_waiting_each=3)
        tasks = [take(turns, "a") for _ in range(4)]
        await settle()
        with pytest.raises(TooManyWaiting):
            await turns.acquire("a")
        tasks += [take(turns, name) for name in "bc"]
        await settle()
        with pytest.raises(TooManyWaiting):
            await turns.acquire("d")
        tasks[-1].cancel()
        await settle()
        tasks += [take(turns, "d")]
        await settle()
        worker = tasks[0].result()
        for client in ("a", "a", "b"):  # d comes after a second one of a, and after b
            turns.release(client, worker)
            await settle()
        assert tasks[-1].done()
        for task in tasks:
            task.cancel()

    asyncio.run(main())


def test_a_turn_that_comes_as_its_caller_leaves_is_passed_on():
    async def main() -> None:
        turns = Turns(1, max_waiting=5, max_waiting_each=5)
        first = await turns.acquire("a")
        leaves, stays = take(turns, "b"), take(turns, "c")
        await settle()
        turns.release("a", first)
        leaves.cancel()  # its turn has come, and it does not know yet
        await settle()
        assert stays.done()

    asyncio.run(main())


def test_a_client_keeps_its_thread_until_it_has_finished():
    async def main() -> None:
        threads = Threads()
        set_origin(Origin("a"))
        going_on = [asyncio.Event() for _ in range(WORKERS - 1)]
        loop = asyncio.get_running_loop()

        def block(event: asyncio.Event) -> None:
            asyncio.run_coroutine_threadsafe(event.wait(), loop).result()

        running = [
            asyncio.create_task(threads.run(SMALL_BYTES + 1, block, event)) for event in going_on
        ]
        await asyncio.sleep(0.05)
        for task in running:
            task.cancel()
        waiting = asyncio.create_task(threads.run(SMALL_BYTES + 1, int, 7))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        set_origin(Origin("b"))
        assert await threads.run(SMALL_BYTES + 1, int, 8) == 8
        assert await threads.run(SMALL_BYTES, int, 9) == 9
        for event in going_on:
            event.set()
        assert await waiting == 7
        threads.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("fe80::1%eth0", "fe80::"),
        ("", ""),
    ],
)
def test_an_address_names_a_client(address, client):
    assert client_at(address) == client


def do(what: str, value: int = 0) -> int:
    """Run in a child."""
    while what == "spin":
        pass
    return value


def test_a_pool_ends_what_nobody_waits_for_and_serves_other_clients_meanwhile(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    before = set(psutil.Process().children(recursive=True))
    monkeypatch.setattr("qtool.serve.prompts.pool.GRACE_S", 0.1)

    async def scenario():
        def make_sandbox():
            return Sandbox(f"{Path(__file__).stem}:do", timeout_s=60, memory_bytes=200 << 20)

        pool = SandboxPool(make_sandbox, ("echo", 0), max_waiting=40, max_waiting_each=20)
        set_origin(Origin("greedy"))
        assert await pool.call("echo", 1) == 1
        left = [asyncio.create_task(pool.call("spin")) for _ in range(20)]
        await asyncio.sleep(0.2)
        set_origin(Origin("other"))
        assert await asyncio.wait_for(pool.call("echo", 2), 30) == 2
        for call in left:
            call.cancel()
        set_origin(Origin("greedy"))
        assert await asyncio.wait_for(pool.call("echo", 3), 30) == 3
        spinning = asyncio.create_task(pool.call("spin"))
        await asyncio.sleep(0.1)
        await pool.close()
        assert isinstance((await asyncio.gather(spinning, return_exceptions=True))[0], ChildDied)

    asyncio.run(scenario())
    assert set(psutil.Process().children(recursive=True)) <= before
