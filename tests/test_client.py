"""The client: refusals come back as they were, safe requests are repeated, streams are taken up again."""

import inspect
import json
import logging
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry import schemas as wire
from registry.api.app import create_app
from registry.client import TRIES, RegistryClient, every
from registry.core.errors import (
    AdapterNotFound,
    BadName,
    GateNotPassed,
    LoractlError,
    RegistryUnreachable,
    TokenRefused,
    UnknownProblem,
    refusals,
)
from registry.core.policy import Policy
from tests import live

TOKEN = "lora_0123456789ab_a-secret-that-nobody-may-see"
Handler = Callable[[httpx.Request], httpx.Response]


def client_of(handler: Handler, pauses: list[float] | None = None) -> RegistryClient:
    waited = pauses if pauses is not None else []
    return RegistryClient(
        "http://registry.test", TOKEN, transport=httpx.MockTransport(handler), sleep=waited.append
    )


def problem(error: LoractlError, status: int) -> httpx.Response:
    body = {"type": "urn:x", "title": "x", "status": status, **error.problem()}
    return httpx.Response(status, json=body, headers={"content-type": "application/problem+json"})


@pytest.mark.parametrize("refusal", refusals(), ids=lambda refusal: refusal.code)
def test_every_refusal_comes_back_as_the_same_exception(refusal: type[LoractlError]) -> None:
    sent = refusal(**dict.fromkeys(refusal.fact_names(), "x"))
    with client_of(lambda _: problem(sent, 422)) as client, pytest.raises(refusal) as caught:
        client.whoami()
    assert caught.value.facts == sent.facts
    assert caught.value.message == sent.message


@pytest.mark.parametrize("status", [200, 302, 404])
def test_an_answer_that_is_not_a_registrys_is_said_to_be_that(status: int) -> None:
    client = client_of(lambda _: httpx.Response(status, text="<html>nginx</html>"))
    with client, pytest.raises(UnknownProblem, match=str(status)) as caught:
        client.whoami()
    assert "http://registry.test/" in caught.value.hint


@given(st.binary(max_size=200), st.sampled_from([400, 401, 404, 418, 500]))
def test_no_body_of_a_refusal_breaks_the_client(body: bytes, status: int) -> None:
    with client_of(lambda _: httpx.Response(status, content=body)) as client, pytest.raises(LoractlError):
        client.whoami()


def test_nobody_there_is_unreachable_with_the_url_and_the_command_that_helps() -> None:
    client = RegistryClient("http://127.0.0.1:9", TOKEN, sleep=lambda _: None)
    with client, pytest.raises(RegistryUnreachable) as caught:
        client.health()
    assert caught.value.url == "http://127.0.0.1:9"
    assert "loractl up" in caught.value.hint


@pytest.mark.parametrize("url", ["", "registry.test", "ftp://registry.test", "http://", "https:///x", "http://a:b"])
def test_a_url_without_scheme_or_host_is_refused(url: str) -> None:
    with pytest.raises(BadName):
        RegistryClient(url)


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_get_is_repeated_with_growing_pauses_until_it_is_answered(status: int) -> None:
    answers = iter([httpx.Response(status), httpx.Response(status), httpx.Response(200, json={"version": "1"})])
    pauses: list[float] = []
    with client_of(lambda _: next(answers), pauses) as client:
        assert client.health().version == "1"
    assert 0.05 <= pauses[0] <= 0.1 <= pauses[1] <= 0.2


