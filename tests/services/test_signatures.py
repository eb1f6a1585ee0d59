"""Signed versions: which signatures are taken, what is refused without one, and what a revocation ends."""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlmodel import col, func, select

from registry.core.campaign import State
from registry.core.errors import (
    BadRequest,
    BadSignature,
    LoractlError,
    MoveNotAllowed,
    NoSigningKey,
    ScopeMissing,
    SignatureRequired,
    SigningKeyNotFound,
    SigningKeyRevoked,
    VersionDeleted,
)
from registry.core.manifest import FileEntry, Manifest
from registry.core.names import Reference
from registry.db.models import Alias, Push, Signature, Version
from registry.files import scan_folder
from registry.keys import PrivateKey
from registry.schemas import JobRequest, KeyRequest, Output, PushRequest, Wishes
from registry.services import adapters, aliases, campaigns, downloads, jobs, signatures, withdrawals
from registry.services.references import find_adapter, find_version
from registry.services.tokens import Caller
from tests.factories import base_of, tiny_adapter, tiny_base
from tests.upgrade import POLICY, Upgrade
from tests.world import ADMIN, World, caller, files_push, refused, request_of

KEY, OTHER = PrivateKey.generate(), PrivateKey.generate()
BOSS = caller("boss", team=["admin"])
ADA = caller("ada", team=["read", "publish"])


@dataclass
class Desk:
    """A registry in which ``team`` trusts `KEY`, and the verbs of who signs there."""

    world: World
    folder: Path

    def __post_init__(self) -> None:
        self.base = tiny_base(self.folder / "base")
        self.world.push_base(self.base, line="demo")
        self.trust(KEY)

    def trust(self, key: PrivateKey, namespace: str = "team", who: Caller = ADMIN) -> str:
        with self.world.database.write() as session:
            request = KeyRequest(public=key.public.pem, name=f"key of {who.name}")
            return signatures.add_key(session, who, namespace, request, self.world.now).fingerprint

    def revoke(self, key: PrivateKey, who: Caller = BOSS) -> list[str]:
        with self.world.database.write() as session:
            found = signatures.revoke(session, who, "team", key.public.fingerprint, "stolen", self.world.now)
            return found[1]

    def require(self, required: bool = True, who: Caller = BOSS) -> list[str]:
        with self.world.database.write() as session:
            return signatures.set_required(session, who, "team", required, self.world.now).follows

    def request(self, seed: int, *keys: PrivateKey, series: str = "team/bot", **wishes: Any) -> tuple[PushRequest, Any]:
        folder = self.folder / f"a{seed}"
        if not folder.exists():
            tiny_adapter(folder, self.base, seed=seed)
        scan = scan_folder("adapter", folder, base=base_of(self.base).digest)
        request, contents = request_of(scan, Wishes(**wishes))
        signed = [key.sign(series, scan.manifest).document() for key in keys]
        return request.model_copy(update={"signatures": signed}), contents

    def push(self, seed: int, *keys: PrivateKey, who: Caller = ADA, **wishes: Any) -> Any:
        request, contents = self.request(seed, *keys, **wishes)
        return self.world.push("adapter", "team/bot", request, contents, who)

    def sign(self, ref: str, key: PrivateKey = KEY, who: Caller = ADA, **changes: Any) -> str:
        reference = Reference.parse(ref)
        with self.world.database.write() as session:
            adapter = find_adapter(session, who, reference.series)
            version = find_version(session, adapter, reference)
            manifest = signatures.manifest_of(session, version).model_copy(update=changes)
            document = key.sign(str(reference.series), manifest).document()
            return signatures.sign(session, who, adapter, version, document, self.world.now).key

    def alias(self, ref: str, alias: str = "prod") -> None:
        reference = Reference.parse(ref)
        with self.world.database.write() as session:
            adapter = find_adapter(session, ADA, reference.series)
            aliases.set_alias(
                session, self.world.store, ADA, adapter=adapter, version=find_version(session, adapter, reference),
                alias=alias, expected=aliases.ANY, force=False, reason="", now=self.world.now,
            )  # fmt: skip

    def roll_back(self, alias: str = "prod") -> None:
        reference = Reference.parse("team/bot@v1")
        with self.world.database.write() as session:
            adapter = find_adapter(session, ADA, reference.series)
            on = adapters.resolve(session, ADA, reference, None).base
            aliases.roll_back(session, ADA, adapter=adapter, base=on, alias=alias, reason="", now=self.world.now)

    def resolve(self, ref: str) -> str:
        with self.world.database.read() as session:
            found = adapters.resolve(session, ADA, Reference.parse(ref), None)
            downloads.files(session, self.world.store, self.world.settings, [found.version.digest])
            return f"v{found.version.number}"

    def signers(self, ref: str) -> list[str]:
        reference = Reference.parse(ref)
        with self.world.database.read() as session:
            adapter = find_adapter(session, ADA, reference.series)
            version = find_version(session, adapter, reference)
            shown = signatures.show(session, adapter, version)
            living = [one.key for one in shown.signatures if one.revoked_at is None]
            assert len(adapters.describe(session, [(version, adapter)])[0].signed_by) == len(living)
            return living

    def pushes(self) -> int:
        return int(self.world.one(select(func.count()).select_from(Push)))


