"""All daemons in one process: ``python -m registry.daemons.run``. Any number of such processes may run.

Each daemon is a ``step(parts)`` that does one piece of work and says whether there was any. It is called
again at once when there was, after its pause when there was not, and after a growing pause when it failed:
a database or a store that is down is a reason to wait, never to stop.
"""

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass

import structlog
from structlog.contextvars import bind_contextvars

from registry import logs
from registry.core.errors import Unavailable
from registry.parts import Parts
from registry.services import doctor
from registry.services.seals import Seals
from registry.settings import Settings

from . import gc, outbox, reconciler, scheduler, sequencer, verifier
from .metrics import Meters, served

FIRST_PAUSE_S, PATIENCE_S = 0.5, 30.0
"""The shortest and the longest pause between failures."""
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Daemon:
    """A step, and how long to rest when there was nothing to do."""

    name: str
    step: Callable[[Parts], bool]
    pause_s: float


DAEMONS = (
    Daemon("verifier", verifier.step, 0.1),
    Daemon("scheduler", scheduler.step, 0.5),
    Daemon("reconciler", reconciler.step, 5.0),
    Daemon("sequencer", sequencer.step, 1.0),
    Daemon("outbox", outbox.step, 1.0),
    Daemon("gc", gc.step, 60.0),
)


def keep_going(daemon: Daemon, parts: Parts, stop: threading.Event, meters: Meters) -> None:
    """Call the daemon's step until ``stop``; its lines in the log name it."""
    bind_contextvars(daemon=daemon.name)
    failures = 0
    while not stop.is_set():
        try:
            with meters.step(daemon.name):
                did = daemon.step(parts)
        except Unavailable as error:
            failures += 1
            log.warning("daemon-waits", code=error.code, reason=error.message)
        except Exception:  # one bad row must not end the process; it is in the log
            failures += 1
            log.exception("daemon-failed")
        else:
            failures = 0
            if did:
                continue
        stop.wait(min(PATIENCE_S, FIRST_PAUSE_S * 2**failures) if failures else daemon.pause_s)


def run(parts: Parts, stop: threading.Event, daemons: tuple[Daemon, ...] = DAEMONS) -> None:
    """Run all ``daemons`` until ``stop``, and let each finish what it is doing."""
    meters = Meters(daemon.name for daemon in daemons)
    threads = [threading.Thread(target=keep_going, args=(d, parts, stop, meters), name=d.name) for d in daemons]
    with served(meters, parts.settings):
        for thread in threads:
            thread.start()
        log.info("daemons-started", daemons=[daemon.name for daemon in daemons])
        stop.wait()
        for thread in threads:
            thread.join()
    log.info("daemons-stopped")


def probe(parts: Parts) -> None:
    """Say in the log what an operator should know; nothing of it is a reason not to start."""
    seals = Seals(parts.settings.seal_keys)
    with parts.http() as http:
        for finding in doctor.findings(parts.database, parts.store, parts.broker, http, parts.clock(), seals):
            if not finding.ok:
                log.warning("doctor", check=finding.check, detail=finding.detail, help=finding.help)


def main() -> None:
    """Run until SIGTERM or SIGINT."""
    settings = Settings.from_environment(os.environ)
    logs.configure(settings.log_level)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    parts = Parts.of(settings)
    try:
        probe(parts)
        run(parts, stop)
    finally:
        parts.close()


if __name__ == "__main__":
    main()