def test_a_get_is_repeated_after_a_broken_connection_and_gives_up_in_the_end() -> None:
    asked = []

    def broken(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        raise httpx.ReadError("connection reset by peer")

    with client_of(broken) as client, pytest.raises(RegistryUnreachable, match="reset by peer"):
        client.health()
    assert len(asked) == TRIES


def test_a_request_that_changes_something_is_not_repeated_once_it_was_sent() -> None:
    asked = []

    def broken(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        raise httpx.ReadError("connection reset by peer")

    with client_of(broken) as client, pytest.raises(RegistryUnreachable):
        client.create_token(wire.TokenRequest(name="x", scopes={"a": ["read"]}))
    assert len(asked) == 1


def test_a_request_that_was_never_sent_is_repeated_whatever_it_is() -> None:
    asked = []

    def refused(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        raise httpx.ConnectError("connection refused")

    with client_of(refused) as client, pytest.raises(RegistryUnreachable):
        client.create_token(wire.TokenRequest(name="x", scopes={"a": ["read"]}))
    assert len(asked) == TRIES


def test_a_refusal_is_an_answer_and_not_repeated() -> None:
    asked = []

    def gone(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return problem(AdapterNotFound(name="team/bot", nearest=""), 404)

    with client_of(gone) as client, pytest.raises(AdapterNotFound):
        client.adapter("team/bot")
    assert len(asked) == 1


def test_every_request_carries_token_agent_and_an_id_of_its_own() -> None:
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, json={"version": "1"})

    with client_of(answer) as client:
        client.health()
        client.health()
    assert {request.headers["authorization"] for request in asked} == {f"Bearer {TOKEN}"}
    assert all(re.fullmatch(r"loractl/\S+", request.headers["user-agent"]) for request in asked)
    assert len({request.headers["x-request-id"] for request in asked}) == 2
    assert all(request.headers["x-request-id"].isalnum() for request in asked)


def test_a_request_on_behalf_of_a_job_says_so_and_others_of_the_same_client_do_not() -> None:
    told: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        told.append(request.headers.get("baggage"))
        return httpx.Response(204)

    with client_of(answer) as client:
        about = {"job": "j1", "attempt": 2, "campaign": None, "origin": "abc"}
        client.on_behalf(about).revoke_token("x")
        client.revoke_token("x")
    assert told == ["loractl.job=j1,loractl.origin=abc", None]
    assert wire.named(str(told[0])) == {"job": "j1", "origin": "abc"}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("", {}),
        ("user=ann,loractl.request=x,loractl.token=y", {}),
        (" loractl.job = j1 ;kept, loractl.origin=b", {"origin": "b"}),
        ("loractl.job=j1;kept,other=1", {"job": "j1"}),
        ('loractl.job=j1"}{,loractl.campaign=' + "c" * 65, {}),
    ],
)
def test_only_ids_of_ours_are_taken_from_what_a_request_says_it_is_for(header: str, said: dict[str, str]) -> None:
    assert wire.named(header) == said


def test_a_redirect_is_not_followed_so_the_token_stays_where_it_belongs() -> None:
    asked = []

    def elsewhere(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.host)
        return httpx.Response(302, headers={"location": "http://elsewhere.test/"})

    with client_of(elsewhere) as client, pytest.raises(LoractlError):
        client.whoami()
    assert asked == ["registry.test"]


def test_the_token_is_in_no_text_log_or_exception(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with client_of(lambda _: httpx.Response(500)) as client:
        with pytest.raises(LoractlError) as caught:
            client.whoami()
        assert TOKEN not in repr(client) + repr(vars(client)) + repr(caught.value.facts) + str(caught.value)
    assert TOKEN not in caplog.text


def test_if_match_carries_the_generation_and_nothing_when_any_will_do() -> None:
    sent: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request.headers.get("if-match"))
        return problem(GateNotPassed(alias="prod", name="team/bot", version="v1", reason="x"), 422)

    with client_of(answer) as client:
        for generation in (3, 0, None):
            with pytest.raises(GateNotPassed):
                client.move_alias("team/bot", "prod", wire.AliasRequest(version="v1"), generation=generation)
    assert sent == ["3", "0", None]


def test_lists_of_filters_travel_joined_and_absent_ones_not_at_all() -> None:
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, json={"items": [], "cursor": None})

    with client_of(answer) as client:
        client.compatible("llama@r2", fit=("exact", "derived"), engine=None, max_rank=8)
    assert asked[0].url.path == "/v1/bases/llama@r2/adapters"
    assert dict(asked[0].url.params) == {"fit": "exact,derived", "max_rank": "8"}


@given(st.lists(st.lists(st.text(max_size=3), max_size=4), min_size=1, max_size=5))
def test_every_gives_all_items_of_all_pages_in_order(pages: list[list[str]]) -> None:
    def page_after(cursor: str | None) -> wire.Page[wire.Health]:
        number = int(cursor or 0)
        more = str(number + 1) if number + 1 < len(pages) else None
        return wire.Page(items=[wire.Health(version=text) for text in pages[number]], cursor=more)

    assert [item.version for item in every(page_after)] == [text for page in pages for text in page]


# ── events ───────────────────────────────────────────────────────────────────


