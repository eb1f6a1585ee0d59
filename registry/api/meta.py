"""Routes about the registry itself: health, who am I, doctor."""

from fastapi import APIRouter, Request

from registry.db import migrate
from registry.schemas import DoctorReport, Finding, Health, WhoAmI

from .deps import Anyone, Parts, User

router = APIRouter(tags=["meta"])


@router.get("/health")
def health(request: Request, parts: Parts) -> Health:
    """Whether this process and its database answer; the only route without a token."""
    parts.database.ping()
    return Health(version=request.app.version)


@router.get("/v1/whoami")
def whoami(caller: Anyone) -> WhoAmI:
    """What the registry knows of the caller's token."""
    return WhoAmI(
        id=caller.token_id, name=caller.name, kind=caller.kind, scopes=caller.scopes, expires_at=caller.expires_at
    )


@router.get("/v1/doctor")
def doctor(parts: Parts, caller: User) -> DoctorReport:
    """Look at the usual misconfigurations; needs admin everywhere."""
    caller.require("admin", "*")
    lacking = migrate.missing(parts.database)
    reached = parts.broker.ping()
    findings = [
        Finding(check="database", ok=True, detail=parts.database.dialect),
        Finding(
            check="migrations",
            ok=not lacking,
            detail=f"missing: {', '.join(lacking)}" if lacking else "up to date",
            help="Run: python -m registry.db.migrate" if lacking else "",
        ),
        Finding(
            check="broker",
            ok=reached is None,
            detail=reached or "answers",
            help="" if reached is None else "Jobs wait until the broker is back; nothing is lost.",
        ),
    ]
    return DoctorReport(findings=findings)