@pytest.fixture
def desk(world: World, tmp_path: Path) -> Desk:
    return Desk(world, tmp_path)


# ── which signatures are taken ───────────────────────────────────────────────


def test_a_signature_comes_with_the_push_or_later_and_changes_no_digest(desk: Desk) -> None:
    unsigned = desk.push(1)
    assert unsigned["signed"] == []
    signed = desk.push(1, KEY)
    assert (signed["digest"], signed["ref"]) == (unsigned["digest"], unsigned["ref"])
    assert signed["signed"] == desk.signers("team/bot@v1") == [KEY.public.fingerprint]
    desk.trust(OTHER)
    assert desk.sign("team/bot@v1", OTHER) == OTHER.public.fingerprint
    assert desk.push(2, KEY, OTHER)["signed"] == [KEY.public.fingerprint, OTHER.public.fingerprint]
    assert len(desk.signers("team/bot@v1")) == len(desk.signers("team/bot@v2")) == 2


def test_signing_again_keeps_the_first_signature_of_each_key(desk: Desk) -> None:
    desk.push(1, KEY)
    first = desk.world.one(select(Signature.bundle))
    desk.sign("team/bot@v1")
    desk.push(1, KEY)
    assert desk.world.one(select(Signature.bundle)) == first


def test_two_that_sign_at_once_leave_one_signature(desk: Desk) -> None:
    desk.push(1)
    at_once(lambda: desk.sign("team/bot@v1"), lambda: desk.sign("team/bot@v1"))
    assert desk.signers("team/bot@v1") == [KEY.public.fingerprint]


def test_a_signature_of_anything_else_is_refused_at_the_push_and_afterwards(desk: Desk) -> None:
    desk.push(1)
    opened = desk.pushes()
    other = FileEntry(path="README.md", size=1, digest="sha256:" + "0" * 64)
    assert "it is of sha256:" in refused(BadSignature, lambda: desk.sign("team/bot@v1", files=(other,)))
    assert "it is of sha256:" in refused(BadSignature, lambda: desk.sign("team/bot@v1", base="b3:" + "0" * 64))
    request, contents = desk.request(2, KEY, series="team/faq")
    pushed = lambda: desk.world.push("adapter", "team/bot", request, contents, ADA)  # noqa: E731  # for `refused`
    assert "it is of 'team/faq'" in refused(BadSignature, pushed)
    manifest = request.manifest | {"config": {**request.manifest["config"], "r": 1}}
    request = desk.request(2, KEY)[0].model_copy(update={"manifest": manifest})
    refused(BadSignature, pushed)
    assert desk.pushes() == opened
    assert desk.signers("team/bot@v1") == []


