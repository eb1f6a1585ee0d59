"""Webhooks at the command line: added, listed, tested, removed."""

import json
from pathlib import Path
from typing import Any

import pytest

from cli.main import run
from tests import live


def test_a_webhook_lives_and_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*arguments: str, code: int = 0) -> Any:
        capsys.readouterr()
        status = run([*arguments, "--json"])
        said = capsys.readouterr()
        assert status == code, said.err
        return json.loads(said.out)

    with live.registry(tmp_path / "registry") as registry:
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
        monkeypatch.setenv("LORACTL_URL", registry.url)
        monkeypatch.setenv("LORACTL_TOKEN", registry.token)
        refused = call("webhook", "add", "http://127.0.0.1:9/x", code=1)["error"]
        assert (refused["code"], refused["facts"]["address"]) == ("address-refused", "127.0.0.1")
        assert call("webhook", "add", "http://localhost/x", code=1)["error"]["code"] == "address-refused"
        refused = call("webhook", "add", "https://ci.example/x", "--event", "aliass.moved", code=2)["error"]
        assert "Did you mean 'alias'" in refused["detail"]
        made = call("webhook", "add", "https://ci.example/x", "--namespace", "team", "--event", "alias.")
        assert len(made["secret"]) > 40
        [found] = call("webhook", "list")
        assert (found["id"], found["events"]) == (made["id"], ["alias."])
        assert "secret" not in found
        assert call("webhook", "test", made["id"])["id"] == made["id"]
        assert run(["webhook", "list"]) == 0
        assert made["id"] in capsys.readouterr().out
        call("webhook", "rm", made["id"])
        assert call("webhook", "list") == []
        assert call("webhook", "rm", "w0", code=1)["error"]["code"] == "webhook-not-found"
