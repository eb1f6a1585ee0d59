"""Taking versions out of use at the command line: yank, quarantine, reinstate, delete, and what a pull then says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli.main import run
from tests import live
from tests.factories import tiny_adapter, tiny_base


@pytest.fixture
def call(registry: live.Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> (
    Callable[..., Any]
):  # fmt: skip
    """As everywhere, in a folder of its own; what was said on stderr is in the document too."""
    monkeypatch.chdir(tmp_path)

    def called(*arguments: str, code: int = 0) -> Any:
        capsys.readouterr()
        status = run([*arguments, "--json"])
        said = capsys.readouterr()
        assert status == code, said.err
        return json.loads(said.out) | {"stderr": said.err}

    return called


def test_versions_are_taken_out_of_use_and_whoever_asks_is_told_why(call: Callable[..., Any], tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base")
    call("base", "push", str(base), "--line", "demo")
    for seed in (1, 2):
        call("push", str(tiny_adapter(tmp_path / f"a{seed}", base, seed=seed)), "team/bot", "--base", "demo")
    call("alias", "set", "team/bot@v2", "prod")
    stopped = call("yank", "team/bot@v2", "-m", "wrong language", code=1)
    assert "alias 'prod' on demo@r1" in stopped["error"]["detail"]
    assert call("yank", "team/bot@v2", "-m", "wrong language", "--force")["version"]["status"] == "yanked"
    assert call("pull", "team/bot")["ref"] == "team/bot@v1"
    assert "Warning: team/bot@v2 is yanked: wrong language" in call("pull", "team/bot@v2")["stderr"]
    assert call("pull", "team/bot:prod", code=1)["error"]["code"] == "version-yanked"
    call("reinstate", "team/bot@v2")
    call("quarantine", "team/bot@v2", "-m", "it leaks")
    assert "it leaks" in call("pull", "team/bot@v2", code=1)["error"]["detail"]
    gone = call("delete", "team/bot@v2", "-m", "it leaks", "--force")
    assert (gone["version"]["status"], gone["follows"]) == ("deleted", ["alias 'prod' on demo@r1 is taken away"])
    assert call("pull", "team/bot@v2", code=1)["error"]["code"] == "version-deleted"
    assert [(v["version"], v["status"]) for v in call("show", "team/bot")["versions"]] == [(2, "deleted"), (1, "live")]
    again = call("push", str(tmp_path / "a2"), "team/bot", "--base", "demo", code=1)
    assert again["error"]["code"] == "version-deleted"
    assert call("delete", "team/bot", code=2)["error"]["code"] == "bad-request"
    assert run(["yank", "team/bot@v1"]) == run(["show", "team/bot"]) == 0