def test_a_key_that_nobody_trusts_here_or_that_was_revoked_is_refused_with_words(desk: Desk) -> None:
    desk.push(1)
    desk.trust(OTHER, "other")
    for call in (lambda: desk.push(2, OTHER), lambda: desk.sign("team/bot@v1", OTHER)):
        assert "signs for 'team'" in refused(SigningKeyNotFound, call)
    desk.revoke(KEY)
    for call in (lambda: desk.push(2, KEY), lambda: desk.sign("team/bot@v1", KEY), lambda: desk.trust(KEY)):
        told = refused(SigningKeyRevoked, call)
        assert "revoked by boss" in told and "stolen" in told
    assert desk.signers("team/bot@v1") == []


def test_datasets_and_bases_are_not_signed_and_not_stopped(desk: Desk) -> None:
    desk.require()
    request, contents = files_push("dataset", {"data.jsonl": b'{"prompt": "1", "completion": "2"}\n'})
    document = KEY.sign("team/rows", Manifest.parse(request.manifest)).document()
    signed = request.model_copy(update={"signatures": [document]})
    refused(BadRequest, lambda: desk.world.push("dataset", "team/rows", signed, contents))
    assert desk.world.push("dataset", "team/rows", request, contents)["version"] == "v1"


def test_admins_of_a_namespace_say_whom_it_trusts(desk: Desk) -> None:
    for call in (lambda: desk.trust(OTHER, who=ADA), lambda: desk.revoke(KEY, ADA), lambda: desk.require(who=ADA)):
        refused(ScopeMissing, call)
    stranger = caller("x", other=["admin"])
    with desk.world.database.read() as session:
        refused(ScopeMissing, lambda: signatures.keys(session, stranger, "team"))
        [key] = signatures.keys(session, ADA, "team")
        assert (key.name, key.public) == ("key of admin", KEY.public.pem)


def test_a_key_that_is_there_is_not_added_twice(desk: Desk) -> None:
    desk.trust(KEY, who=BOSS)
    at_once(lambda: desk.trust(OTHER), lambda: desk.trust(OTHER))
    with desk.world.database.read() as session:
        known = signatures.keys(session, ADA, "team")
    assert [key.fingerprint for key in known] == [KEY.public.fingerprint, OTHER.public.fingerprint]
    assert known[0].name == "key of admin"


# ── where signatures are required ────────────────────────────────────────────


def test_an_unsigned_push_is_refused_before_it_is_opened(desk: Desk) -> None:
    desk.require()
    opened = desk.pushes()
    assert "team/bot has no signature" in refused(SignatureRequired, lambda: desk.push(1))
    assert desk.pushes() == opened
    assert desk.push(1, KEY, aliases=["dev"])["aliases"] == ["dev"]
    assert desk.push(1)["signed"] == [KEY.public.fingerprint]  # the version that is there is signed
    assert desk.resolve("team/bot:dev") == "v1"


def test_a_push_that_was_open_when_signatures_became_required_is_signed_without_sending_a_byte_again(
    desk: Desk,
) -> None:
    request, contents = desk.request(1)
    info = desk.world.open("adapter", "team/bot", request, ADA)
    desk.world.send(info, contents)
    desk.world.ask(info.id, ADA)
    desk.require()
    desk.world.verify()
    refused(SignatureRequired, lambda: desk.world.ask(info.id, ADA))
    assert desk.world.all(select(Version)) == []
    again = desk.world.open("adapter", "team/bot", desk.request(1, KEY)[0], ADA)
    assert (again.id, again.state) == (info.id, "verified")
    assert desk.world.ask(info.id, ADA).state == "committed"
    assert desk.signers("team/bot@v1") == [KEY.public.fingerprint]


def test_a_key_that_is_revoked_while_the_bytes_are_sent_signs_nothing(desk: Desk) -> None:
    request, contents = desk.request(1, KEY)
    info = desk.world.open("adapter", "team/bot", request, ADA)
    desk.world.send(info, contents)
    desk.revoke(KEY)
    refused(SigningKeyRevoked, lambda: desk.world.commit(info.id, ADA))
    assert desk.world.all(select(Version)) == []


