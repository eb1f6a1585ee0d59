"""An OpenID Connect provider as a process: oidc-provider-mock, and what it lacks for a client without a secret.

That is PKCE, and the device authorization grant (RFC 8628), by authlib as all the rest: people agree to a code with
``POST /device`` (``user_code``, ``sub``, ``action``: authorize or deny).

``python tests/provider.py [--no-devices] --port N --user-claims JSON …``
"""

import base64
import hashlib
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import authlib.integrations.flask_oauth2 as flask_oauth2
import authlib.oauth2.rfc6749 as oauth2
import authlib.oauth2.rfc8628 as devices
import flask
from oidc_provider_mock import __main__ as program
from oidc_provider_mock import _app

CHALLENGES: dict[str, str] = {}
CREDENTIALS: dict[str, "Credential"] = {}
ANSWERS: dict[str, tuple[Any, bool]] = {}
"""Who agreed to a user's code, or did not."""


class CodeWithChallenge(_app.AuthorizationCodeGrant):  # type: ignore[misc]
    """A code that was asked for with a challenge is given away for its verifier; without a secret, for nothing else."""

    TOKEN_ENDPOINT_AUTH_METHODS = ["none", "client_secret_basic", "client_secret_post"]  # noqa: RUF012  # authlib's

    def save_authorization_code(self, code: str, request: object) -> None:
        super().save_authorization_code(code, request)
        if challenge := flask.request.args.get("code_challenge"):
            assert flask.request.args["code_challenge_method"] == "S256"
            CHALLENGES[code] = challenge

    def validate_token_request(self) -> None:
        super().validate_token_request()
        challenge = CHALLENGES.get(flask.request.form["code"])
        verifier = flask.request.form.get("code_verifier", "").encode()
        answer = base64.urlsafe_b64encode(hashlib.sha256(verifier).digest()).rstrip(b"=").decode()
        if challenge != answer if challenge else "authorization" not in flask.request.headers:
            raise oauth2.InvalidGrantError("the verifier does not belong to the challenge")


@dataclass
class Credential(devices.DeviceCredentialMixin):  # type: ignore[misc]
    """A device's code, and the code that people are shown for it."""

    client: str
    scope: str
    user_code: str
    until: float
    asked_at: float = 0.0

    def get_client_id(self) -> str:
        return self.client

    def get_scope(self) -> str:
        return self.scope

    def get_user_code(self) -> str:
        return self.user_code

    def is_expired(self) -> bool:
        return time.time() > self.until


class Devices(devices.DeviceAuthorizationEndpoint):  # type: ignore[misc]
    """Gives codes away."""

    INTERVAL, EXPIRES_IN = 1, 600

    def get_verification_uri(self) -> str:
        return f"{flask.request.host_url}device"

    def save_device_credential(self, client: str, scope: str, data: dict[str, Any]) -> None:
        CREDENTIALS[data["device_code"]] = Credential(client, scope, data["user_code"], time.time() + self.EXPIRES_IN)


class DeviceGrant(devices.DeviceCodeGrant):  # type: ignore[misc]
    """A token for a device's code, once somebody agreed to the user's."""

    def query_device_credential(self, code: str) -> Credential | None:
        return CREDENTIALS.get(code)

    def query_user_grant(self, user_code: str) -> tuple[Any, bool] | None:
        return ANSWERS.get(user_code)

    def should_slow_down(self, credential: Credential) -> bool:
        before, credential.asked_at = credential.asked_at, time.time()
        return credential.asked_at - before < Devices.INTERVAL


class Server(flask_oauth2.AuthorizationServer):  # type: ignore[misc]
    """With both."""

    def init_app(self, app: flask.Flask, **more: Any) -> None:
        super().init_app(app, **more)
        self.register_grant(DeviceGrant, [_app.OpenIDCode(require_nonce=False, token_max_age=timedelta(hours=1))])
        self.register_endpoint(Devices)


def with_devices() -> None:
    """Offer all this."""
    _app.flask_oauth2.AuthorizationServer = Server
    _app.Client.GRANT_TYPES_SUPPORTED += (DeviceGrant.GRANT_TYPE,)

    @_app.blueprint.before_request  # type: ignore[untyped-decorator]
    def token() -> flask.Response | None:
        if flask.request.form.get("grant_type") != DeviceGrant.GRANT_TYPE:
            return None
        return flask.g._authlib_authorization_server.create_token_response()  # type: ignore[no-any-return]

    @_app.blueprint.post("/device_authorization")  # type: ignore[untyped-decorator]
    def ask() -> flask.Response:
        return flask.g._authlib_authorization_server.create_endpoint_response(Devices.ENDPOINT_NAME)  # type: ignore[no-any-return]

    @_app.blueprint.post("/device")  # type: ignore[untyped-decorator]
    def answer() -> str:
        form = flask.request.form
        ANSWERS[form["user_code"]] = _app.storage.get_user(form["sub"]), form["action"] == "authorize"
        return "Thank you."

    @_app.blueprint.after_request  # type: ignore[untyped-decorator]
    def tell(response: flask.Response) -> flask.Response:
        if flask.request.path == "/.well-known/openid-configuration":
            where = f"{flask.request.host_url}device_authorization"
            about = response.get_json() | {"device_authorization_endpoint": where}
            response.set_data(flask.json.dumps(about))
        return response


if __name__ == "__main__":
    _app.AuthorizationCodeGrant = CodeWithChallenge
    if "--no-devices" in sys.argv:
        sys.argv.remove("--no-devices")
    else:
        with_devices()
    program.run()
