"""Limits: what a bucket gives, how processes share one, and who has to wait for whom."""

import asyncio
import secrets
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from registry.api.app import create_app
from registry.api.deps import AppParts
from registry.api.limits import Buckets, Limits, Rate
from registry.broker import Broker
from registry.client import RegistryClient
from registry.core.errors import Overloaded, RateExceeded
from registry.services import tokens
from tests import servers
from tests.api.test_meta import job_row
from tests.world import SETTINGS, World

ADMIN = tokens.make_text()


@given(st.lists(st.floats(0, 3), max_size=60), st.integers(1, 20), st.integers(1, 10))
def test_a_bucket_never_gives_more_than_its_burst_and_what_flowed_in(
    pauses: list[float], per_s: int, burst: int
) -> None:
    now = 0.0
    buckets = Buckets(lambda: now)
    given_out = 0
    for pause in pauses:
        now += pause
        wait = buckets.take("x", Rate(per_s, burst))
        given_out += not wait
        assert given_out <= burst + now * per_s + 1e-6
        assert 0 <= wait <= 1 / per_s


def test_who_waits_as_long_as_was_said_is_let_in() -> None:
    now = 0.0
    buckets, rate = Buckets(lambda: now), Rate(0.1, 2)
    assert [buckets.take("x", rate) for _ in range(3)] == [0, 0, 10]
    assert buckets.take("y", rate) == 0
    now = 10.0
    assert (buckets.wait("x", rate), buckets.take("x", rate)) == (0, 0)


def test_a_rate_is_one_for_all_processes_that_share_a_redis(valkey_url: str) -> None:
    async def asked() -> list[bool]:
        houses = [Limits(valkey_url), Limits(valkey_url)]
        slow = Rate(0.01, 10)  # nothing flows in while this runs
        answers = [not await houses[turn % 2].take("both", slow) for turn in range(40)]
        for house in houses:
            await house.close()
        return answers

    assert sum(asyncio.run(asked())) == 10


def test_what_a_process_takes_ahead_is_never_more_than_there_is(valkey_url: str) -> None:
    async def asked() -> int:
        houses = [Limits(valkey_url), Limits(valkey_url)]
        answers = [not await house.take("ahead", Rate(100, 200)) for _ in range(400) for house in houses]
        for house in houses:
            await house.close()
        return sum(answers)

    assert asyncio.run(asked()) < 800


def test_without_its_redis_a_process_counts_for_itself_and_locks_nobody_out() -> None:
    async def asked() -> list[bool]:
        alone = Limits("redis://127.0.0.1:9/0")
        answers = [not await alone.take("x", Rate(0.01, 5)) for _ in range(8)]
        await alone.close()
        return answers

    assert asyncio.run(asked()) == [True] * 5 + [False] * 3


@pytest.fixture
def api(embedded: World) -> Iterator[TestClient]:
    settings = replace(SETTINGS, bootstrap_token=ADMIN, failed_sign_ins=12, rate=1)
    parts = AppParts(settings, embedded.database, embedded.store, Broker("memory://"), embedded.clock)
    with TestClient(create_app(parts)) as client:
        yield client


def ask(api: TestClient, token: str) -> Any:
    return api.get("/v1/whoami", headers={"authorization": f"Bearer {token}"})


def test_a_token_that_asks_too_often_is_told_when_to_come_back(api: TestClient) -> None:
    answers = [ask(api, ADMIN) for _ in range(10)]
    assert [answer.status_code for answer in answers[:2]] == [200, 200]
    refused = answers[-1]
    assert (refused.status_code, refused.json()["code"]) == (429, "rate-exceeded")
    assert refused.headers["retry-after"] == "1"
    body = api.post("/v1/downloads", json={"manifests": []}, headers={"authorization": f"Bearer {ADMIN}"})
    assert body.status_code == 429  # a request with a body is counted too


def test_an_address_whose_tokens_are_refused_has_to_wait_and_nobody_else_has(api: TestClient) -> None:
    identity = ADMIN.split("_")[1]
    guesses = [ask(api, f"lora_{identity}_{str(n) * 43}").status_code for n in range(4)]
    assert guesses == [401, 401, 429, 429]  # a sixth of what the address may
    refused = ask(api, f"lora_{identity}_{'x' * 43}")
    assert (refused.json()["code"], 0 < int(refused.headers["retry-after"]) <= 30) == ("sign-ins-limited", True)
    others = [ask(api, tokens.make_text()).status_code for _ in range(12)]
    assert others == [401] * 10 + [429] * 2
    away = TestClient(api.app, client=("elsewhere", 1))  # the very token that was guessed at
    assert ask(away, ADMIN).status_code == 200


def test_refused_tokens_are_counted_by_all_processes_that_share_a_redis_together(
    embedded: World, valkey_url: str
) -> None:
    settings = replace(SETTINGS, bootstrap_token=ADMIN, failed_sign_ins=1, broker_url=valkey_url)
    address = (secrets.token_hex(8), 1)  # nobody else's in that Redis
    made = [
        create_app(AppParts(settings, embedded.database, embedded.store, Broker("memory://"))) for _ in range(2)
    ]
    with TestClient(made[0], client=address) as one, TestClient(made[1], client=address) as other:
        answers = [ask(api, tokens.make_text()).status_code for api in (one, other, one)]
    assert answers == [401, 429, 429]


def test_who_watches_a_job_takes_no_place_of_those_who_ask(embedded: World) -> None:
    settings = replace(SETTINGS, bootstrap_token=ADMIN, in_flight=1)
    parts = AppParts(settings, embedded.database, embedded.store, Broker("memory://"))
    with embedded.database.write() as session:
        session.add(job_row("j1", embedded.now))
    header = {"authorization": f"Bearer {ADMIN}"}
    with servers.served(lambda _: create_app(parts)) as url, httpx.Client(base_url=url, headers=header) as http:
        with http.stream("GET", "/v1/jobs/j1/events") as watching:
            next(watching.iter_lines())
            for _ in range(5):
                assert http.get("/v1/whoami").status_code == 200
        assert http.get("/v1/whoami").status_code == 200


@pytest.mark.parametrize(
    "refusal", [RateExceeded(id="x", per_s=1, retry_after=7), Overloaded(limit=1, retry_after=7)], ids=lambda e: e.code
)
def test_the_client_comes_back_when_it_was_told_to_even_with_what_changes_something(
    refusal: RateExceeded | Overloaded,
) -> None:
    pauses: list[float] = []
    away = httpx.Response(
        429 if isinstance(refusal, RateExceeded) else 503, json=refusal.problem(), headers={"retry-after": "7"}
    )
    answers = iter([away, httpx.Response(204)])
    transport = httpx.MockTransport(lambda _: next(answers))
    with RegistryClient("http://registry.test", "t", transport=transport, sleep=pauses.append) as client:
        client.revoke_token("x")
    assert len(pauses) == 1
    assert 7 <= pauses[0] < 8
