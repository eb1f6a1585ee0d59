"""The whole API by its own OpenAPI document: schemathesis draws requests, and looks at every answer.

An answer is never a server's error, has a status, a type and a body that the document knows, and says what it is. Half
of the requests name what is there (from the table of `tests.api.test_access`, whose bodies are taken), so that
they get past the door; they come with an admin's token, a reader's, a worker's, one that is none, and none.
"""

import json
import logging
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import schemathesis
import structlog
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core import NOT_SET
from schemathesis.core.result import Ok
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from registry.db.engine import Database
from registry.db.migrate import upgrade
from registry.settings import S3Settings
from registry.storage.s3 import S3Store
from tests import servers
from tests.api.test_access import ROWS, Api, seeded
from tests.fuzz.inputs import HOSTILE_TEXTS, near, written
from tests.fuzz.run import Told, kept
from tests.world import World

CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
    response_headers_conformance,
]  # fmt: skip
LEFT_OUT = {("get", "/v1/jobs/{identity}/events")}
"""An answer that goes on until the job ends."""
ROUND = 1500
"""Requests to one registry: by then most of what it had is gone."""


@contextmanager
def _embedded() -> Iterator[Callable[[Path], World]]:
    with tempfile.TemporaryDirectory() as name, servers.local_store(Path(name)) as store:
        template = Path(name) / "template.db"
        empty = Database(f"sqlite:///{template}")
        upgrade(empty)
        empty.close()

        def place(folder: Path) -> World:
            shutil.copyfile(template, folder / "registry.db")
            return World(Database(f"sqlite:///{folder / 'registry.db'}"), store)

        yield place


@contextmanager
def _fleet() -> Iterator[Callable[[Path], World]]:
    with servers.postgres() as url, servers.seaweedfs() as s3:
        store = S3Store(S3Settings(s3.bucket, s3.endpoint, s3.endpoint, s3.region, s3.access_key, s3.secret_key))

        def place(folder: Path) -> World:
            database = Database(url)
            with database.engine.begin() as connection:
                connection.exec_driver_sql("DROP SCHEMA public CASCADE")
                connection.exec_driver_sql("CREATE SCHEMA public")
            upgrade(database)
            return World(database, store)

        yield place


PLACES = {"sqlite + folder": _embedded, "postgres + s3": _fleet}


def asked(place: str, cases: int, start: int, keep: Path) -> Told:
    """``cases`` requests to a registry in this process."""
    told, began = Told("api", place), time.monotonic()
    answers: Counter[int] = Counter()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    with PLACES[place]() as made:
        number = 0
        while told.cases < cases and not told.findings:
            with tempfile.TemporaryDirectory() as folder:
                world = made(Path(folder)).with_settings(in_flight=0, rate=0)
                with seeded(world, Path(folder)) as api:
                    told.findings += round_of(api, min(ROUND, cases - told.cases), start + number, answers, keep)
                world.database.close()
            told.cases, number = sum(answers.values()), number + 1
    told.taken = sum(count for status, count in answers.items() if status < 400)
    told.seconds = round(time.monotonic() - began, 1)
    return told


def round_of(
    api: Api, cases: int, start: int, answers: Counter[int], keep: Path, only: Sequence[str] = ()
) -> list[str]:
    """About ``cases`` requests over all routes of one registry, or ``only`` those of some paths; what was found."""
    operations = [one for one in _operations(api) if not only or one.path in only]
    tokens = [
        api.token(),
        api.token(),
        api.token(scopes={"team": ["read"]}),
        api.token(kind="worker"),
        "lora_x_y",
        None,
    ]
    last = ""

    def ask(case: Case[Any], token: str | None) -> None:
        nonlocal last
        body, case.body = case.body, NOT_SET  # written by ourselves: NaN and half surrogate pairs, too
        try:
            request = case.as_transport_kwargs(base_url="http://testserver")
        except UnicodeError:  # no client could send this
            return
        finally:
            case.body = body
        content = None if body is NOT_SET else body if isinstance(body, bytes) else written(body)
        headers = {"Content-Type": "application/json"} if content is not None else {}
        headers |= {**request.pop("headers"), **({"Authorization": f"Bearer {token}"} if token else {})}
        if token is None:
            headers.pop("Authorization", None)
        last = json.dumps({"request": repr(request), "content": repr(content), "headers": dict(headers)})
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # cookies by request
                answer = api.client.request(**request, content=content, headers=headers)
        except UnicodeError:  # no client could send this
            return
        answers[answer.status_code] += 1
        case.validate_response(answer, checks=CHECKS, headers=headers)

    each = max(1, cases // len(operations))
    found = []
    for operation in operations:
        quiet = settings(
            max_examples=each, database=None, deadline=None, print_blob=False, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        drawn = given(_cases(api, operation), st.sampled_from(tokens))(ask)
        try:
            quiet(seed(start)(drawn))()
        except (Exception, BaseExceptionGroup) as error:  # noqa: BLE001  # each is a finding
            place = kept("api", last.encode(), keep)
            each_one = error.exceptions if isinstance(error, BaseExceptionGroup) else [error]
            said = "; ".join(f"{type(one).__name__}: {' '.join(str(one).split())[:400]}" for one in each_one)
            found.append(f"{operation.method} {operation.path}: {said} ← {place}")
    return found


def _operations(api: Api) -> list[APIOperation[Any, Any, Any, Any]]:
    app: Any = api.client.app
    schema = schemathesis.openapi.from_dict(app.openapi())
    found = [one.ok() for one in schema.get_all_operations() if isinstance(one, Ok)]
    return [one for one in found if (one.method, one.path) not in LEFT_OUT]


def _cases(api: Api, operation: APIOperation[Any, Any, Any, Any]) -> SearchStrategy[Case[Any]]:
    """What schemathesis draws of the document, and half of the time with what is there in its places."""
    drawn = st.one_of([operation.as_strategy(generation_mode=mode) for mode in GenerationMode])
    row = ROWS.get(f"{operation.method.upper()} {operation.path}")
    body = row.body(api.facts) if row is not None and row.body is not None else None
    bodies = near(body) | st.just(body) if body is not None else st.none()
    ids = api.facts["ids"].get(operation.path.split("/")[2] if operation.path.count("/") > 1 else "", "x")
    known = {**{k: v for k, v in api.facts.items() if isinstance(v, str)}, "identity": ids, "push_id": ids}
    odd = st.one_of(st.none(), st.none(), st.none(), st.sampled_from(HOSTILE_TEXTS))

    def settle(case: Case[Any], real: bool, other: str | None, given: Any) -> Case[Any]:
        if not real:
            return case
        places = {name: known.get(name, value) for name, value in (case.path_parameters or {}).items()}
        if other and places:
            places[max(places)] = quote(other, safe="", errors="replace") or "%00"
        changes: dict[str, Any] = {"path_parameters": places}
        if given is not None:
            changes |= {"body": given, "media_type": "application/json"}
        for name, value in changes.items():
            setattr(case, name, value)
        return case

    return st.builds(settle, drawn, st.booleans(), odd, bodies)