def test_what_is_not_signed_is_given_only_to_who_names_it_and_no_alias_moves_to_it(desk: Desk) -> None:
    desk.push(1, KEY, aliases=["prod"])
    desk.push(2, aliases=["prod", "dev"])
    assert desk.require() == [
        "team/bot:prod resolves no more until v2 is signed", "team/bot:dev resolves no more until v2 is signed",
    ]  # fmt: skip
    for call in (
        lambda: desk.resolve("team/bot:prod"), lambda: desk.resolve("team/bot"),
        lambda: desk.alias("team/bot@v2", "qa"),
    ):  # fmt: skip
        assert "team/bot@v2 has no signature" in refused(SignatureRequired, call)
    assert (desk.resolve("team/bot@v1"), desk.resolve("team/bot@v2")) == ("v1", "v2")
    desk.roll_back()
    assert desk.resolve("team/bot:prod") == "v1"
    refused(SignatureRequired, desk.roll_back)
    desk.sign("team/bot@v2")
    assert (desk.resolve("team/bot"), desk.resolve("team/bot:dev")) == ("v2", "v2")
    desk.roll_back()
    assert desk.resolve("team/bot:prod") == "v2"


def test_nothing_is_required_before_there_is_a_key_to_sign_by(desk: Desk) -> None:
    desk.revoke(KEY)
    refused(NoSigningKey, desk.require)
    desk.trust(OTHER)
    desk.require()
    refused(SignatureRequired, lambda: desk.push(1))
    desk.require(False)
    assert desk.push(1)["version"] == "v1"


def test_a_revocation_ends_what_only_that_key_signed_and_another_signature_brings_it_back(desk: Desk) -> None:
    desk.trust(OTHER)
    desk.push(1, KEY, OTHER, aliases=["old"])
    desk.push(2, KEY, aliases=["prod"])
    desk.require()
    assert desk.revoke(KEY) == [
        "team/bot@v2 has no signature that counts", "team/bot:prod resolves no more until v2 is signed",
    ]  # fmt: skip
    assert desk.revoke(KEY) == []
    assert desk.resolve("team/bot:old") == "v1"
    refused(SignatureRequired, lambda: desk.resolve("team/bot:prod"))
    refused(SignatureRequired, lambda: desk.alias("team/bot@v2", "qa"))
    refused(SignatureRequired, lambda: desk.push(2))
    desk.sign("team/bot@v2", OTHER)
    assert desk.resolve("team/bot:prod") == "v2"
    assert desk.signers("team/bot@v2") == [OTHER.public.fingerprint]


def test_signatures_of_a_deleted_version_stay_with_its_tombstone_and_nobody_adds_one(desk: Desk) -> None:
    desk.push(1, KEY)
    desk.trust(OTHER)
    with desk.world.database.write() as session:
        adapter = find_adapter(session, BOSS, Reference.parse("team/bot").series)
        version = find_version(session, adapter, Reference.parse("team/bot@v1"))
        withdrawals.move(session, BOSS, adapter, version, "delete", reason="", force=True, now=desk.world.now)
    refused(VersionDeleted, lambda: desk.sign("team/bot@v1", OTHER))
    assert len(desk.world.all(select(Signature))) == 1


