"""What Prometheus scrapes of a worker: jobs at work, attempts by kind and outcome, claims that failed.

Celery works in processes of its own below the one that answers, so in a worker counts go through files
(prometheus_client's multiprocess mode), in a folder that must be in the environment before this is imported.
"""

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
_MINUTES = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 24 * 3600)


class Meters:
    """The metrics of one worker."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.jobs = Gauge(
            "loractl_worker_jobs", "Jobs at work.", ["kind"], multiprocess_mode="livesum", registry=self.registry
        )
        self.attempts = Histogram(
            "loractl_worker_attempt_seconds", "From the claim of a job to the end of the attempt.", ["kind", "outcome"],
            buckets=_MINUTES, registry=self.registry,
        )  # fmt: skip
        self.claims = Counter(
            "loractl_worker_claim_failures", "Claims that failed, by the code of the refusal.", ["code"],
            registry=self.registry,
        )  # fmt: skip


def serve(host: str, port: int) -> None:
    """Answer ``/metrics`` from a thread, for all processes of this worker, for as long as it lives."""
    together = CollectorRegistry()
    MultiProcessCollector(together)  # type: ignore[no-untyped-call]
    start_http_server(port, host, together)


def forget(pid: int) -> None:
    """A process of the pool has ended: what it had at work is over."""
    if FOLDER in os.environ:
        mark_process_dead(pid)  # type: ignore[no-untyped-call]
