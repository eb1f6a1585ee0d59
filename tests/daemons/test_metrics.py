"""What Prometheus is told of daemons: who is silent, what fails, on a port of its own."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import httpx
import psutil
import pytest
from prometheus_client import generate_latest

from registry.broker import Broker
from registry.core.errors import DatabaseDown
from registry.daemons import run
from registry.daemons.metrics import Meters, served
from registry.parts import Parts
from registry.settings import BadSetting
from tests import servers
from tests.world import SETTINGS, World


def told(meters: Meters, name: str) -> dict[str, float]:
    """The samples of one metric by their labels."""
    lines = generate_latest(meters.registry).decode().splitlines()
    return {key: float(value) for key, _, value in (line.partition(" ") for line in lines) if key.startswith(name)}


def test_a_daemon_is_silent_since_its_last_step_that_ended_well() -> None:
    now = 100.0
    meters = Meters(["gc", "outbox"], lambda: now)
    now = 110.0
    with meters.step("gc"):
        now = 112.0
    now = 115.0
    with pytest.raises(DatabaseDown), meters.step("gc"):
        raise DatabaseDown(reason="gone")
    with pytest.raises(ValueError, match="odd"), meters.step("outbox"):
        raise ValueError("odd")
    silence = "loractl_daemon_silence_seconds"
    assert told(meters, silence) == {f'{silence}{{daemon="gc"}}': 3.0, f'{silence}{{daemon="outbox"}}': 15.0}
    failures = "loractl_daemon_failures_total"
    assert told(meters, failures) == {
        f'{failures}{{code="database-down",daemon="gc"}}': 1.0, f'{failures}{{code="unforeseen",daemon="outbox"}}': 1.0,
    }  # fmt: skip
    took = "loractl_daemon_step_seconds_"
    assert told(meters, took)[f'{took}sum{{daemon="gc"}}'] == 2.0
    assert told(meters, took)[f'{took}count{{daemon="gc"}}'] == 2.0


@contextmanager
def running(parts: Parts) -> Iterator[None]:
    """One daemon that rests most of the time."""
    stop = threading.Event()
    idle = run.Daemon("idler", lambda _: False, 0.01)
    thread = threading.Thread(target=run.run, args=(parts, stop, (idle,)))
    thread.start()
    yield
    stop.set()
    thread.join()


def test_daemons_answer_at_their_port_and_only_there(embedded: World) -> None:
    [port] = servers.free_ports(1)
    settings = replace(SETTINGS, metrics_port=port)
    url = f"http://127.0.0.1:{port}/metrics"
    with running(Parts(settings, embedded.database, embedded.store, Broker("memory://"))):
        with httpx.Client(transport=httpx.HTTPTransport(retries=5)) as client:
            lines = client.get(url).text.splitlines()
        assert next(line for line in lines if line.startswith('loractl_daemon_silence_seconds{daemon="idler"}'))
        assert [line for line in lines if line.startswith("process_resident_memory_bytes ")]
        listening = [found for found in psutil.Process().net_connections("tcp") if found.status == psutil.CONN_LISTEN]
        assert [found.laddr.ip for found in listening if found.laddr.port == port] == ["127.0.0.1"]
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = replace(SETTINGS, metrics_port=taken.getsockname()[1])
        refused = pytest.raises(BadSetting, match=r"LORACTL_DAEMONS_METRICS_PORT cannot be 127\.0\.0\.1:")
        with refused, served(Meters([]), settings):
            pass
