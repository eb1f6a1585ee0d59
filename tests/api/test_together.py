"""Questions asked at the same moment share a call, and each gets its own answer, or the call's error."""

import asyncio
import threading
from collections.abc import Sequence

import pytest

from registry.api.together import Together
from registry.api.turns import Turns
from registry.core.errors import BadRequest


def test_what_is_asked_during_a_call_goes_into_the_next_one() -> None:
    calls: list[list[int]] = []
    began, may_end = threading.Event(), threading.Event()

    def double(questions: Sequence[int]) -> list[int]:
        calls.append(list(questions))
        began.set()
        may_end.wait(10)
        return [2 * question for question in questions]

    async def everybody() -> list[int]:
        together = Together(double, Turns(1, 1.0))
        first = asyncio.ensure_future(together.ask(1))
        await asyncio.to_thread(began.wait, 10)
        others = [asyncio.ensure_future(together.ask(number)) for number in (2, 3, 4)]
        await asyncio.sleep(0)
        may_end.set()
        answers = await asyncio.gather(first, *others)
        return [*answers, await together.ask(5)]

    assert asyncio.run(everybody()) == [2, 4, 6, 8, 10]
    assert calls == [[1], [2, 3, 4], [5]]


def test_an_error_is_everybodys_and_the_next_call_is_a_new_one() -> None:
    def refuse(questions: Sequence[int]) -> list[int]:
        if 0 in questions:
            raise ZeroDivisionError
        return list(questions)

    async def ask() -> int:
        together = Together(refuse, Turns(1, 1.0))
        found = await asyncio.gather(together.ask(0), together.ask(1), return_exceptions=True)
        assert [type(error) for error in found] == [ZeroDivisionError, ZeroDivisionError]
        return await together.ask(7)

    assert asyncio.run(ask()) == 7


def test_who_has_gone_is_no_trouble_for_the_others() -> None:
    async def ask() -> int:
        together: Together[int, int] = Together(list, Turns(1, 1.0))
        gone = asyncio.ensure_future(together.ask(1))
        stays = asyncio.ensure_future(together.ask(2))
        await asyncio.sleep(0)
        gone.cancel()
        answer = await stays
        with pytest.raises(asyncio.CancelledError):
            await gone
        return answer

    assert asyncio.run(ask()) == 2


def test_what_is_wrong_with_one_question_is_told_to_who_asked_it() -> None:
    calls: list[list[str]] = []

    def read(questions: Sequence[str]) -> list[str]:
        calls.append(list(questions))
        if "\0" in questions:
            raise BadRequest(problems="NUL")
        return [question.upper() for question in questions]

    async def ask() -> list[str | BaseException]:
        together = Together(read, Turns(1, 1.0))
        return await asyncio.gather(*map(together.ask, ("a", "\0", "b")), return_exceptions=True)

    first, wrong, last = asyncio.run(ask())
    assert (first, last) == ("A", "B")
    assert isinstance(wrong, BadRequest)
    assert calls == [["a", "\0", "b"], ["a"], ["\0"], ["b"]]


def test_a_call_takes_no_more_questions_than_it_may() -> None:
    calls: list[list[int]] = []

    def same(questions: Sequence[int]) -> list[int]:
        calls.append(list(questions))
        return list(questions)

    async def ask() -> list[int]:
        together = Together(same, Turns(1, 1.0), most=2)
        return await asyncio.gather(*map(together.ask, range(5)))

    assert asyncio.run(ask()) == [0, 1, 2, 3, 4]
    assert calls == [[0, 1], [2, 3], [4]]
