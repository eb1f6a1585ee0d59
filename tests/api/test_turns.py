"""Turns: few at once, in the order of asking, and nobody waits for ever."""

import asyncio

import pytest

from registry.api.turns import Turns


def test_few_are_at_work_at_once_and_come_in_the_order_of_asking() -> None:
    at_work, most, came = 0, 0, []

    async def work(number: int, turns: Turns) -> None:
        nonlocal at_work, most
        async with turns.turn():
            came.append(number)
            at_work += 1
            most = max(most, at_work)
            await asyncio.sleep(0.001)
            at_work -= 1

    async def everybody() -> None:
        turns = Turns(2, 60)
        await asyncio.gather(*(work(number, turns) for number in range(10)))

    asyncio.run(everybody())
    assert most == 2
    assert came == list(range(10))


def test_who_takes_longer_than_the_patience_goes_on_and_holds_up_nobody_else_and_gives_nothing_back_twice() -> None:
    async def stuck() -> tuple[bool, int]:
        turns, done = Turns(1, 0.01), asyncio.Event()
        at_work = most = 0

        async def hold() -> None:
            async with turns.turn():
                await done.wait()

        async def work() -> None:
            nonlocal at_work, most
            async with turns.turn():
                at_work += 1
                most = max(most, at_work)
                await asyncio.sleep(0)
                at_work -= 1

        held = asyncio.create_task(hold())
        await asyncio.sleep(0)
        await asyncio.wait_for(asyncio.gather(*(work() for _ in range(5))), 10)
        went = not held.done()
        done.set()
        await held
        await asyncio.gather(*(work() for _ in range(5)))
        return went, most

    assert asyncio.run(stuck()) == (True, 1)


def test_a_turn_is_given_back_by_who_fails_and_by_who_is_gone_while_waiting() -> None:
    async def ask() -> None:
        turns = Turns(1, 60)
        with pytest.raises(ValueError, match="no"):
            async with turns.turn():
                raise ValueError("no")
        async with turns.turn():
            waiting = asyncio.create_task(turns.turn().__aenter__())
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        async with asyncio.timeout(10), turns.turn():
            pass

    asyncio.run(ask())
