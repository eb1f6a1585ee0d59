"""Sign-in by OpenID Connect, at a real provider in a process of its own."""

import base64
import hashlib
import hmac
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from joserfc import jwt
from joserfc.jwk import KeySet, RSAKey
from sqlmodel import select

from cli import signin
from cli.main import run
from registry.api.app import create_app
from registry.api.deps import AppParts
from registry.broker import Broker
from registry.core.errors import ProviderDown, SignInFailed, TokenRefused
from registry.db.models import Token
from registry.oidc import Provider
from registry.schemas import SignIn
from registry.services import tokens
from registry.settings import BadSetting, Grant, OidcSettings
from tests import live, servers
from tests.world import SETTINGS, World

ADA = {"sub": "ada", "email": "ada@example.org", "groups": ["ml", "all"]}
BOB = {"sub": "bob", "email": "bob@example.org", "groups": ["sales"]}
TABLE = (
    Grant("groups", "ml", {"team": ["read", "publish"]}),
    Grant("groups", "all", {"team": ["run"], "shared": ["read"]}),
    Grant("email", "carol@example.org", {"*": ["admin"]}),
)


@pytest.fixture(scope="module")
def issuer() -> Iterator[str]:
    with servers.oidc_provider(ADA, BOB) as found:
        yield found


def settings_of(issuer: str) -> OidcSettings:
    return OidcSettings(issuer, "loractl", "loractl", TABLE)


@dataclass
class Api:
    client: TestClient
    world: World
    issuer: str

    def ask(self, token: str) -> Any:
        return self.client.get("/v1/whoami", headers={"authorization": f"Bearer {token}"})


@pytest.fixture
def api(world: World, issuer: str) -> Iterator[Api]:
    world.later(seconds=2)  # the world's clock stands still, the provider's does not
    settings = replace(SETTINGS, oidc=settings_of(issuer))
    parts = AppParts(settings, world.database, world.store, Broker("memory://"), world.clock)
    with TestClient(create_app(parts)) as client:
        yield Api(client, world, issuer)


def approve(url: str, who: str) -> httpx.Response:
    """What a person does in a browser: says who they are, and is sent back."""
    return httpx.post(url, data={"sub": who}, timeout=30)


def id_token(issuer: str, who: str, client_id: str = "loractl") -> str:
    asked = {
        "response_type": "code", "client_id": client_id, "redirect_uri": "http://127.0.0.1/", "scope": "openid email",
        "state": "s", "nonce": "n",
    }  # fmt: skip
    back = approve(str(httpx.URL(f"{issuer}/oauth2/authorize", params=asked)), who).headers["location"]
    given = {
        "grant_type": "authorization_code", "code": httpx.URL(back).params["code"], "client_id": client_id,
        "redirect_uri": "http://127.0.0.1/",
    }  # fmt: skip
    answer = httpx.post(f"{issuer}/oauth2/token", data=given, auth=(client_id, "any")).raise_for_status().json()
    found: str = answer["id_token"]
    return found


def test_claims_become_scopes_by_the_table_and_nothing_else(api: Api) -> None:
    me = api.ask(id_token(api.issuer, "ada")).json()
    assert (me["name"], me["kind"]) == ("ada@example.org", "user")
    assert me["scopes"] == {"team": ["read", "publish", "run"], "shared": ["read"]}
    assert api.ask(id_token(api.issuer, "ada")).json()["id"] == me["id"]  # the same person, by another token
    refused = api.ask(id_token(api.issuer, "bob"))
    assert (refused.status_code, refused.json()["code"]) == (401, "token-refused")
    assert "no row" in refused.json()["detail"]


