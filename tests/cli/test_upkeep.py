"""Quotas and fsck at the command line."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli.main import run
from registry.core.digest import Digest
from registry.services.blobs import blob_key
from registry.storage.local import LocalCopy, LocalStore
from tests import live

ROWS = '{"prompt": "1+1=", "completion": " 2"}\n'


def test_a_quota_is_shown_set_and_kept_to(call: Callable[..., Any], tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(ROWS)
    call("dataset", "push", str(data), "team/rows")
    assert call("quota", "show", "team")["used"] == len(ROWS)
    bounded = call("quota", "set", "team", "--bytes", "50B", "--keep-days", "30")
    assert (bounded["quota_bytes"], bounded["keep_days"]) == (50, 30)
    for changed, expected in ((("--keep-days", "all"), (50, None)), (("--keep-days", "9"), (50, 9)),
                              (("--bytes", "any"), (None, 9)), (("--bytes", "50B"), (50, 9))):  # fmt: skip
        bounded = call("quota", "set", "team", *changed)
        assert (bounded["quota_bytes"], bounded["keep_days"]) == expected
    for wrong in ((), ("--keep-days", "0"), ("--keep-days", "soon"), ("--bytes", "much")):
        assert call("quota", "set", "team", *wrong, code=2)["error"]["code"] == "usage"
    data.write_text(ROWS * 1 + ROWS.replace("1+1", "2+2"))
    assert call("dataset", "push", str(data), "team/rows", code=1)["error"]["code"] == "quota-exceeded"
    assert run(["quota", "show", "team"]) == 0


def test_fsck_finds_repairs_and_a_push_heals(
    registry: live.Live, call: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(ROWS)
    call("dataset", "push", str(data), "team/rows")
    assert call("fsck", "--deep") == {"ok": True, "rows": 1, "objects": 1, "findings": []}
    registry.parts.store.delete(blob_key(str(Digest.sha256(ROWS.encode()))))
    [finding] = call("fsck", code=1)["findings"]
    assert (finding["problem"], finding["named_by"], finding["repaired"]) == ("missing", ["team/rows@v1"], False)
    assert call("fsck", "--repair")["findings"][0]["repaired"]
    assert run(["fsck"]) == 1
    assert "missing" in capsys.readouterr().out
    call("dataset", "push", str(data), "team/rows")
    assert call("fsck", "--deep")["ok"]


def test_fsck_says_what_came_from_the_replica(
    registry: live.Live, call: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(ROWS)
    call("dataset", "push", str(data), "team/rows")
    store, key = registry.parts.store, blob_key(str(Digest.sha256(ROWS.encode())))
    assert isinstance(store, LocalStore)
    shutil.copytree(store.root, tmp_path / "replica")
    registry.parts.replica = LocalCopy(tmp_path / "replica")
    store.delete(key)
    [finding] = call("fsck", "--repair")["findings"]
    assert (finding["repaired"], finding["replica"]) == (True, "healed")
    assert call("fsck", "--deep")["ok"]
    store.delete(key)
    assert run(["fsck", "--repair"]) == 0
    assert "from the replica" in capsys.readouterr().out
