"""Push, then pull, is the identity; and only for whoever may read."""

from pathlib import Path

import httpx
import pytest

from registry.core.digest import Digest
from registry.core.errors import VersionNotFound
from registry.schemas import Download
from registry.services import downloads
from tests.factories import tiny_adapter, tiny_base
from tests.world import ADMIN, World, caller


def _get(download: Download) -> bytes:
    answer = httpx.request(download.get.method, download.get.url, headers=download.get.headers, timeout=30)
    answer.raise_for_status()
    return answer.content


def test_push_then_pull_is_the_identity(world: World, tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", shards=2)
    folder = tiny_adapter(tmp_path / "adapter", base)
    pushed = {base: world.push_base(base), folder: world.push_adapter(folder, "team/bot", base)}
    wanted = [str(outcome["digest"]) for outcome in pushed.values()]
    with world.database.read() as session:
        found = downloads.download(session, world.store, world.settings, ADMIN, wanted).files
    for place, outcome in pushed.items():
        files = found[outcome["digest"]]
        assert {file.path for file in files} == {path.name for path in place.iterdir()}
        for file in files:
            data = _get(file)
            assert data == (place / file.path).read_bytes()
            assert (file.size, file.digest) == (len(data), str(Digest.sha256(data)))


def test_what_the_caller_may_not_read_is_refused_as_what_is_not_there(embedded: World) -> None:
    outcome = embedded.push_rows("dataset", "team/rows", b'{"prompt": "a", "completion": "b"}\n')
    unknown = str(Digest.sha256(b"nothing"))
    for who, digest in ((caller("x", other=["read"]), outcome["digest"]), (ADMIN, unknown)):
        with embedded.database.read() as session, pytest.raises(VersionNotFound):
            downloads.download(session, embedded.store, embedded.settings, who, [digest])


def test_one_unreadable_manifest_refuses_the_batch(embedded: World) -> None:
    mine = embedded.push_rows("dataset", "team/rows", b'{"prompt": "a", "completion": "b"}\n')
    theirs = embedded.push_rows("dataset", "other/rows", b'{"prompt": "c", "completion": "d"}\n')
    who, wanted = caller("x", team=["read"]), [mine["digest"], theirs["digest"]]
    with embedded.database.read() as session, pytest.raises(VersionNotFound):
        downloads.download(session, embedded.store, embedded.settings, who, wanted)
