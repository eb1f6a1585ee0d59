"""docker-compose.yml read and interpolated as compose does it, and its service `redis` run by Valkey."""

import re
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests import servers

HOUSE = Path(__file__).parent.parent.parent
TEXT = (HOUSE / "docker-compose.yml").read_text()
VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?:(?P<how>:[-?])(?P<text>[^}]*))?\}|\$(?P<dollar>\$)")
REQUIRED = sorted({match["name"] for match in VARIABLE.finditer(TEXT) if match["how"] == ":?"})
BIN = Path(sys.executable).parent


def interpolate(text: str, values: Mapping[str, str]) -> str:
    """What compose makes of ``text``; KeyError for a required variable without a value."""

    def one(match: re.Match[str]) -> str:
        if match["dollar"]:
            return "$"
        return values[match["name"]] if match["how"] == ":?" else values.get(match["name"], match["text"])

    return VARIABLE.sub(one, text)


def composed(values: Mapping[str, str]) -> dict[str, Any]:
    """The whole file with ``values`` in place of its variables."""
    made: dict[str, Any] = yaml.safe_load(interpolate(TEXT, values))
    return made


@contextmanager
def redis_server(file: Mapping[str, Any], port: int, folder: Path) -> Iterator[servers.Running]:
    """A server that runs the command of the service `redis` with the users of ``file``, and keeps nothing."""
    users = folder / "users.acl"
    users.write_text(file["configs"]["redis-users"]["content"])
    _, *options = file["services"]["redis"]["command"]
    options[options.index("/etc/redis/users.acl")] = str(users)
    command = [str(servers.valkey_program()), *options, "--bind", "127.0.0.1", "--port", str(port)]
    with servers.running("redis", command, folder) as server:
        server.wait_until(lambda: greeting(port) != b"")
        yield server


def greeting(port: int) -> bytes:
    """What the server answers somebody who has not said who they are; nothing when it is not there."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(100)
    except OSError:
        return b""
