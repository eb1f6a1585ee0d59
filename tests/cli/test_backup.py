"""Backup and restore at the command line, as processes, on the folder of ``loractl up``."""

import json
from pathlib import Path
from typing import Any

import pytest

from cli.main import run
from tests import live


def test_a_folder_is_backed_up_and_restored_into_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*arguments: str, code: int = 0) -> Any:
        capsys.readouterr()
        status = run([*arguments, "--json"])
        said = capsys.readouterr()
        assert status == code, said.err
        return json.loads(said.out)

    monkeypatch.delenv("LORACTL_DATABASE_URL", raising=False)
    house, kept, new = (str(tmp_path / name) for name in ("house", "kept", "new"))
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "1+1=", "completion": " 2"}\n')
    with live.registry(tmp_path / "house") as registry:
        monkeypatch.setenv("LORACTL_URL", registry.url)
        monkeypatch.setenv("LORACTL_TOKEN", registry.token)
        call("dataset", "push", str(data), "team/rows")
        made = call("backup", kept, "--dir", house)
    assert (made["blobs"], made["lost"]) == (1, [])
    assert call("restore", kept, "--dir", new)["name"] == made["name"]
    assert call("restore", kept, "--dir", new, code=1)["error"]["code"] == "not-empty"
    assert call("backup", kept, "--dir", str(tmp_path / "nowhere"), code=1)["error"]["code"] == "path-unusable"
    with live.registry(tmp_path / "new") as registry:
        monkeypatch.setenv("LORACTL_URL", registry.url)
        monkeypatch.setenv("LORACTL_TOKEN", registry.token)
        assert call("fsck", "--deep")["ok"]
        assert run(["backup", kept, "--dir", new]) == 0
        assert "backed up" in capsys.readouterr().out
