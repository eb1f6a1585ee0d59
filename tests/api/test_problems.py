"""The table from refusal to status is complete, and nothing that goes wrong is answered in another form."""

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text

from registry.api.app import create_app
from registry.api.deps import AppParts
from registry.api.problems import STATUS, status_of
from registry.broker import Broker
from registry.core import errors
from registry.schemas import Problem
from registry.services import tokens
from tests.world import SETTINGS, World


@pytest.fixture
def api(embedded: World) -> Iterator[TestClient]:
    token = tokens.make_text()
    with embedded.database.write() as session:
        tokens.ensure(session, token, name="a", kind="user", scopes={"*": ["admin"]}, now=embedded.now)
    parts = AppParts(SETTINGS, embedded.database, embedded.store, Broker("memory://"))
    headers = {"authorization": f"Bearer {token}"}
    with TestClient(create_app(parts), headers=headers, raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize("refusal", errors.refusals(), ids=lambda refusal: refusal.code)
def test_every_refusal_has_a_status(refusal: type[errors.LoractlError]) -> None:
    assert 400 <= status_of(refusal) <= 507


def test_no_row_of_the_table_is_idle() -> None:
    used = {next(cls for cls in refusal.__mro__ if cls in STATUS) for refusal in errors.refusals()}
    idle = set(STATUS) - used
    assert idle <= {errors.Invalid, errors.LocalFailure}


@pytest.mark.parametrize(
    ("refusal", "status"),
    [
        (errors.BadName, 400), (errors.TokenMissing, 401), (errors.ScopeMissing, 403), (errors.AdapterNotFound, 404),
        (errors.NoCompatibleVersion, 409), (errors.PushExpired, 410), (errors.AliasMoved, 412),
        (errors.FileTooLarge, 413), (errors.GateNotPassed, 422), (errors.EvidenceTooWeak, 422),
        (errors.DatabaseDown, 503), (errors.WriteConflict, 503), (errors.StorageFull, 507),
    ],
)  # fmt: skip
def test_statuses_of_the_branches(refusal: type[errors.LoractlError], status: int) -> None:
    assert status_of(refusal) == status


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/nowhere", None, 404, "route-not-found"),
        ("PATCH", "/v1/adapters", None, 404, "route-not-found"),
        ("POST", "/v1/tokens", b"{", 400, "bad-request"),
        ("POST", "/v1/tokens", b"\xff\xfe", 400, "bad-request"),
        ("POST", "/v1/tokens", b'{"name": "x", "scopes": {}, "surprise": 1}', 400, "bad-request"),
        ("POST", "/v1/tokens", b'{"name": "x", "scopes": {"team": ["read"]}, "expires_in": 1e300}', 400, "bad-request"),
        ("POST", "/v1/tokens", b'{"name": "\\ud800", "scopes": {"team": ["read"]}}', 400, "bad-request"),
        ("GET", "/v1/adapters?limit=0", None, 400, "bad-request"),
        ("GET", "/v1/adapters?cursor=x", None, 400, "bad-request"),
        ("GET", "/v1/adapters?cursor=WzEsMl0", None, 400, "bad-request"),
        ("GET", f"/v1/adapters?cursor={'W1tb' * 9000}", None, 400, "bad-request"),
        ("GET", "/v1/adapters/team/bot/versions/v99999999999999999999", None, 400, "bad-reference"),
        ("GET", "/v1/adapters/Team/bot", None, 400, "bad-name"),
        ("GET", "/v1/resolve?ref=team/bot", None, 404, "adapter-not-found"),
        ("GET", "/v1/bases/nothing", None, 404, "base-not-found"),
    ],
)
def test_what_is_wrong_with_a_request_is_a_problem(
    api: TestClient, method: str, path: str, body: bytes | None, status: int, code: str
) -> None:
    answer = api.request(method, path, content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.headers["content-type"] == "application/problem+json"
    problem = Problem.model_validate(answer.json())
    assert problem.request == answer.headers["x-request-id"]
    assert isinstance(errors.LoractlError.from_problem(answer.json()), errors.LoractlError.by_code[code])


def test_a_refusal_to_who_is_not_known_says_how_to_be(api: TestClient) -> None:
    answer = api.get("/v1/whoami", headers={"authorization": "Basic x"})
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")


def test_a_database_that_is_down_is_503_and_says_when_to_come_back(api: TestClient, embedded: World) -> None:
    with embedded.database.write() as session:
        session.connection().execute(text("DROP TABLE adapters"))
    answer = api.get("/v1/adapters")
    assert (answer.status_code, answer.json()["code"]) == (503, "database-down")
    assert answer.headers["retry-after"] == "2"


def test_a_failure_of_ours_names_its_request_and_nothing_else(api: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the secret plan")

    monkeypatch.setattr("registry.services.tokens.listed", broken)
    answer = api.get("/v1/tokens", headers={"x-request-id": "r123"})
    assert (answer.status_code, answer.json()["code"]) == (500, "internal-error")
    assert answer.json()["facts"] == {"request": "r123"}
    assert "secret plan" not in answer.text


def test_a_request_keeps_the_id_it_came_with(api: TestClient) -> None:
    assert api.get("/health", headers={"x-request-id": "abc123"}).headers["x-request-id"] == "abc123"
    assert api.get("/health", headers={"x-request-id": "a b;c"}).headers["x-request-id"] != "a b;c"
