"""What Prometheus scrapes of a process of daemons: whether each lives, how long its steps take, how often they fail.

Off until ``LORACTL_DAEMONS_METRICS_PORT`` names a port; on loopback unless ``LORACTL_METRICS_HOST`` says otherwise,
for it asks for no token. What waits for a daemon is in the API's metrics, from the rows.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    start_http_server,
)

from registry.core.errors import LoractlError
from registry.settings import BadSetting, Settings

_SECONDS = (0.01, 0.1, 1, 10, 60, 600, 3600)


class Meters:
    """The metrics of one process."""

    def __init__(self, daemons: Iterable[str], clock: Callable[[], float] = time.monotonic) -> None:
        self.registry = CollectorRegistry()
        self._clock = clock
        self._well: dict[str, float] = {}
        silence = Gauge(
            "loractl_daemon_silence_seconds", "Since a step of the daemon ended well.", ["daemon"],
            registry=self.registry,
        )  # fmt: skip
        self._steps = Histogram(
            "loractl_daemon_step_seconds", "From the beginning of a step to its end.", ["daemon"],
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self._failures = Counter(
            "loractl_daemon_failures", "Steps that failed; the code of the refusal, or unforeseen.", ["daemon", "code"],
            registry=self.registry,
        )  # fmt: skip
        for name in daemons:
            self._well[name] = clock()
            silence.labels(name).set_function(lambda name=name: clock() - self._well[name])  # type: ignore[misc]
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

    @contextmanager
    def step(self, daemon: str) -> Iterator[None]:
        """Measure one step, whichever way it ends."""
        began = self._clock()
        try:
            yield
        except Exception as error:
            self._failures.labels(daemon, error.code if isinstance(error, LoractlError) else "unforeseen").inc()
            raise
        else:
            self._well[daemon] = self._clock()
        finally:
            self._steps.labels(daemon).observe(self._clock() - began)


@contextmanager
def served(meters: Meters, settings: Settings) -> Iterator[None]:
    """``/metrics`` at the port of the settings while the block runs, if they name one; `BadSetting` if it is taken."""
    if not settings.metrics_port:
        yield
        return
    try:
        server, thread = start_http_server(settings.metrics_port, settings.metrics_host, meters.registry)
    except OSError as error:
        where = f"{settings.metrics_host}:{settings.metrics_port}"
        raise BadSetting(name="LORACTL_DAEMONS_METRICS_PORT", reason=f"cannot be {where}: {error.strerror}") from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
