"""``loractl up``: ready when it says so, children revived, everything stopped, secrets kept and kept secret."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cli.main import run
from registry.client import RegistryClient
from tests.waiting import wait_for


@contextmanager
def up(folder: Path, *options: str) -> Iterator[tuple["subprocess.Popen[str]", dict[str, Any]]]:
    """The command in a process of its own, with its document; stopped at the end if it still runs."""
    line = [sys.executable, "-m", "cli.main", "up", "--dir", str(folder), "--port", "0", "--json", *options]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = ""
        for text in process.stdout:
            said += text
            if text == "}\n":
                break
        try:
            yield process, json.loads(said)
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_its_whole_life(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "data"
    with up(folder, "--jobs", "0") as (process, told):
        assert set(told["pids"]) == {"api", "daemons"}
        assert told == {**told, "dir": str(folder), "token_file": str(folder / "secrets" / "admin-token")}
        state = json.loads((folder / "up.json").read_text())
        assert (state["url"], state["pid"], state["pids"]) == (told["url"], process.pid, told["pids"])
        secrets = list((folder / "secrets").iterdir())
        assert sorted(path.name for path in secrets) == ["admin-token", "signing-key", "worker-token"]
        assert {stat.S_IMODE(path.stat().st_mode) for path in secrets} == {0o600}
        token = Path(told["token_file"]).read_text().strip()
        with RegistryClient(told["url"], token) as client:
            assert client.whoami().scopes == {"*": ["admin"]}

        # a second one on the same folder is refused and says where the first one is
        assert run(["up", "--dir", str(folder), "--port", "0", "--jobs", "0"]) == 1
        assert told["url"] in capsys.readouterr().err

        # a child that dies is started again, under the same address
        os.kill(told["pids"]["api"], signal.SIGKILL)
        wait_for(lambda: json.loads((folder / "up.json").read_text())["pids"]["api"] != told["pids"]["api"])
        with RegistryClient(told["url"], token) as client:
            wait_for(lambda: _answers(client))
        pids = json.loads((folder / "up.json").read_text())["pids"].values()

        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0
        assert err.endswith("Stopped.\n")
        assert not any(alive(pid) for pid in pids)
        assert not (folder / "up.json").exists()
        everything = err + "".join(log.read_text() for log in (folder / "logs").iterdir())
        assert not any(path.read_text().strip() in everything for path in secrets)

    # the secrets and what was stored stay
    with up(folder, "--jobs", "0") as (_, again), RegistryClient(again["url"], token) as client:
        assert client.health().status == "ok"


def _answers(client: RegistryClient) -> bool:
    try:
        return client.health().status == "ok"
    except Exception:  # noqa: BLE001  # not yet
        return False


def test_a_port_that_somebody_has_is_said_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        assert run(["up", "--dir", str(tmp_path), "--port", port, "--jobs", "0", "--json"]) == 2
    said = json.loads(capsys.readouterr().out)["error"]["detail"]
    assert port in said
    assert "--port" in said
    assert not (tmp_path / "registry.db").exists()
    assert run(["up", "--dir", str(tmp_path), "--host", "203.0.113.7", "--port", "1", "--json"]) == 2
    assert "203.0.113.7" in json.loads(capsys.readouterr().out)["error"]["detail"]


def test_a_child_that_cannot_start_is_said_with_the_end_of_its_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "registry.db").write_bytes(b"this is no database, and it is long enough to be looked at" * 100)
    assert run(["up", "--dir", str(tmp_path), "--port", "0", "--jobs", "0", "--json"]) == 1
    said = capsys.readouterr()
    problem = json.loads(said.out)["error"]
    assert problem["code"] == "child-failed"
    assert problem["facts"]["name"] == "migrate"
    assert str(tmp_path / "logs" / "migrate.log") in problem["hint"]


def test_the_children_die_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    with up(tmp_path / "data", "--jobs", "0") as (process, told):
        process.kill()
        process.wait()
        wait_for(lambda: not any(alive(pid) for pid in told["pids"].values()))
