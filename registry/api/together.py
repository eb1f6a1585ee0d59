"""Questions that many requests ask at the same moment, asked of the database in one call."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from starlette.concurrency import run_in_threadpool

from registry.core.errors import BadRequest

from .turns import Turns

Question = TypeVar("Question")
Answer = TypeVar("Answer")


class Together(Generic[Question, Answer]):
    """One call at a time; what is asked while it runs waits for it and goes into the next one.

    So a lone question is asked at once, and under load a call is shared by all who would have queued for one. The
    call begins after the question came, never before: nobody is told what was true before they asked. Where a call is
    refused for what is in one of its questions, each is asked alone: nobody is told of another's mistake.
    """

    def __init__(
        self, ask: Callable[[Sequence[Question]], Sequence[Answer]], turns: Turns, most: int = 256
    ) -> None:  # fmt: skip
        """``ask`` gives one answer per question, in order, of at most ``most``.

        It runs in a thread when it has a turn, and its error is everybody's.
        """
        self._ask, self._turns, self._most = ask, turns, most
        self._waiting: list[tuple[Question, asyncio.Future[Answer]]] = []
        self._calls: asyncio.Task[None] | None = None

    async def ask(self, question: Question) -> Answer:
        """The answer to ``question`` as it is now."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        self._waiting.append((question, future))
        if self._calls is None:
            self._calls = loop.create_task(self._call())
        return await future

    async def _call(self) -> None:
        try:
            while self._waiting:
                async with self._turns.turn():
                    asked, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
                    await self._answer(asked)
        finally:
            self._calls = None

    async def _answer(self, asked: list[tuple[Question, asyncio.Future[Answer]]]) -> None:
        error: BaseException | None = None
        answers: Sequence[Answer] = ()
        try:
            answers = await run_in_threadpool(self._ask, [question for question, _ in asked])
        except BadRequest as raised:
            if len(asked) > 1:
                for one in asked:
                    await self._answer([one])
                return
            error = raised
        except Exception as raised:  # noqa: BLE001  # theirs to handle
            error = raised
        for place, (_, future) in enumerate(asked):
            if future.done():  # who asked has gone
                continue
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(answers[place])
