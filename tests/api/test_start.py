"""What an API process does before it serves."""

from dataclasses import replace
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text

from registry.api.app import create_app
from registry.api.deps import AppParts
from registry.core.errors import SchemaMissing
from registry.db.migrate import missing, upgrade
from tests.world import SETTINGS


@pytest.fixture
def parts(tmp_path: Path) -> AppParts:
    return AppParts.of(replace(SETTINGS, database_url=f"sqlite:///{tmp_path / 'registry.db'}", data=tmp_path))


def test_without_its_schema_it_does_not_start_and_says_what_to_run(parts: AppParts) -> None:
    with pytest.raises(SchemaMissing, match="migrations") as refused, TestClient(create_app(parts)):
        pass
    assert "registry.db.migrate" in refused.value.hint
    upgrade(parts.database)
    with TestClient(create_app(parts)) as client:
        assert client.get("/health").status_code == 200


def test_the_schema_of_a_newer_release_is_none_that_is_missing(parts: AppParts) -> None:
    upgrade(parts.database)
    with parts.database.write() as session:
        session.connection().execute(text("UPDATE alembic_version SET version_num = 'newer'"))
    assert missing(parts.database) == []
    with TestClient(create_app(parts)) as client:
        assert client.get("/health").status_code == 200