class Broken(httpx.SyncByteStream):
    """A stream that ends in a reset."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __iter__(self) -> Iterator[bytes]:
        yield self.data
        raise httpx.ReadError("connection reset by peer")


def sse(*numbers: int, end: bool = False) -> bytes:
    at = datetime.now(UTC).isoformat()
    data = {"attempt": 1, "kind": "progress", "data": {}, "at": at}
    lines = [f": waiting\n\nid: {number}\nevent: job\ndata: {json.dumps(data)}\n\n" for number in numbers]
    return "".join([*lines, "event: end\ndata: {}\n\n" if end else ""]).encode()


def test_a_broken_stream_of_events_goes_on_behind_the_last_one() -> None:
    streams = iter([
        httpx.Response(200, stream=Broken(sse(1, 2))),
        httpx.Response(503),
        httpx.Response(200, stream=Broken(sse(3) + b"id: 4\nevent: jo")),
        httpx.Response(200, content=sse(4, 5, end=True)),
    ])  # fmt: skip
    behind: list[str] = []
    job = wire.JobInfo(
        id="j1", kind="finetune", queue="cpu", state="running", namespace="team", recipe={}, output={}, attempt=1,
        max_attempts=3, worker=None, lease_until=None, cancel_requested=False, progress=None, result=None, error=None,
        campaign=None, created_at=datetime.now(UTC), started_at=None, finished_at=None,
    )  # fmt: skip

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/events"):
            behind.append(request.headers["last-event-id"])
            return next(streams)
        return httpx.Response(200, content=job.model_dump_json())

    with client_of(answer) as client:
        assert [event.id for event in client.events("j1")] == [1, 2, 3, 4, 5]
    assert behind == ["0", "2", "2", "3"]


# ── the client and the API are one contract ──────────────────────────────────

ARGUMENTS: dict[str, Any] = {
    "after": 0, "move": "yank", "webhook_id": "w1", "adapter": "team/bot", "namespace": "team",
    "request": None, "kind": "dataset", "name": "team/bot", "push_id": "p1", "token_id": "t1", "manifests": [],
    "ref": "llama@r1", "base": "llama@r1", "a": "llama@r1", "b": "llama@r2", "version": "v1", "alias": "prod",
    "fingerprint": "sha256:1", "policy": Policy(), "job_id": "j1", "attempt": 1, "campaign_id": "c1",
    "schedule_id": "s1", "line": "llama",
}  # fmt: skip
NOT_ROUTES = {"close", "on_behalf"}


def test_every_method_calls_a_route_that_the_api_has(tmp_path: Path) -> None:
    with live.registry(tmp_path) as registry:
        paths = create_app(registry.parts).openapi()["paths"]
    routes = [
        (method.upper(), re.compile(re.sub(r"\{[^}]*\}", "[^/]+", path)), path)
        for path, methods in paths.items()
        for method in methods
    ]
    called = set()

    def record(request: httpx.Request) -> httpx.Response:
        for method, pattern, path in routes:
            if method == request.method and pattern.fullmatch(request.url.path):
                called.add((method, path))
                raise _Found
        raise AssertionError(f"no route {request.method} {request.url.path}")

    with client_of(record) as client:
        for name, method in inspect.getmembers(client, inspect.ismethod):
            if name.startswith("_") or name in NOT_ROUTES:
                continue
            wanted = inspect.signature(method).parameters.values()
            given = {
                parameter.name: ARGUMENTS[parameter.name]
                for parameter in wanted
                if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
            }
            if name == "fsck":
                given["request"] = wire.FsckRequest()
            if "manifests" in given:
                given["manifests"] = [f"sha256:{'0' * 64}"]
            with pytest.raises(_Found):
                list(method(**given))
    asked: list[Callable[[RegistryClient], object]] = [  # the kinds that the loop above did not choose
        lambda client: client.open_push("adapter", "team/bot", wire.PushRequest(manifest={})),
        lambda client: client.open_push("suite", "team/bot", wire.PushRequest(manifest={})),
        lambda client: client.datasets("suite"),
        lambda client: client.dataset("suite", "team/bot"),
        lambda client: client.policy("team"),
        lambda client: client.set_policy("team", Policy()),
        lambda client: client.open_push("base", None, wire.PushRequest(manifest={})),
    ]
    for ask in asked:
        with client_of(record) as client, pytest.raises(_Found):
            ask(client)
    for_prometheus = {("GET", "/metrics")}
    assert {(method, path) for method, _, path in routes} - called == for_prometheus


class _Found(Exception):  # noqa: N818
    """The request met a route."""


@pytest.mark.parametrize("token", ["lora_a_secret x", "lora_a_sec\nret", "lora_a_secrét"])
def test_a_token_that_is_none_is_refused_and_not_shown(token: str) -> None:
    with pytest.raises(TokenRefused) as caught:
        RegistryClient("http://registry.test", token)
    assert "secr" not in str(caught.value)
    RegistryClient("http://registry.test", " lora_a_secret\n").close()
