"""Secrets never get into the log, whoever writes the line."""

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from registry import logs
from registry.core.redaction import redact
from registry.services.tokens import make_text

TOKEN = make_text()
SECRET = TOKEN.split("_", 2)[2]
SIGNED = "https://s3.example/bucket/key?X-Amz-Signature=abcdef0123&X-Amz-Credential=AKIA%2Fx&sig=topsecret&part=3"
DATABASE = "postgresql+psycopg://user:hunter2@db/loractl"
HIDDEN = (SECRET, "abcdef0123", "AKIA", "topsecret", "hunter2")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Logging as it was before."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def written(capsys: pytest.CaptureFixture[str]) -> str:
    found = capsys.readouterr()
    assert found.out == ""
    return found.err


@pytest.mark.parametrize(
    "data",
    [
        {"token": TOKEN}, {"note": f"came with {TOKEN}"}, {"url": SIGNED}, {"database": DATABASE},
        {"headers": {"Authorization": f"Bearer {TOKEN}"}}, {"urls": [SIGNED, {"deep": (DATABASE,)}]},
        {"secret_key": "hunter2"}, {"password": "hunter2"},
    ],
)  # fmt: skip
def test_our_events_hold_no_secrets(capsys: pytest.CaptureFixture[str], data: dict[str, Any]) -> None:
    logs.configure("debug")
    structlog.get_logger().info("event", **data)
    line = written(capsys)
    assert json.loads(line)["event"] == "event"
    assert not [secret for secret in HIDDEN if secret in line]


def test_what_is_no_secret_stays(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure()
    structlog.get_logger().info("pushed", push="p1", url=SIGNED, size=3)
    line = json.loads(written(capsys))
    assert (line["push"], line["size"], line["level"]) == ("p1", 3, "info")
    assert line["url"].endswith("&part=3")
    assert TOKEN.split("_")[1] in str(redact(TOKEN))


def test_tracebacks_of_ours_and_of_libraries_hold_no_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure()
    try:
        raise ValueError(f"could not reach {DATABASE} with {TOKEN}")
    except ValueError:
        structlog.get_logger().exception("failed")
        logging.getLogger("sqlalchemy").exception("failed at %s", SIGNED)
    text = written(capsys)
    assert text.count("Traceback") == 2
    assert not [secret for secret in HIDDEN if secret in text]


def test_the_servers_own_loggers_go_the_same_way(capsys: pytest.CaptureFixture[str]) -> None:
    own = logging.StreamHandler()
    access = logging.getLogger("uvicorn.access")
    access.addHandler(own)
    logs.configure()
    access.warning('"GET /store/blobs/x?%s HTTP/1.1" 200', SIGNED.partition("?")[2])
    assert access.handlers == []
    assert not [secret for secret in HIDDEN if secret in written(capsys)]


def test_a_level_that_is_asked_for_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("warning")
    structlog.get_logger().info("quiet")
    assert written(capsys) == ""
