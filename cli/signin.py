"""Signing in at an identity provider, on this machine's browser or on another machine's.

Here: the authorisation code with PKCE, brought back to a port of this machine. RFC 8252 (a native application's browser
and loopback port), RFC 7636 (PKCE). Elsewhere: a code that is typed in there while we ask whether it was. RFC 8628.

The token that comes back is checked by the registry, on every request; here only the nonce is, so that it is the answer
to our question (a device's code is bound to us by itself).
"""

import base64
import hashlib
import json
import secrets
import time
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from time import monotonic
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlencode, urlsplit

from registry.core.errors import ProviderDown, SignInFailed

if TYPE_CHECKING:
    import httpx

    from registry.schemas import SignIn

PATIENCE_S = 300.0
LONGEST_PAUSE_S = 60.0
DONE = b"<!doctype html><title>loractl</title><p>You may close this page and go back to the terminal."
Say = Callable[[str], None]


class _Listener(HTTPServer):
    """Waits for the browser to come back."""

    answer: dict[str, list[str]]


class _Page(BaseHTTPRequestHandler):
    server: _Listener

    def do_GET(self) -> None:
        """Take the answer, whoever brings it: the state says whether it is ours."""
        found = parse_qs(urlsplit(self.path).query)
        self.send_response(200 if found else 404)
        self.send_header("content-type", "text/html")
        self.end_headers()
        self.wfile.write(DONE if found else b"")
        if found:
            self.server.answer = found

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the address holds the code."""


def sign_in(offer: "SignIn", say: Say) -> str:
    """The provider's ID token for whoever signs in in a browser here; `SignInFailed`, `ProviderDown`."""
    verifier, state, nonce = (secrets.token_urlsafe(48) for _ in range(3))
    challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
    with _asking(offer.issuer) as (http, about), _Listener(("127.0.0.1", 0), _Page) as listener:
        back = f"http://127.0.0.1:{listener.server_port}/"
        asked = {
            "response_type": "code", "client_id": offer.client_id, "redirect_uri": back, "scope": offer.scope,
            "state": state, "nonce": nonce, "code_challenge": challenge, "code_challenge_method": "S256",
        }  # fmt: skip
        url = f"{about['authorization_endpoint']}?{urlencode(asked)}"
        say(f"Sign in here, if no browser opens by itself (on a machine without one: --device):\n{url}")
        webbrowser.open(url)
        code = _code(listener, state, offer.issuer)
        given = {
            "grant_type": "authorization_code", "code": code, "redirect_uri": back, "client_id": offer.client_id,
            "code_verifier": verifier,
        }  # fmt: skip
        reply = http.post(about["token_endpoint"], data=given)
    token, claims = _id_token(reply, offer.issuer)
    if claims.get("nonce") != nonce:
        raise SignInFailed(issuer=offer.issuer, reason="the answer is not to our question (nonce)")
    return token


def sign_in_elsewhere(offer: "SignIn", say: Say, wait: Callable[[float], None] = time.sleep) -> str:
    """The provider's ID token for whoever signs in on another machine; `SignInFailed`, `ProviderDown`."""
    import httpx

    issuer = offer.issuer
    with _asking(issuer) as (http, about):
        if "device_authorization_endpoint" not in about:
            raise SignInFailed(issuer=issuer, reason="it offers no sign-in for machines without a browser")
        who = {"client_id": offer.client_id, "scope": offer.scope}
        reply = http.post(about["device_authorization_endpoint"], data=who)
        if not reply.is_success:
            raise SignInFailed(issuer=issuer, reason=_refusal(reply) or f"HTTP {reply.status_code}")
        ours = reply.json()
        say(f"On any machine with a browser, open {ours['verification_uri']} and give it the code {ours['user_code']}")
        pause_s, deadline = float(ours.get("interval", 5)), monotonic() + float(ours["expires_in"])
        asked = {"grant_type": "urn:ietf:params:oauth:grant-type:device_code", "device_code": ours["device_code"],
                 "client_id": offer.client_id}  # fmt: skip
        while monotonic() < deadline:
            wait(pause_s)
            try:
                reply = http.post(about["token_endpoint"], data=asked)
            except httpx.TransportError:
                reply = httpx.Response(503)
            if reply.is_server_error:
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                continue
            match _refusal(reply):
                case None:
                    return _id_token(reply, issuer)[0]
                case "authorization_pending":
                    pass
                case "slow_down":
                    pause_s += 5
                case reason:
                    raise SignInFailed(issuer=issuer, reason=reason)
    raise SignInFailed(issuer=issuer, reason="nobody signed in while the code was good")


@contextmanager
def _asking(issuer: str) -> "Iterator[tuple[httpx.Client, dict[str, Any]]]":
    """A client, and what the provider says of itself; what it does not answer, or not rightly, is `ProviderDown`."""
    import httpx

    try:
        with httpx.Client(timeout=30) as http:
            yield http, http.get(f"{issuer.rstrip('/')}/.well-known/openid-configuration").raise_for_status().json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        raise ProviderDown(issuer=issuer, reason=str(error)[:200] or type(error).__name__) from error


def _refusal(reply: "httpx.Response") -> str | None:
    """The error's code, with what is said of it where that is not of the protocol; None where there is none."""
    if reply.is_success:
        return None
    try:
        body = reply.json()
        code, more = str(body["error"]), body.get("error_description")
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"HTTP {reply.status_code} {reply.text[:200]}"
    return code if code in ("authorization_pending", "slow_down") or not more else f"{code}: {more}"[:200]


def _id_token(reply: "httpx.Response", issuer: str) -> tuple[str, dict[str, Any]]:
    """The token in an answer, and its claims, unchecked."""
    try:
        token = str(reply.json()["id_token"])
        body = token.split(".")[1]
        return token, dict(json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))))
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise SignInFailed(issuer=issuer, reason=f"HTTP {reply.status_code} {reply.text[:200]}") from error


def _code(listener: _Listener, state: str, issuer: str) -> str:
    deadline = monotonic() + PATIENCE_S
    while (left := deadline - monotonic()) > 0:
        listener.timeout, listener.answer = left, {}
        listener.handle_request()
        answer = listener.answer
        if answer.get("state") != [state]:
            continue  # a favicon, or somebody who guesses
        if "code" not in answer:
            why = answer.get("error_description") or answer.get("error") or ["no reason given"]
            raise SignInFailed(issuer=issuer, reason=why[0][:200])
        return answer["code"][0]
    raise SignInFailed(issuer=issuer, reason=f"nobody came back within {PATIENCE_S:.0f} s")
