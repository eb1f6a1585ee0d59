"""An adapter that did not change, pushed again: what a client asks, and what it sends, as the server counts it."""

import tempfile
from pathlib import Path

from registry import transfer
from registry.schemas import BaseRegistration, Wishes
from tests import live
from tests.factories import base_of, tiny_adapter, tiny_base

from .table import Row, at_most


def run(scale: float = 1.0) -> list[Row]:  # noqa: ARG001  # counts do not depend on sizes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = tiny_base(folder / "base")
        adapter = tiny_adapter(folder / "adapter", base)
        (folder / "registry").mkdir()
        with live.registry(folder / "registry") as registry, registry.client() as client:
            client.register_base(BaseRegistration(table=transfer.table_of(base_of(base))))
            first = transfer.push_adapter(client, adapter, "team/bot", str(base_of(base).digest))
            asked, sent = len(registry.seen), registry.sent()
            registry.seen.clear()
            again = transfer.push_adapter(
                client, adapter, "team/bot", str(base_of(base).digest), Wishes(message="again")
            )
            assert again.version_digest == first.version_digest
            note = f"the first push: {asked} requests, {sent:,} bytes"
            return [
                at_most("unchanged adapter pushed again, bytes sent", registry.sent(), 0, unit="bytes", note=note),
                at_most("unchanged adapter pushed again, requests", len(registry.seen), 1, unit="requests"),
            ]
