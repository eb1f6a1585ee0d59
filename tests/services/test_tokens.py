"""Tokens: shown once, stored hashed; nobody gives more than an admin of that namespace holds."""

from dataclasses import replace
from typing import Any

import pytest
from sqlmodel import select

from registry.core.errors import BadName, BadRequest, MoveNotAllowed, ScopeMissing, TokenNotFound, TokenRefused
from registry.db.models import Token
from registry.schemas import SCOPES
from registry.services import tokens
from registry.services.tokens import Caller
from tests.world import ADMIN, World, caller


@pytest.fixture
def here(database: Any, local_store: Any) -> World:
    return World(database, local_store)


def create(world: World, who: Caller = ADMIN, **changes: Any) -> tuple[Token, str]:
    wanted = {"name": "t", "kind": "user", "scopes": {"team": ["read"]}, "queues": [], "expires_in": None} | changes
    with world.database.write() as session:
        return tokens.create(session, who, **wanted, now=world.now)


def who_is(world: World, text: str) -> Caller:
    with world.database.read() as session:
        return tokens.authenticate(session, text, world.now)


def test_a_token_is_its_callers_scopes_and_only_its_hash_is_kept(here: World) -> None:
    row, text = create(here, scopes={"team": ["publish", "read"], "*": ["read"]})
    assert who_is(here, text) == Caller(row.id, "t", "user", {"team": ["read", "publish"], "*": ["read"]})
    assert text.split("_", 2)[2] not in str(here.one(select(Token)).model_dump())


@pytest.mark.parametrize(
    "text", ["", "x", "lora_", "lora_a_b", "lora__" + "s" * 30, "other_abc_" + "s" * 30, "lora_a\0b_" + "s" * 30]
)
def test_what_has_not_the_form_of_a_token_is_refused_unasked(here: World, text: str) -> None:
    with pytest.raises(TokenRefused, match="lora_ID_SECRET"):
        who_is(here, text)


def test_unknown_wrong_expired_and_revoked_tokens_are_refused(here: World) -> None:
    row, text = create(here, expires_in=10.0)
    assert who_is(here, text).expires_at is not None
    for other in (tokens.make_text(), f"lora_{row.id}_{'x' * 43}"):
        with pytest.raises(TokenRefused, match="unknown"):
            who_is(here, other)
    here.later(seconds=10)
    with pytest.raises(TokenRefused, match="expired"):
        who_is(here, text)
    second, text = create(here)
    with here.database.write() as session:
        tokens.revoke(session, ADMIN, second.id, here.now)
    with pytest.raises(TokenRefused, match="revoked"):
        who_is(here, text)
    with here.database.write() as session, pytest.raises(MoveNotAllowed):
        tokens.revoke(session, ADMIN, second.id, here.now)


def test_only_an_admin_of_every_namespace_named_gives_scopes_there(here: World) -> None:
    lead = caller("lead", team=["admin"], other=["publish"])
    assert create(here, lead)[0].scopes == {"team": ["read"]}
    for scopes in ({"other": ["read"]}, {"team": ["read"], "other": ["read"]}, {"*": ["read"]}):
        with pytest.raises(ScopeMissing):
            create(here, lead, scopes=scopes)
    with pytest.raises(ScopeMissing):
        create(here, lead, kind="worker", scopes={}, queues=["cpu"])


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"scopes": {}}, BadRequest), ({"scopes": {"team": []}}, BadRequest), ({"queues": ["cpu"]}, BadRequest),
        ({"scopes": {"Team!": ["read"]}}, BadName), ({"kind": "worker"}, BadRequest),
        ({"kind": "worker", "scopes": {}}, BadRequest), ({"kind": "worker", "scopes": {}, "queues": ["A b"]}, BadName),
    ],
)  # fmt: skip
def test_a_token_that_means_nothing_is_refused(here: World, changes: dict[str, Any], refusal: type[Exception]) -> None:
    with pytest.raises(refusal):
        create(here, **changes)


def test_a_list_shows_what_one_administers_and_the_rest_is_not_there(here: World) -> None:
    mine, _ = create(here)
    theirs, _ = create(here, scopes={"team": ["read"], "other": ["read"]})
    worker, _ = create(here, kind="worker", scopes={}, queues=["cpu"])
    lead = caller("lead", team=["admin"])
    with here.database.read() as session:
        assert [row.id for row in tokens.listed(session, lead)] == [mine.id]
        assert {row.id for row in tokens.listed(session, ADMIN)} == {mine.id, theirs.id, worker.id}
        with pytest.raises(ScopeMissing):
            tokens.listed(session, caller("reader", team=["read"]))
    for other in (theirs.id, worker.id, "missing"):
        with here.database.write() as session, pytest.raises(TokenNotFound):
            tokens.revoke(session, lead, other, here.now)


def test_ones_own_token_may_always_be_revoked(here: World) -> None:
    row, text = create(here)
    with here.database.write() as session:
        tokens.revoke(session, who_is(here, text), row.id, here.now)


def test_a_worker_can_nothing_that_a_user_can() -> None:
    worker = Caller("w", "w", "worker", {"queues": ["cpu"]})
    assert worker.queues() == ["cpu"]
    assert replace(worker, kind="user").queues() == []
    assert not any(worker.can(scope, name) for scope in SCOPES for name in ("queues", "*", "team"))
    assert worker.readable() == []


def test_admin_covers_every_scope_of_its_namespace_only() -> None:
    lead = caller("lead", team=["admin"])
    assert all(lead.can(scope, "team") for scope in SCOPES)
    assert not any(lead.can(scope, "other") for scope in SCOPES)
    assert lead.readable() == ["team"]
    assert ADMIN.readable() is None


def test_a_token_of_the_settings_is_made_once_and_never_changes_its_secret(here: World) -> None:
    text = tokens.make_text()
    more: dict[str, Any] = {"name": "admin", "kind": "user", "scopes": {"*": ["admin"]}, "now": here.now}
    for _ in range(2):
        with here.database.write() as session:
            tokens.ensure(session, text, **more)
    assert who_is(here, text).can("admin", "anything")
    other = f"lora_{text.split('_')[1]}_{'y' * 43}"
    with here.database.write() as session, pytest.raises(TokenRefused, match="another secret"):
        tokens.ensure(session, other, **more)
