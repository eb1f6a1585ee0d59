"""From refusal to HTTP status: the one table, and the ``application/problem+json`` body.

A test says that every refusal has a row (`tests/api/test_problems.py`).
"""

from http import HTTPStatus

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from registry.core import errors
from registry.schemas import Problem

STATUS: dict[type[errors.LoractlError], int] = {
    errors.Usage: 400,
    errors.Unauthenticated: 401,
    errors.Forbidden: 403,
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.AliasMoved: 412,
    errors.Gone: 410,
    errors.TooLarge: 413,
    errors.GateNotPassed: 422,
    errors.BadFile: 422,
    errors.DoesNotFit: 422,
    errors.Invalid: 422,
    errors.StorageFull: 507,
    errors.Limited: 429,
    errors.Unavailable: 503,
    errors.InternalError: 500,
    errors.UnknownProblem: 500,
    errors.LocalFailure: 500,
}
log = structlog.get_logger()


def status_of(error: type[errors.LoractlError]) -> int:
    """The status of the nearest class in the table."""
    return next(STATUS[cls] for cls in error.__mro__ if cls in STATUS)


def respond(error: errors.LoractlError, request: Request) -> Response:
    """The answer to a refusal."""
    status = status_of(type(error))
    body = Problem(
        type=f"urn:loractl:problem:{error.code}",
        title=HTTPStatus(status).phrase,
        status=status,
        request=request.scope.get("request_id"),
        **error.problem(),
    )
    headers = {}
    if isinstance(error, errors.Limited | errors.Overloaded):
        request.app.state.parts.meters.refused.labels(error.code).inc()
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if status in (429, 503):
        headers["Retry-After"] = str(error.facts.get("retry_after", 2))
    return JSONResponse(body.model_dump(), status, headers, media_type="application/problem+json")


def install(app: FastAPI) -> None:
    """Answer every exception of ``app`` with a problem."""

    @app.exception_handler(errors.LoractlError)
    def refused(request: Request, error: errors.LoractlError) -> Response:
        return respond(error, request)

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> Response:
        return respond(errors.BadRequest.of(error.errors()), request)

    @app.exception_handler(HTTPException)
    def unrouted(request: Request, error: HTTPException) -> Response:
        if error.status_code in (404, 405):
            return respond(errors.RouteNotFound(method=request.method, path=request.url.path), request)
        return respond(errors.BadRequest(problems=str(error.detail)), request)

    @app.exception_handler(UnicodeEncodeError)
    def unwritable(request: Request, error: UnicodeEncodeError) -> Response:
        return respond(errors.BadRequest(problems=f"text that is not Unicode: {error.reason}"), request)

    @app.exception_handler(Exception)
    def failed(request: Request, error: Exception) -> Response:
        identity = request.scope.get("request_id", "?")
        log.error("request-failed", request=identity, path=request.url.path, exc_info=error)
        return respond(errors.InternalError(request=identity), request)
