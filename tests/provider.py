"""An OpenID Connect provider as a process: oidc-provider-mock, and what it lacks for a client without a secret: PKCE.

``python tests/provider.py --port N --user-claims JSON …``
"""

import base64
import hashlib

import authlib.oauth2.rfc6749 as oauth2
import flask
from oidc_provider_mock import __main__ as program
from oidc_provider_mock import _app

CHALLENGES: dict[str, str] = {}


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


if __name__ == "__main__":
    _app.AuthorizationCodeGrant = CodeWithChallenge
    program.run()
