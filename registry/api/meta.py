"""Routes about the registry itself: health, how to sign in, who am I, doctor, the description of all routes."""

from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from registry.schemas import DoctorReport, Health, SignIn, SignInOffer, WhoAmI
from registry.services import doctor
from registry.services.seals import Seals

from .deps import Anyone, Parts, User, known_caller

router = APIRouter(tags=["meta"])


@router.get("/health")
def health(request: Request, parts: Parts) -> Health:
    """Whether this process and its database answer; needs no token."""
    parts.database.ping()
    return Health(version=request.app.version)


@router.get("/v1/sign-in")
def sign_in_offer(parts: Parts) -> SignInOffer:
    """Where people sign in, if the registry knows an identity provider; needs no token."""
    oidc = parts.settings.oidc
    offer = SignIn(issuer=oidc.issuer, client_id=oidc.client_id, scope=oidc.scope) if oidc is not None else None
    return SignInOffer(oidc=offer)


@router.get("/v1/whoami")
def whoami(caller: Anyone) -> WhoAmI:
    """What the registry knows of the caller's token."""
    return WhoAmI(
        id=caller.token_id, name=caller.name, kind=caller.kind, scopes=caller.scopes, expires_at=caller.expires_at
    )


@router.get("/metrics", response_class=PlainTextResponse)
def metrics(parts: Parts, caller: User) -> Response:
    """What Prometheus scrapes, with a token of its own; needs admin everywhere."""
    caller.require("admin", "*")
    return Response(generate_latest(parts.meters.to_scrape()), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/doctor")
def look(parts: Parts, caller: User) -> DoctorReport:
    """Look at the usual misconfigurations; needs admin everywhere."""
    caller.require("admin", "*")
    seals = Seals(parts.settings.seal_keys)
    with parts.http() as http:
        found = doctor.findings(parts.database, parts.store, parts.broker, http, parts.clock(), seals)
    return DoctorReport(findings=found)


@router.get("/openapi.json", include_in_schema=False, dependencies=[Depends(known_caller)])
def openapi(request: Request) -> dict[str, Any]:
    """The routes, described."""
    app: FastAPI = request.app
    return app.openapi()
