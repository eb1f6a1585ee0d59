"""The audit at the command line: what was changed, whether the record is whole, and where it is not."""

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import text

from cli.main import run
from registry.services import audit
from tests import live


def test_changes_are_listed_and_the_record_of_them_is_verified(
    registry: live.Live, call: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    made = call("token", "create", "ci", "--scope", "read", "--namespace", "team")
    call("token", "revoke", made["id"])
    found = call("audit", "list", "--event", "token.", "--limit", "2")
    assert [(row["event"], row["subject"], row["name"]) for row in found] == [
        ("token.revoked", made["id"], "admin"), ("token.created", made["id"], "admin"),
    ]  # fmt: skip
    assert found[1]["after"]["scopes"] == {"team": ["read"]}
    while _chain(registry):
        pass
    told = call("audit", "verify")
    assert (told["ok"], told["waiting"], told["head"].partition(":")[0]) == (True, 0, str(len(call("audit", "list"))))
    assert call("audit", "verify", "--head", told["head"])["ok"]
    assert run(["audit", "list"]) == run(["audit", "verify"]) == 0
    assert "token.revoked" in (said := capsys.readouterr().out) and "whole" in said
    with registry.parts.database.engine.begin() as connection:
        connection.execute(text("DROP TRIGGER audit_says_on"))
        connection.execute(text("UPDATE audit SET actor = 'eve' WHERE seq = 2"))
    broken = call("audit", "verify", code=1)
    assert [at["seq"] for at in broken["breaks"]] == [2]
    other = f"1:sha256:{'0' * 64}"
    assert [at["seq"] for at in call("audit", "verify", "--head", other, code=1)["breaks"]] == [1, 2]
    assert run(["audit", "verify", "--head", "nonsense"]) == 2


def _chain(registry: live.Live) -> int:
    with registry.parts.database.write() as session:
        return audit.chain(session)
