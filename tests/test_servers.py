"""The servers of the tests: they are real, they start in any order, and one that fails says why."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psycopg
import pytest
import redis

from tests import servers


def test_postgres_is_postgres_18(postgres_url: str) -> None:
    with psycopg.connect(postgres_url.replace("+psycopg", "")) as connection:
        [version] = connection.execute("show server_version_num").fetchone() or [""]
    assert int(version) >= 180_000


def test_valkey_speaks_redis_and_wants_its_password(valkey_url: str) -> None:
    with redis.Redis.from_url(valkey_url) as client:
        assert client.ping()
    address, _, _ = valkey_url.partition("@")[2].partition("/")
    with redis.Redis.from_url(f"redis://{address}") as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()


def test_a_server_that_ends_early_shows_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such disk')"]
    with (
        servers.running("Example", command, tmp_path) as server,
        pytest.raises(servers.ServerDown, match=r"Example ended with status 1:\nno such disk"),
    ):
        server.wait_until(lambda: False)


def test_a_server_that_never_gets_ready_shows_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('still busy', flush=True); import time; time.sleep(60)"]
    with servers.running("Example", command, tmp_path) as server:
        with pytest.raises(servers.ServerDown, match=r"not ready after"):
            server.wait_until(lambda: False, patience_s=0.2)
        pid = server.process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_server_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    program = "from tests import servers\nwith servers.valkey() as url: print(url, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as starter:
        assert starter.stdout is not None
        port = int(starter.stdout.readline().rpartition(":")[2].partition("/")[0])
        os.kill(starter.pid, 9)
        starter.wait()
    deadline = time.monotonic() + 10
    while answers(port) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not answers(port)


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
