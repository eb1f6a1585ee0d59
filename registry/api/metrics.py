"""What Prometheus scrapes at ``/metrics``: requests as the API saw them, queues and gates as the rows say.

Where several processes are behind one port, whichever is asked tells what all of them counted: they count in the folder
that prometheus_client's own variable ``PROMETHEUS_MULTIPROC_DIR`` names.
Labels are bounded: routes by their template, methods and kinds by what there is, queues by `gauges.MOST_QUEUES`.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from registry.db.engine import Database
from registry.services import gauges

_METHODS = {"GET", "HEAD", "POST", "PUT", "DELETE"}
_MINUTES = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 24 * 3600)


class Meters:
    """The metrics of one API process, or of all that share a folder."""

    def __init__(self, database: Database, clock: Callable[[], datetime]) -> None:
        self._rows = _Rows(database, clock)
        self._shared = _shared_folder()
        self.registry = CollectorRegistry()
        self.requests = Histogram(
            "loractl_request_seconds", "From a request to the end of its answer.", ["method", "route", "status"],
            registry=self.registry,
        )  # fmt: skip
        self.in_flight = Gauge(
            "loractl_requests_in_flight", "Requests being answered.", multiprocess_mode="livesum",
            registry=self.registry,
        )  # fmt: skip
        self.refused = Counter(
            "loractl_refusals", "Refusals for asking too often or too much.", ["code"], registry=self.registry
        )
        self.jobs = Histogram(
            "loractl_job_seconds", "From the claim of the last attempt to the end of a job.", ["kind", "outcome"],
            buckets=_MINUTES, registry=self.registry,
        )  # fmt: skip
        self.pushes = Histogram(
            "loractl_push_seconds", "From opening a push to its commit: the transfer, and its verification.", ["kind"],
            buckets=_MINUTES, registry=self.registry,
        )  # fmt: skip
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.registry.register(self._rows)

    def to_scrape(self) -> CollectorRegistry:
        """Everything, of all processes that share the folder; of a shared one without what is one process's own."""
        if self._shared is None:
            return self.registry
        every = CollectorRegistry()
        MultiProcessCollector(every, str(self._shared))  # type: ignore[no-untyped-call]
        every.register(self._rows)
        return every


def _shared_folder() -> Path | None:
    """The folder in which processes count together, without the gauges of those that have gone."""
    if not (name := os.environ.get("PROMETHEUS_MULTIPROC_DIR")):
        return None
    folder = Path(name)
    folder.mkdir(parents=True, exist_ok=True)
    for pid in {int(path.stem.rpartition("_")[2]) for path in folder.glob("gauge_live*.db")}:
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, PermissionError):  # gone; or somebody else's by now
            with suppress(FileNotFoundError):  # another process saw it too
                mark_process_dead(pid, name)  # type: ignore[no-untyped-call]
    return folder


class _Rows:
    """What the database says, asked at each scrape."""

    def __init__(self, database: Database, clock: Callable[[], datetime]) -> None:
        self._database = database
        self._clock = clock

    def describe(self) -> list[Metric]:
        """Nothing is asked when it is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        """One family a question."""
        with self._database.read() as session:
            queues = gauges.queues(session, self._clock())
            verdicts = gauges.verdicts(session)
            unverified = gauges.unverified(session)
            unchained_s, deaf = gauges.unchained_s(session, self._clock()), gauges.deaf(session)
        jobs = GaugeMetricFamily("loractl_jobs", "Unfinished jobs.", labels=["queue", "state"])
        oldest = GaugeMetricFamily("loractl_job_wait_seconds", "Age of the oldest waiting job.", labels=["queue"])
        overdue = GaugeMetricFamily(
            "loractl_lease_overdue_seconds", "How long ago the earliest lease ran out.", labels=["queue"]
        )
        for queue in queues:
            jobs.add_metric([queue.name, "queued"], queue.waiting)
            jobs.add_metric([queue.name, "running"], queue.running)
            oldest.add_metric([queue.name], queue.oldest_s)
            overdue.add_metric([queue.name], queue.overdue_s)
        gates = GaugeMetricFamily("loractl_gate_verdicts", "Verdicts in the ledger.", labels=["tier", "zone"])
        for (tier, zone), count in verdicts.items():
            gates.add_metric([tier, zone], count)
        yield from (jobs, oldest, overdue, gates)
        yield GaugeMetricFamily("loractl_pushes_unverified", "Pushes that wait for a verifier.", value=unverified)
        wait = "Age of the oldest row of the audit that waits for its place."
        yield GaugeMetricFamily("loractl_audit_wait_seconds", wait, value=unchained_s)
        yield GaugeMetricFamily("loractl_webhooks_failing", "Webhooks whose receiver took nothing.", value=deaf)


class Measured:
    """Measure every request under the template of its route."""

    def __init__(self, app: ASGIApp, meters: Meters) -> None:
        self.app = app
        self.meters = meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500

        async def mark(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.meters.in_flight.inc()
        try:
            await self.app(scope, receive, mark)
        finally:
            self.meters.in_flight.dec()
            route = getattr(scope.get("route"), "path", "(none)")
            method = scope["method"] if scope["method"] in _METHODS else "(other)"
            self.meters.requests.labels(method, route, str(status)).observe(time.perf_counter() - began)
