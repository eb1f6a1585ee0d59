"""Quotas and retention: bytes count once, two pushes cannot share the last ones, and what is referred to stays."""

import threading
from pathlib import Path

import pytest
from sqlmodel import col, select

from registry.core.errors import QuotaExceeded, ScopeMissing
from registry.db.models import Version
from registry.schemas import JobRequest, Output, QuotaInfo, QuotaRequest
from registry.services import jobs, pushes, quotas, retention
from registry.services.tokens import Caller
from tests.factories import tiny_base
from tests.services.test_standing import Shelf
from tests.world import ADMIN, World, caller, files_push


def rows(number: int) -> bytes:
    return f'{{"prompt": "{number:04}", "completion": "x"}}\n'.encode()


SIZE = len(rows(0))


def bound(world: World, who: Caller = ADMIN, namespace: str = "team", **bounds: int | None) -> QuotaInfo:
    with world.database.write() as session:
        return quotas.put(session, who, namespace, QuotaRequest.model_validate(bounds), world.now)


def used(world: World, namespace: str = "team") -> int:
    with world.database.read() as session:
        return quotas.used(session, namespace, world.now)


def push(world: World, number: int, name: str = "team/rows") -> None:
    world.push_rows("dataset", name, rows(number))


def test_a_blob_counts_once_in_a_namespace_and_in_each_of_two(world: World) -> None:
    for name in ("team/rows", "team/again", "other/rows"):
        push(world, 1, name)
    assert (used(world), used(world, "other"), used(world, "none")) == (SIZE, SIZE, 0)
    push(world, 2)
    assert used(world) == 2 * SIZE


def test_an_open_push_counts_until_it_is_over(world: World) -> None:
    request, _ = files_push("dataset", {"data.jsonl": rows(1)})
    info = world.open("dataset", "team/rows", request)
    assert used(world) == SIZE
    world.later(hours=25)
    assert used(world) == 0
    with world.database.write() as session:
        pushes.abort(session, ADMIN, info.id, world.now)
    assert used(world) == 0


def test_what_does_not_fit_is_refused_when_it_is_opened_and_leaves_nothing(world: World) -> None:
    push(world, 1)
    assert bound(world, quota_bytes=2 * SIZE).used == SIZE
    push(world, 2)
    with pytest.raises(QuotaExceeded) as told:
        push(world, 3)
    assert (told.value.used, told.value.allowed) == (3 * SIZE, 2 * SIZE)
    assert used(world) == 2 * SIZE
    push(world, 2, "team/again")  # no byte more
    push(world, 3, "other/rows")
    bound(world)
    push(world, 3)


def test_two_pushes_at_once_cannot_both_take_the_last_bytes(world: World) -> None:
    bound(world, quota_bytes=SIZE)
    ended: list[str] = []

    def opened(number: int) -> None:
        request, _ = files_push("dataset", {"data.jsonl": rows(number)})
        try:
            ended.append(world.open("dataset", "team/rows", request).state)
        except QuotaExceeded as error:
            ended.append(error.code)

    crowd = [threading.Thread(target=opened, args=(number,)) for number in range(4)]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()
    assert sorted(ended) == ["open", *["quota-exceeded"] * 3]


def test_bases_count_for_theirs(world: World, tmp_path: Path) -> None:
    world.push_base(tiny_base(tmp_path / "base"), line="demo")
    size = used(world, "base")
    assert size > 1000
    bound(world, namespace="base", quota_bytes=size)
    with pytest.raises(QuotaExceeded):
        world.push_base(tiny_base(tmp_path / "other", seed=5), line="demo")


def test_a_namespace_does_not_bound_itself(world: World) -> None:
    with pytest.raises(ScopeMissing):
        bound(world, caller("boss", team=["admin"]), quota_bytes=1)
    with pytest.raises(ScopeMissing), world.database.read() as session:
        quotas.show(session, caller("x", other=["read"]), "team", world.now)


# ── retention ────────────────────────────────────────────────────────────────


@pytest.fixture
def shelf(world: World, tmp_path: Path) -> Shelf:
    return Shelf(world, tmp_path)


def standing(shelf: Shelf) -> dict[str, str]:
    found = shelf.world.all(select(Version).order_by(col(Version.id)))
    return {f"v{row.number}": row.status for row in found if row.adapter_id == found[0].adapter_id}


def test_old_versions_that_nothing_refers_to_are_deleted_and_the_newest_stays(shelf: Shelf) -> None:
    world = shelf.world
    bound(world, keep_days=30)
    assert retention.retire(world.database, world.now) == 0
    world.later(days=31)
    shelf.alias("team/bot@v1")
    assert retention.retire(world.database, world.now) == 1
    assert standing(shelf) == {"v1": "live", "v2": "deleted", "v3": "live"}
    assert retention.retire(world.database, world.now) == 0


def test_what_something_was_made_from_stays_as_long_as_that_does(shelf: Shelf) -> None:
    world = shelf.world
    shelf.push(4, "other/child", parents=(shelf.digests[0],))
    bound(world, keep_days=1)
    world.later(days=2)
    assert retention.retire(world.database, world.now) == 1
    assert standing(shelf) == {"v1": "live", "v2": "deleted", "v3": "live"}
    shelf.move("delete", "other/child@v1")
    assert retention.retire(world.database, world.now) == 1
    assert standing(shelf) == {"v1": "deleted", "v2": "deleted", "v3": "live"}


def test_a_namespace_that_says_nothing_keeps_everything(shelf: Shelf) -> None:
    shelf.world.later(days=9999)
    assert retention.retire(shelf.world.database, shelf.world.now) == 0


def test_what_is_in_use_does_not_keep_what_is_not(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    world = shelf.world
    monkeypatch.setattr(retention, "_AT_ONCE", 1)
    bound(world, keep_days=30)
    compress = {"kind": "compress", "adapter": "team/bot@v1", "rank": 1}
    with world.database.write() as session:
        jobs.submit(session, ADMIN, JobRequest(recipe=compress, output=Output(adapter="team/small")), world.now)
    world.later(days=31)
    assert retention.retire(world.database, world.now) == 1
    assert standing(shelf) == {"v1": "live", "v2": "deleted", "v3": "live"}
    assert retention.retire(world.database, world.now) == 0
