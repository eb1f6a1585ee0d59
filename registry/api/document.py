"""The OpenAPI document: what FastAPI finds in the routes, and what it cannot know of our answers.

Every route may answer with a refusal, whatever its status: one ``default`` answer says so once, in place of the body
that FastAPI would send for what is not valid and that we never send.
"""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from registry.schemas import Problem

_REF = "#/components/schemas/Problem"
_REFUSAL = {
    "description": "A refusal: its code says which, its hint what helps.",
    "content": {"application/problem+json": {"schema": {"$ref": _REF}}},
}
_OPEN = {"/health", "/v1/sign-in"}


def document(app: FastAPI) -> dict[str, Any]:
    """The routes of ``app``, described; made once."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schemas = made["components"]["schemas"]
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        schemas["Problem"] = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
        made["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"token": []}]
        for path, methods in made["paths"].items():
            for operation in methods.values():
                operation["responses"].pop("422", None)
                operation["responses"]["default"] = _REFUSAL
                if path in _OPEN:
                    operation["security"] = []
        app.openapi_schema = made
    return app.openapi_schema
