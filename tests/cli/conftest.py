"""A registry that commands are typed against, and the typing."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cli.main import run
from tests import live


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[live.Live]:
    """One of the test's own, which commands reach as its administrator."""
    with live.registry(tmp_path / "registry") as found:
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("LORACTL_URL", found.url)
        monkeypatch.setenv("LORACTL_TOKEN", found.token)
        yield found


@pytest.fixture
def call(registry: live.Live, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run a command with ``--json``; its document. ``code`` is the exit code that is expected."""

    def called(*arguments: object, code: int = 0) -> Any:
        capsys.readouterr()
        status = run([*map(str, arguments), "--json"])
        said = capsys.readouterr()
        assert status == code, said.err
        return json.loads(said.out)

    return called