def test_a_token_that_does_not_hold_opens_nothing(api: Api) -> None:
    good = id_token(api.issuer, "ada")
    assert api.ask(good).status_code == 200
    head, body, signature = good.split(".")
    claims = json.loads(base64.urlsafe_b64decode(body + "=="))
    told = json.loads(base64.urlsafe_b64decode(head + "=="))
    forger = RSAKey.generate_key(2048)
    public = httpx.get(f"{api.issuer}/jwks").json()["keys"][0]
    carol = encoded(claims | {"email": "carol@example.org"})
    with servers.oidc_provider(ADA) as other:
        forged = {
            "signed by another key": jwt.encode(told | {"alg": "RS256"}, claims, forger),
            "changed": f"{head}.{carol}.{signature}",
            "unsigned": f"{encoded({'alg': 'none'})}.{carol}.",
            "signed by what everybody reads": hs256(told, carol, json.dumps(public).encode()),
            "cut off": good[:-10],
            "of another provider": id_token(other, "ada"),
            "with a head that is too deep": f"{base64.urlsafe_b64encode(b'[' * 9000).decode()}.{body}.{signature}",
            "for another client": id_token(api.issuer, "ada", "another"),
        }
    for how, token in forged.items():
        answer = api.ask(token)
        assert (answer.status_code, answer.json()["code"]) == (401, "token-refused"), how
    api.world.later(hours=2)
    assert api.ask(id_token(api.issuer, "ada")).status_code == 401  # its time is over by our clock


@pytest.mark.parametrize("change", [{"exp": 1e300}, {"sub": "\0"}, {"email": "a\0b"}])
def test_claims_that_nobody_can_write_down_are_refused(change: dict[str, Any]) -> None:
    key = RSAKey.generate_key(2048, {"kid": "k"})

    class Signed(Provider):
        def _published(self) -> KeySet:
            return KeySet([key])

    now = datetime(2026, 1, 1, tzinfo=UTC)
    claims = ADA | {"iss": "https://x.example", "aud": "loractl", "exp": int(now.timestamp()) + 60}
    provider = Signed(settings_of("https://x.example"), lambda: now)
    assert provider.person(jwt.encode({"alg": "RS256", "kid": "k"}, claims, key)).name == "ada@example.org"
    with pytest.raises(TokenRefused):
        provider.person(jwt.encode({"alg": "RS256", "kid": "k"}, claims | change, key))


