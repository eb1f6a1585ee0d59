"""Bodies of requests: none without a token, none over the bound, and nothing is read to find that out."""

import json
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest

from registry.api import app
from registry.api.deps import AppParts
from registry.broker import Broker
from registry.services import tokens
from tests import servers
from tests.world import SETTINGS, World

LIMIT = 10_000


@pytest.fixture
def token(embedded: World) -> str:
    text = tokens.make_text()
    with embedded.database.write() as session:
        tokens.ensure(session, text, name="a", kind="user", scopes={"*": ["admin"]}, now=embedded.now)
    return text


@pytest.fixture
def url(embedded: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(app, "MAX_BODY_BYTES", LIMIT)
    parts = AppParts(SETTINGS, embedded.database, embedded.store, Broker("memory://"))
    with servers.served(lambda _: app.create_app(parts)) as found:
        yield found


def announce(url: str, *headers: str) -> tuple[int, str]:
    """Say that a body will come, and send none: the status and code of the answer."""
    address = urlsplit(url)
    with socket.create_connection((str(address.hostname), address.port or 0), timeout=30) as connection:
        lines = ["POST /v1/jobs HTTP/1.1", "host: x", "content-type: application/json", *headers, "", ""]
        connection.sendall("\r\n".join(lines).encode())
        answer = b""
        while b"}}" not in answer and (more := connection.recv(65536)):
            answer += more
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"application/problem+json" in head
    return int(head.split()[1]), json.loads(body)["code"]


@pytest.mark.parametrize("header", ["content-length: 1000", "transfer-encoding: chunked"])
def test_a_body_without_a_token_is_not_waited_for(url: str, header: str) -> None:
    assert announce(url, header) == (401, "token-missing")


@pytest.mark.parametrize("header", ["content-length: 1000", "transfer-encoding: chunked"])
@pytest.mark.parametrize("scheme", ["Bearer", "Basic"])
def test_a_body_behind_a_token_that_is_none_is_not_waited_for(url: str, header: str, scheme: str) -> None:
    sent = announce(url, header, f"authorization: {scheme} {tokens.make_text()}")
    assert sent == (401, "token-refused" if scheme == "Bearer" else "token-missing")


def test_the_refusal_of_a_token_is_the_same_with_and_without_a_body(url: str, http: httpx.Client) -> None:
    headers = {"authorization": f"Bearer {tokens.make_text()}", "x-request-id": "same"}
    with_body = http.post(f"{url}/v1/tokens", json={"name": "x"}, headers=headers)
    without = http.get(f"{url}/v1/tokens", headers=headers)
    assert (with_body.status_code, with_body.json()) == (without.status_code, without.json())
    assert with_body.headers["www-authenticate"] == without.headers["www-authenticate"]


def test_a_body_that_announces_too_much_is_not_waited_for(url: str, token: str) -> None:
    sent = announce(url, f"content-length: {LIMIT + 1}", f"authorization: Bearer {token}")
    assert sent == (413, "body-too-large")


def test_a_body_of_unknown_length_is_counted(url: str, token: str, http: httpx.Client) -> None:
    headers = {"authorization": f"Bearer {token}", "content-type": "application/json"}
    body = b'{"name": "x", "scopes": {"team": ["read"]}}'
    within = http.post(f"{url}/v1/tokens", content=iter([b" " * (LIMIT - len(body)), body]), headers=headers)
    assert within.status_code == 201
    over = http.post(f"{url}/v1/tokens", content=iter([b" " * LIMIT, body]), headers=headers)
    assert (over.status_code, over.json()["code"]) == (413, "body-too-large")
    assert over.json()["facts"] == {"method": "POST", "path": "/v1/tokens", "limit": LIMIT}
    assert over.headers["x-request-id"] == over.json()["request"]


def test_a_route_without_a_body_reads_none(url: str, token: str, http: httpx.Client) -> None:
    headers = {"authorization": f"Bearer {token}"}
    assert http.get(f"{url}/v1/whoami", headers=headers).status_code == 200
    assert http.get(f"{url}/health").status_code == 200
