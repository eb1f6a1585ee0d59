"""Signing in at an identity provider: the authorisation code with PKCE, brought back to a port of this machine.

RFC 8252 (a native application's browser and loopback port), RFC 7636 (PKCE). The token that comes back is checked
by the registry, on every request; here only the nonce is, so that it is the answer to our question.
"""

import base64
import hashlib
import json
import secrets
import webbrowser
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from time import monotonic
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlencode, urlsplit

from registry.core.errors import ProviderDown, SignInFailed

if TYPE_CHECKING:
    from registry.schemas import SignIn

PATIENCE_S = 300.0
DONE = b"<!doctype html><title>loractl</title><p>You may close this page and go back to the terminal."


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


def sign_in(offer: "SignIn", say: Callable[[str], None]) -> str:
    """The provider's ID token for whoever signs in; `SignInFailed`, `ProviderDown`."""
    import httpx

    issuer = offer.issuer
    verifier, state, nonce = (secrets.token_urlsafe(48) for _ in range(3))
    challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
    try:
        with httpx.Client(timeout=30) as http, _Listener(("127.0.0.1", 0), _Page) as listener:
            about = http.get(f"{issuer.rstrip('/')}/.well-known/openid-configuration").raise_for_status().json()
            back = f"http://127.0.0.1:{listener.server_port}/"
            asked = {
                "response_type": "code", "client_id": offer.client_id, "redirect_uri": back, "scope": offer.scope,
                "state": state, "nonce": nonce, "code_challenge": challenge, "code_challenge_method": "S256",
            }  # fmt: skip
            url = f"{about['authorization_endpoint']}?{urlencode(asked)}"
            say(f"Sign in here, if no browser opens by itself:\n{url}")
            webbrowser.open(url)
            code = _code(listener, state, issuer)
            given = {
                "grant_type": "authorization_code", "code": code, "redirect_uri": back, "client_id": offer.client_id,
                "code_verifier": verifier,
            }  # fmt: skip
            reply = http.post(about["token_endpoint"], data=given)
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise ProviderDown(issuer=issuer, reason=str(error)[:200] or type(error).__name__) from error
    try:
        token = str(reply.json()["id_token"])
        body = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise SignInFailed(issuer=issuer, reason=f"HTTP {reply.status_code} {reply.text[:200]}") from error
    if claims.get("nonce") != nonce:
        raise SignInFailed(issuer=issuer, reason="the answer is not to our question (nonce)")
    return token


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