def encoded(value: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def hs256(head: dict[str, Any], body: str, key: bytes) -> str:
    signed = f"{encoded(head | {'alg': 'HS256'})}.{body}"
    digest = hmac.new(key, signed.encode(), hashlib.sha256).digest()
    return f"{signed}.{base64.urlsafe_b64encode(digest).rstrip(b'=').decode()}"


def test_who_is_revoked_here_stays_out_and_gets_no_secret(api: Api) -> None:
    token = id_token(api.issuer, "ada")
    me = api.ask(token).json()["id"]
    mine = {"authorization": f"Bearer {token}"}
    rotated = api.client.post(f"/v1/tokens/{me}/rotate", json={}, headers=mine)
    assert (rotated.status_code, rotated.json()["facts"]["state"]) == (409, "an identity provider's")
    assert api.client.delete(f"/v1/tokens/{me}", headers=mine).status_code == 200
    for again in (token, id_token(api.issuer, "ada")):
        assert "revoked" in api.ask(again).json()["detail"]


def test_what_they_left_to_be_done_goes_on_for_a_while_with_the_scopes_of_their_last_sign_in(api: Api) -> None:
    me = api.ask(id_token(api.issuer, "ada")).json()["id"]
    with api.world.database.read() as session:
        assert tokens.acting(session, me, api.world.now).scopes["team"] == ["read", "publish", "run"]
    api.world.later(days=31)
    with api.world.database.read() as session, pytest.raises(TokenRefused):
        tokens.acting(session, me, api.world.now)


def test_first_sign_ins_of_one_person_at_once_make_one_row(api: Api) -> None:
    made = [id_token(api.issuer, "ada") for _ in range(8)]
    answers: list[int] = []
    threads = [threading.Thread(target=lambda t=t: answers.append(api.ask(t).status_code)) for t in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 8
    assert [row.name for row in api.world.all(select(Token))] == ["ada@example.org"]


def test_a_provider_that_is_away_is_said_and_known_keys_go_on(world: World) -> None:
    world.later(seconds=2)
    with servers.oidc_provider(ADA) as issuer:
        knows, new = (Provider(settings_of(issuer), world.clock) for _ in range(2))
        token = id_token(issuer, "ada")
        knows.person(token)
    assert knows.person(token).name == "ada@example.org"
    with pytest.raises(ProviderDown):
        new.person(token)


@pytest.mark.parametrize("scopes", [{"team": ["fly"]}])
def test_a_table_that_gives_what_there_is_not_is_refused_at_the_start(world: World, scopes: dict[str, Any]) -> None:
    with pytest.raises(BadSetting, match="fly"):
        Provider(OidcSettings("http://localhost", "x", "x", (Grant("a", "b", scopes),)), world.clock)


def logged_out(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Nobody is logged in anywhere, and who logs in is kept in ``folder``."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
    monkeypatch.delenv("LORACTL_URL", raising=False)
    monkeypatch.delenv("LORACTL_TOKEN", raising=False)


def test_login_opens_the_provider_that_the_registry_names_and_keeps_what_it_gives(
    tmp_path: Path, issuer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logged_out(monkeypatch, tmp_path)

    def browser(url: str) -> bool:
        def person() -> None:
            back = approve(url, "ada").headers["location"]
            httpx.get(str(httpx.URL(back).copy_set_param("state", "guessed")))  # is not listened to
            httpx.get(back)

        threading.Thread(target=person).start()
        return True

    monkeypatch.setattr("webbrowser.open", browser)
    (tmp_path / "registry").mkdir()
    with live.registry(tmp_path / "registry", oidc=settings_of(issuer)) as found:
        with found.client("none") as stranger:
            assert stranger.sign_in_offer().oidc == SignIn(
                issuer=issuer, client_id="loractl", scope="openid email profile"
            )
        assert run(["login", found.url]) == 0
        capsys.readouterr()
        assert run(["whoami", "--json"]) == 0
        me = json.loads(capsys.readouterr().out)
    assert (me["name"], me["scopes"]["shared"]) == ("ada@example.org", ["read"])


def test_where_there_is_no_browser_one_signs_in_on_another_machine(
    tmp_path: Path, issuer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logged_out(monkeypatch, tmp_path)
    heard: list[str] = []

    def person(_: float) -> None:
        heard.append(capsys.readouterr().err)
        where, code = re.findall(r"open (\S+) and give it the code (\S+)", "".join(heard))[0]
        if len(heard) == 3:  # takes a while
            httpx.post(where, data={"user_code": code, "sub": "ada", "action": "authorize"}).raise_for_status()

    monkeypatch.setattr(signin.sign_in_elsewhere, "__defaults__", (person,))
    (tmp_path / "registry").mkdir()
    with live.registry(tmp_path / "registry", oidc=settings_of(issuer)) as found:
        assert run(["login", found.url, "--device"]) == 0
        assert len(heard) == 3
        capsys.readouterr()
        assert run(["whoami", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "ada@example.org"


def test_who_asks_too_often_is_slower_from_then_on_and_who_is_denied_hears_it(issuer: str) -> None:
    said: list[str] = []
    waits: list[float] = []

    def person(pause_s: float) -> None:
        waits.append(pause_s)
        if len(waits) == 4:
            where, code = re.findall(r"open (\S+) and give it the code (\S+)", said[0])[0]
            httpx.post(where, data={"user_code": code, "sub": "ada", "action": "deny"}).raise_for_status()

    offer = SignIn(issuer=issuer, client_id="loractl", scope="openid email profile")
    with pytest.raises(SignInFailed, match="access_denied"):
        signin.sign_in_elsewhere(offer, said.append, person)
    assert waits == [1, 1, 6, 11]  # nobody really waited


def test_a_provider_without_sign_in_for_devices_or_that_is_away_is_said() -> None:
    with servers.oidc_provider(ADA, devices=False) as issuer:
        offer = SignIn(issuer=issuer, client_id="loractl", scope="openid")
        with pytest.raises(SignInFailed, match="no sign-in for machines without a browser"):
            signin.sign_in_elsewhere(offer, print)
    with pytest.raises(ProviderDown):
        signin.sign_in_elsewhere(offer, print)


def test_a_registry_without_a_provider_has_nowhere_to_sign_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with live.registry(tmp_path) as found:
        assert run(["login", found.url, "--device"]) == 2
    assert "knows no identity provider" in capsys.readouterr().err
    assert run(["login", "http://127.0.0.1:1", "--device", "--token", "t"]) == 2
