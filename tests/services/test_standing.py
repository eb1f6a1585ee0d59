"""Yanked, quarantined, deleted: who still gets a version, what stops it, and that a number never means two things."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlmodel import col, select

from registry.core.errors import (
    AliasNotFound,
    LoractlError,
    MoveNotAllowed,
    ScopeMissing,
    VersionDeleted,
    VersionInUse,
    VersionQuarantined,
    VersionYanked,
)
from registry.core.manifest import Lineage
from registry.core.names import Reference, SeriesName
from registry.db.models import Alias, Version
from registry.files import scan_folder
from registry.services import adapters, aliases, blobs, downloads, withdrawals
from registry.services.references import find_adapter, find_version
from registry.services.tokens import Caller
from tests.factories import base_of, tiny_adapter, tiny_base
from tests.upgrade import POLICY, Upgrade
from tests.world import ADMIN, World, caller, refused, request_of

ADA = caller("ada", team=["read", "publish"], base=["read", "publish"])


@dataclass
class Shelf:
    """Versions v1 to v3 of team/bot on one base, and the verbs that the tests are about."""

    world: World
    folder: Path
    digests: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.base = tiny_base(self.folder / "base")
        self.world.push_base(self.base, line="demo")
        for seed in (1, 2, 3):
            self.digests.append(self.push(seed)["digest"])

    def push(self, seed: int, name: str = "team/bot", who: Caller = ADMIN, parents: tuple[str, ...] = ()) -> Any:
        folder = self.folder / f"a{seed}"
        if not folder.exists():
            tiny_adapter(folder, self.base, seed=seed)
        scan = scan_folder("adapter", folder, base=base_of(self.base).digest, lineage=Lineage(parents=parents))
        request, contents = request_of(scan)
        return self.world.push("adapter", name, request, contents, who)

    def move(self, name: str, ref: str, who: Caller = ADMIN, *, force: bool = False, reason: str = "why") -> list[str]:
        reference = Reference.parse(ref)
        with self.world.database.write() as session:
            adapter = find_adapter(session, who, reference.series)
            version = find_version(session, adapter, reference, gone=name == "delete")
            return withdrawals.move(
                session, who, adapter, version, name, reason=reason, force=force, now=self.world.now
            )

    def alias(self, ref: str, alias: str = "prod") -> None:
        reference = Reference.parse(ref)
        with self.world.database.write() as session:
            adapter = find_adapter(session, ADMIN, reference.series)
            aliases.set_alias(
                session, self.world.store, ADMIN, adapter=adapter, version=find_version(session, adapter, reference),
                alias=alias, expected=aliases.ANY, force=False, reason="", now=self.world.now,
            )  # fmt: skip

    def resolve(self, ref: str, who: Caller = ADMIN) -> str:
        with self.world.database.read() as session:
            found = adapters.resolve(session, who, Reference.parse(ref), None)
            downloads.files(session, self.world.store, self.world.settings, [found.version.digest])
            return f"v{found.version.number} {found.version.status}"

    def pulls(self, digest: str, who: Caller = ADMIN) -> bool:
        with self.world.database.read() as session:
            downloads.download(session, self.world.store, self.world.settings, who, [digest])
        return True


@pytest.fixture
def shelf(world: World, tmp_path: Path) -> Shelf:
    return Shelf(world, tmp_path)


def test_a_yanked_version_is_given_only_to_who_names_it(shelf: Shelf) -> None:
    assert shelf.resolve("team/bot") == "v3 live"
    assert shelf.move("yank", "team/bot@v3", ADA) == []
    assert shelf.resolve("team/bot") == "v2 live"
    assert shelf.resolve("team/bot@v3") == "v3 yanked"
    assert shelf.pulls(shelf.digests[2])
    assert "why" in refused(VersionYanked, lambda: shelf.alias("team/bot@v3"))
    shelf.move("reinstate", "team/bot@v3", ADA)
    assert shelf.resolve("team/bot") == "v3 live"


def test_a_quarantined_version_is_given_to_nobody_and_what_points_at_it_says_why(shelf: Shelf) -> None:
    shelf.alias("team/bot@v3")
    follows = shelf.move("quarantine", "team/bot@v3")
    assert follows == ["alias 'prod' on demo@r1 resolves no more until it is moved"]
    for ref in ("team/bot:prod", "team/bot@v3"):
        assert "why" in refused(VersionQuarantined, lambda ref=ref: shelf.resolve(ref))  # type: ignore[misc]  # a lambda's default
    assert "team/bot@v3" in refused(VersionQuarantined, lambda: shelf.pulls(shelf.digests[2]))
    assert shelf.resolve("team/bot") == "v2 live"
    refused(ScopeMissing, lambda: shelf.move("reinstate", "team/bot@v3", ADA))
    shelf.move("reinstate", "team/bot@v3")
    assert shelf.resolve("team/bot:prod") == "v3 live"


def test_a_stranger_learns_nothing_of_a_quarantine(shelf: Shelf) -> None:
    shelf.move("quarantine", "team/bot@v3")
    stranger = caller("x", other=["read"])
    told = [refused(LoractlError, lambda d=d: shelf.pulls(d, stranger)) for d in (shelf.digests[2], shelf.digests[1])]  # type: ignore[misc]  # as above
    assert told[0].replace(shelf.digests[2], "") == told[1].replace(shelf.digests[1], "")


def test_content_that_another_series_has_can_be_had_there(shelf: Shelf) -> None:
    shelf.push(3, "other/copy")
    shelf.move("delete", "team/bot@v3")
    assert shelf.pulls(shelf.digests[2])
    assert shelf.resolve("other/copy") == "v1 live"
    reader = caller("x", team=["read"])
    assert "v3 was deleted" in refused(VersionDeleted, lambda: shelf.pulls(shelf.digests[2], reader))


def test_a_deleted_version_leaves_a_tombstone_and_its_number_is_not_given_again(shelf: Shelf) -> None:
    shelf.move("delete", "team/bot@v3", reason="a mistake")
    assert "deleted by admin" in refused(VersionDeleted, lambda: shelf.resolve("team/bot@v3"))
    assert "a mistake" in refused(VersionDeleted, lambda: shelf.resolve(f"team/bot@{shelf.digests[2]}"))
    assert shelf.push(4)["version"] == "v4"
    refused(VersionDeleted, lambda: shelf.push(3))
    refused(VersionDeleted, lambda: shelf.move("reinstate", "team/bot@v3"))
    with shelf.world.database.read() as session:
        adapter = find_adapter(session, ADMIN, Reference.parse("team/bot").series)
        told = adapters.versions_page(session, adapter, before=9, limit=9)
        log, _ = adapters.history(session, adapter, limit=9)
    assert [(row.number, row.status) for row in told] == [(4, "live"), (3, "deleted"), (2, "live"), (1, "live")]
    assert any("deleted: a mistake" in entry.detail for entry in log)


def test_a_push_that_was_open_when_its_version_was_deleted_brings_it_not_back(shelf: Shelf) -> None:
    scan = scan_folder("adapter", shelf.folder / "a3", base=base_of(shelf.base).digest)
    request, contents = request_of(scan)
    info = shelf.world.open("adapter", "team/late", request)
    shelf.world.send(info, contents)
    shelf.push(3, "team/late", ADA)
    shelf.move("delete", "team/late@v1")
    shelf.world.ask(info.id)
    shelf.world.verify()
    found = shelf.world.describe(info.id)
    assert found.state != "committed"
    assert [finding["code"] for finding in found.findings] == ["version-deleted"]


def test_what_refers_to_it_stops_a_deletion_and_is_named(shelf: Shelf) -> None:
    shelf.alias("team/bot@v3")
    shelf.push(4, "team/child", parents=(shelf.digests[2],))
    shelf.push(5, "secret/child", parents=(shelf.digests[2],))
    admin = caller("boss", team=["admin"], base=["read"])
    told = refused(VersionInUse, lambda: shelf.move("delete", "team/bot@v3", admin))
    assert "alias 'prod' on demo@r1" in told and "team/child@v1 was made from it" in told
    assert "1 versions of other namespaces" in told and "secret" not in told
    assert shelf.resolve("team/bot:prod") == "v3 live"
    follows = shelf.move("delete", "team/bot@v3", admin, force=True)
    assert follows[0] == "alias 'prod' on demo@r1 is taken away"
    refused(AliasNotFound, lambda: shelf.resolve("team/bot:prod"))
    assert shelf.world.all(select(Alias)) == []


def test_an_upgrade_that_works_on_it_stops_a_deletion_whoever_insists(embedded: World, tmp_path: Path) -> None:
    upgrade = Upgrade(embedded, tmp_path)
    upgrade.policy(POLICY)
    digest = upgrade.serve()
    campaign = upgrade.begin()
    with embedded.database.write() as session:
        adapter = find_adapter(session, ADMIN, Reference.parse("team/bot").series)
        version = find_version(session, adapter, Reference.parse(f"team/bot@{digest}"))
        told = refused(
            VersionInUse,
            lambda: withdrawals.move(
                session, ADMIN, adapter, version, "delete", reason="", force=True, now=embedded.now
            ),
        )
    assert f"upgrade {campaign} works on it" in told


def test_who_publishes_yanks_and_only_admins_insist_withhold_and_delete(shelf: Shelf) -> None:
    shelf.alias("team/bot@v3")
    refused(VersionInUse, lambda: shelf.move("yank", "team/bot@v3", ADA))
    for move in ("quarantine", "delete"):
        refused(ScopeMissing, lambda move=move: shelf.move(move, "team/bot@v1", ADA))  # type: ignore[misc]  # as above
    refused(ScopeMissing, lambda: shelf.move("yank", "team/bot@v3", ADA, force=True))
    refused(ScopeMissing, lambda: shelf.move("yank", "team/bot@v1", caller("r", team=["read"])))
    assert shelf.move("yank", "team/bot@v3", force=True)
    assert "yanked" in refused(VersionYanked, lambda: shelf.resolve("team/bot:prod"))


def test_twice_is_once_and_what_is_no_move_is_refused(shelf: Shelf) -> None:
    shelf.move("yank", "team/bot@v1")
    shelf.move("yank", "team/bot@v1")
    refused(MoveNotAllowed, lambda: shelf.move("yank", _quarantined(shelf)))


def _quarantined(shelf: Shelf) -> str:
    shelf.move("quarantine", "team/bot@v2")
    return "team/bot@v2"


def test_an_alias_does_not_move_to_a_version_that_is_deleted_at_the_same_moment(shelf: Shelf) -> None:
    failed: list[str] = []

    def tried(call: Callable[[], object]) -> None:
        try:
            call()
        except LoractlError as error:
            failed.append(error.code)

    crowd = [
        threading.Thread(target=tried, args=(lambda: shelf.alias("team/bot@v3"),)),
        threading.Thread(target=tried, args=(lambda: shelf.move("delete", "team/bot@v3"),)),
    ]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()
    rows = shelf.world.all(select(Version).join(Alias, col(Alias.version_id) == Version.id))
    assert all(row.status == "live" for row in rows)
    assert len(failed) <= 1 and set(failed) <= {"version-deleted", "version-in-use", "database-down"}


def test_the_bytes_of_a_deleted_version_are_offered_to_nobody(shelf: Shelf) -> None:
    with shelf.world.database.read() as session:
        readable = session.exec(blobs.readable_manifests(ADMIN)).all()
    shelf.move("delete", "team/bot@v3")
    with shelf.world.database.read() as session:
        left = session.exec(blobs.readable_manifests(ADMIN)).all()
    assert set(readable) - set(left) == {shelf.digests[2]}


def test_who_saw_a_version_yanked_does_not_reinstate_what_is_quarantined_by_now(shelf: Shelf) -> None:
    shelf.move("yank", "team/bot@v1")
    publisher = caller("pam", team=["read", "publish"])
    with shelf.world.database.read() as session:
        adapter = find_adapter(session, publisher, SeriesName.parse("team/bot"))
        before = find_version(session, adapter, Reference.parse("team/bot@v1"))
        session.expunge_all()
    shelf.move("quarantine", "team/bot@v1")
    assert before.status == "yanked"
    with pytest.raises(ScopeMissing), shelf.world.database.write() as session:
        withdrawals.move(
            session, publisher, adapter, before, "reinstate", reason="mine", force=False, now=shelf.world.now
        )
    assert shelf.world.one(select(Version.status).where(Version.id == before.id)) == "quarantined"