def at_once(*calls: Callable[[], object]) -> list[LoractlError | None]:
    """What each call was refused with, when they begin together."""
    told: list[LoractlError | None] = [None] * len(calls)
    together = threading.Barrier(len(calls))

    def run(place: int) -> None:
        together.wait()
        try:
            calls[place]()
        except LoractlError as error:
            told[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


def test_of_a_revocation_and_a_move_at_once_one_is_first_and_the_other_knows(desk: Desk) -> None:
    desk.require()
    for round_ in range(4):
        key = PrivateKey.generate()
        desk.trust(key)
        version = desk.push(round_, key)["ref"]
        told: list[str] = []
        _, moved = at_once(
            lambda key=key, told=told: told.extend(desk.revoke(key)),  # type: ignore[misc]  # a lambda's default
            lambda version=version: desk.alias(version, "prod"),  # type: ignore[misc]  # as above
        )
        at = desk.world.all(
            select(Version.number).join(Alias, col(Alias.version_id) == Version.id).where(Alias.name == "prod")
        )
        stopped = f"team/bot:prod resolves no more until {version.partition('@')[2]} is signed"
        if moved is None:  # the move was first: the revocation has told that it ends
            assert f"v{at[0]}" == version.partition("@")[2]
            assert stopped in told
        else:
            assert isinstance(moved, SignatureRequired)
            assert stopped not in told
        refused(SignatureRequired, lambda version=version: desk.alias(version, "late"))  # type: ignore[misc]  # as above


# ── what workers make ────────────────────────────────────────────────────────


@pytest.fixture
def upgrade(world: World, tmp_path: Path) -> Upgrade:
    found = Upgrade(world, tmp_path)
    found.policy(POLICY)
    found.serve()
    with world.database.write() as session:
        signatures.add_key(session, ADMIN, "team", KeyRequest(public=KEY.public.pem, name="k"), world.now)
        signatures.set_required(session, ADMIN, "team", required=True, now=world.now)
    return found


def sign_named(upgrade: Upgrade, reason: str, key: PrivateKey = KEY) -> None:
    """Sign what a campaign's item says that it waits for."""
    reference = Reference.parse(reason.partition("loractl sign ")[2].split()[0])
    with upgrade.world.database.write() as session:
        adapter = find_adapter(session, ADMIN, reference.series)
        version = find_version(session, adapter, reference)
        document = key.sign(str(reference.series), signatures.manifest_of(session, version)).document()
        signatures.sign(session, ADMIN, adapter, version, document, upgrade.world.now)


def test_a_campaign_says_that_its_candidate_waits_for_a_signature_and_goes_on_when_it_is_there(
    upgrade: Upgrade,
) -> None:
    upgrade.skills = {"serving": 0.9, "carry": 0.9}
    campaign = upgrade.begin()
    upgrade.run()
    item = upgrade.item()
    assert (item.state, upgrade.prod(upgrade.new)) == (State.WAITING, None)
    assert item.reason.startswith("waits for a signature: loractl sign team/bot@v2 --key KEY; carry passed")
    with upgrade.world.database.write() as session:
        refused(
            MoveNotAllowed,
            lambda: campaigns.approve(session, ADMIN, campaign, "team/bot", "prod", upgrade.world.now),
        )
    sign_named(upgrade, item.reason)
    upgrade.run()
    assert (upgrade.state(), upgrade.prod(upgrade.new)) == (State.PROMOTED, "carry")


def test_a_campaign_whose_candidate_nobody_signs_ends_at_its_deadline(upgrade: Upgrade) -> None:
    upgrade.skills = {"serving": 0.9, "carry": 0.9}
    campaign = upgrade.begin(deadline=upgrade.world.now.replace(year=upgrade.world.now.year + 1))
    upgrade.run()
    assert upgrade.state() == State.WAITING
    upgrade.world.later(days=400)
    upgrade.run()
    assert (upgrade.state(), upgrade.info(campaign).state) == (State.FROZEN, "finished")
    assert "nobody signed @v2 before the deadline" in upgrade.item().reason


def test_a_jobs_alias_stays_where_it_is_until_its_result_is_signed(upgrade: Upgrade) -> None:
    recipe = {"kind": "finetune", "base": "demo", "datasets": ["team/data"], "steps": 2}
    asked = JobRequest(recipe=recipe, output=Output(adapter="team/new", aliases=["dev"]))
    with upgrade.world.database.write() as session:
        jobs.submit(session, ADMIN, asked, upgrade.world.now)
    job = upgrade.work_one()
    assert job is not None
    with upgrade.world.database.read() as session:
        done = jobs.get(session, ADMIN, job.id)
    assert done.state == "succeeded"
    assert "team/new@v1 has no signature" in json.dumps(done.result)
    assert upgrade.prod(upgrade.old, "team/new", "dev") is None
