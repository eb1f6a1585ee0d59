"""Every route is asked a few times by our own OpenAPI document, the same way each time; more: `make fuzz`."""

from collections import Counter
from pathlib import Path

import pytest

from registry.services import datasets
from tests.api.test_access import seeded
from tests.fuzz import api as fuzz
from tests.world import World


def asked(world: World, tmp_path: Path, cases: int = 290) -> tuple[list[str], Counter[int]]:
    answers: Counter[int] = Counter()
    with seeded(world, tmp_path) as api:
        return fuzz.round_of(api, cases, 1, answers, tmp_path), answers


def test_every_route_answers_as_the_document_says(world: World, tmp_path: Path) -> None:
    found, answers = asked(world, tmp_path)
    assert found == []
    assert sum(answers.values()) > 200
    assert sum(count for status, count in answers.items() if status < 300) > 10
    assert {401, 404} <= answers.keys()


def test_an_error_of_ours_and_a_document_that_lies_are_seen(
    embedded: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fall(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(datasets, "page", fall)
    with seeded(embedded, tmp_path) as api:
        document = api.client.app.openapi()  # type: ignore[attr-defined]
        del document["paths"]["/v1/whoami"]["get"]["responses"]["default"]
        paths = ("/v1/datasets", "/v1/suites", "/v1/whoami", "/v1/sign-in")
        found = fuzz.round_of(api, 40, 1, Counter(), tmp_path, paths)
    assert [one.partition(":")[0] for one in found] == ["get /v1/datasets", "get /v1/suites", "get /v1/whoami"]
    assert "ServerError" in found[0]
    assert "UndefinedStatusCode" in found[2]
