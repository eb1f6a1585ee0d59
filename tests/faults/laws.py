"""What must hold in a town when everything has been healed and everybody has come to rest; each a list of breaches."""

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from sqlmodel import Session, col, func, or_, select

from registry.client import RegistryClient
from registry.core.audit import Head, Linked, breaks
from registry.core.campaign import State
from registry.core.lifecycle import CampaignState, JobState, PushState, VersionState
from registry.daemons import gc
from registry.db.models import (
    Adapter,
    Alias,
    AliasMove,
    AuditHead,
    AuditRow,
    Blob,
    Campaign,
    CampaignItem,
    Job,
    ManifestBlob,
    Push,
    StoredManifest,
    Version,
)
from registry.parts import Parts
from registry.services import audit, pushes
from registry.services.blobs import blob_key
from registry.transfer import PARTIAL, pull
from tests.faults import people
from tests.faults.people import Journals, Line
from tests.faults.town import WORKSHOP_LEASE_S, Town

PATIENCE_S = 90.0
"""What somebody began that died comes to its end when another may take it over: after a lease, on a busy machine."""
WORKSHOP_PATIENCE_S = 600.0
"""Trainings and upgrades come to their end on a machine that has other work to do."""
_ENDED = (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


def come_to_rest(town: Town, seed: int) -> list[str]:
    """Let what was begun come to its end: work is done, pushes are verified or expire."""
    patience_s = WORKSHOP_PATIENCE_S if town.works else PATIENCE_S
    parts, before, deadline = Parts.of(town.settings), "", 0.0
    try:
        while left := _begun(parts):
            if left != before:
                before, deadline = left, time.time() + patience_s
            if time.time() > deadline:
                return [f"{left} did not come to an end, and for {patience_s:.0f} s none of them did"]
            if not town.crowd:
                town.comes(people.worker, "ida", seed)
            with parts.database.write() as session:  # as the collector does once a minute: nobody verifies those
                pushes.expire(session, parts.clock())
            time.sleep(0.2)
        return []
    finally:
        parts.close()
        town.leave()


def _begun(parts: Parts) -> str:
    """What has not come to its end, in words."""
    with parts.database.read() as session:
        jobs = session.exec(select(func.count()).select_from(Job).where(col(Job.state).not_in(_ENDED))).one()
        verifying = select(func.count()).select_from(Push).where(Push.state == PushState.VERIFYING)
        pushes = session.exec(verifying).one()
        running = select(func.count()).select_from(Campaign).where(Campaign.state == CampaignState.RUNNING)
        campaigns = session.exec(running).one()
    told = f"{jobs} jobs, {pushes} verifications and {campaigns} upgrades"
    return told if jobs or pushes or campaigns else ""


def breaches(town: Town, seen: set[str]) -> list[str]:
    """What is broken; ``seen``: digests that were pulled and verified before, which grows."""
    promised = list(Journals(town.place.folder).news())
    parts = Parts.of(town.settings)
    try:
        with parts.database.snapshot() as connection, Session(connection) as session:  # daemons go on meanwhile
            found = [told for law in LAWS for told in law(session, promised)]
            found += _blobs_are_there(session, parts)
            found += _nothing_is_left(session, parts)
        found += town.fallen
        town.fallen.clear()
        return found + _pulls(town, promised, seen) + _nothing_is_half_written(town.place.folder, promised)
    finally:
        parts.close()


Promises = list[Line]


def no_one_saw_what_should_not_be(_session: Session, promised: Promises) -> Iterator[str]:
    """Nobody was refused but with a reason to come again, or because somebody was quicker."""
    for line in promised:
        if line["did"] == "breach":
            yield f"{line['who']}: {line['code']}: {line['told']}"


def what_was_committed_is_there(session: Session, promised: Promises) -> Iterator[str]:
    """Every version that somebody was told of, with the number that was told."""
    rows = session.exec(select(Adapter.namespace, Adapter.name, Version.digest, Version.number).join(Version)).all()
    numbers = {(f"{namespace}/{name}", digest): number for namespace, name, digest, number in rows}
    for line in promised:
        if line["did"] == "pushed" and line["kind"] == "adapter":
            told, now = (line["outcome"] or {}).get("version"), numbers.get((line["name"], line["digest"]))
            if now is None or told != f"v{now}":
                yield f"{line['name']} {line['digest']} was {told}, and is v{now}"


def what_was_deleted_stays_so(session: Session, promised: Promises) -> Iterator[str]:
    """A tombstone under the number that it had."""
    there = {
        (f"{adapter.namespace}/{adapter.name}", f"v{version.number}"): (version.digest, version.status)
        for adapter, version in session.exec(select(Adapter, Version).join(Version))
    }
    for line in promised:
        if line["did"] == "deleted":
            now = there.get((line["name"], line["outcome"]["version"]))
            if now != (line["digest"], VersionState.DELETED):
                yield f"{line['name']}@{line['outcome']['version']} was deleted, and is {now}"


def numbers_are_given_once(session: Session, _promised: Promises) -> Iterator[str]:
    """A version has one number, and a number one version; exactly one is the latest of a base."""
    for adapter, number in session.exec(
        select(Version.adapter_id, Version.number).group_by(col(Version.adapter_id), col(Version.number))
        .having(func.count() > 1)
    ):  # fmt: skip
        yield f"number {number} of adapter {adapter} was given twice"
    live = select(Version.adapter_id, func.max(Version.number)).where(Version.status == VersionState.LIVE)
    latest = live.group_by(col(Version.adapter_id))
    newest = dict(session.exec(latest).all())
    marked = dict(session.exec(select(Version.adapter_id, Version.number).where(Version.latest)).all())
    if newest != marked:
        yield f"the newest versions are {newest}, and marked as such are {marked}"


def aliases_stand_where_they_were_put(session: Session, promised: Promises) -> Iterator[str]:
    """Each has a history without a gap that ends where it points; every move that was told is in it."""
    moves = session.exec(select(AliasMove).order_by(col(AliasMove.id))).all()
    for alias in session.exec(select(Alias)).all():
        mine = [m for m in moves if (m.adapter_id, m.base_id, m.name) == (alias.adapter_id, alias.base_id, alias.name)]
        generations = sorted(move.generation for move in mine)
        if generations != list(range(1, alias.generation + 1)):
            yield f"alias {alias.name} of adapter {alias.adapter_id} is at {alias.generation}; its moves: {generations}"
        elif mine and max(mine, key=lambda move: move.generation).to_version_id != alias.version_id:
            yield f"alias {alias.name} of adapter {alias.adapter_id} does not point where its last move went"
    names = {adapter.id: f"{adapter.namespace}/{adapter.name}" for adapter in session.exec(select(Adapter)).all()}
    digests = dict(session.exec(select(Version.id, Version.digest)).all())
    known = {(names[move.adapter_id], move.name, move.generation): digests.get(move.to_version_id) for move in moves}
    for line in promised:
        if line["did"] == "moved":
            now = known.get((line["name"], line["alias"], line["generation"]))
            if now != line["digest"]:
                yield f"{line['name']}:{line['alias']} move {line['generation']} went to {line['digest']}; now {now}"


def work_is_done_once(session: Session, promised: Promises) -> Iterator[str]:
    """Every job that was asked for came to one end; who was told that it is done finds one version of it."""
    jobs = {job.id: job for job in session.exec(select(Job)).all()}
    made = Counter(session.exec(select(Version.job_id).where(col(Version.job_id).is_not(None))).all())
    for line in promised:
        if line["did"] == "asked" and line["job"] not in jobs:
            yield f"job {line['job']} was lost"
        if line["did"] == "finished" and jobs[line["job"]].state != JobState.SUCCEEDED:
            yield f"job {line['job']} was finished, and is {jobs[line['job']].state}"
    for identity, job in jobs.items():
        if job.state not in _ENDED:
            yield f"job {identity} is {job.state}"
        if made[identity] != (job.state == JobState.SUCCEEDED and bool(job.output["adapter"])):
            yield f"job {identity} {job.state} and made {made[identity]} versions"


def every_upgrade_ends(session: Session, promised: Promises) -> Iterator[str]:
    """A campaign that was started is finished, and all in it is final."""
    states = dict(session.exec(select(Campaign.id, Campaign.state)).all())
    for line in promised:
        if line["did"] == "upgrades" and (now := states.get(line["campaign"], "lost")) != CampaignState.FINISHED:
            yield f"upgrade {line['campaign']} was started, and is {now}"
    for item in session.exec(select(CampaignItem)).all():
        if states[item.campaign_id] == CampaignState.FINISHED and not State(item.state).final:
            yield f"upgrade {item.campaign_id} is finished, and its adapter {item.adapter_id} is {item.state}"


def the_same_training_makes_the_same_bytes(session: Session, _promised: Promises) -> Iterator[str]:
    """However often it was killed and resumed, and wherever."""
    query = select(Job.recipe_digest, StoredManifest.body).join(Version, col(Version.job_id) == Job.id)
    query = query.join(StoredManifest, col(StoredManifest.digest) == Version.digest).where(Job.kind == "finetune")
    made: dict[str, set[str]] = {}
    for recipe, body in session.exec(query):
        files = {file["path"]: file["digest"] for file in json.loads(body)["files"]}
        made.setdefault(recipe, set()).add(files["adapter_model.safetensors"])
    for recipe, weights in made.items():
        if len(weights) > 1:
            yield f"the training {recipe} made {', '.join(sorted(weights))}"


def no_lease_is_old(session: Session, _promised: Promises) -> Iterator[str]:
    """Nobody owns anything for ever."""
    verifying = select(Push.id, Push.lease_until).where(Push.state == PushState.VERIFYING)
    late = time.time() - PATIENCE_S - WORKSHOP_LEASE_S
    for kind, leases in (("job", select(Job.id, Job.lease_until)), ("push", verifying)):
        for identity, until in session.exec(leases).all():
            if until is not None and until.timestamp() < late:
                yield f"{kind} {identity} is still leased until {until}"


def the_audit_is_whole(session: Session, _promised: Promises) -> Iterator[str]:
    """No link of the chain is broken, and every move of an alias left its row."""
    head = session.exec(select(AuditHead)).one()
    rows = session.exec(select(AuditRow).where(col(AuditRow.seq).is_not(None)).order_by(col(AuditRow.seq))).all()
    links = [Linked(row.seq or 0, row.link or "", audit.entry(row)) for row in rows]
    for broken in breaks(links, Head(head.seq, head.link)):
        yield f"the audit: {broken}"
    told = session.exec(select(func.count()).select_from(AuditRow).where(AuditRow.event == "alias.moved")).one()
    moved = session.exec(select(func.count()).select_from(AliasMove)).one()
    if told != moved:
        yield f"aliases moved {moved} times, and the audit has {told} rows of it"


LAWS: tuple[Callable[[Session, Promises], Iterator[str]], ...] = (
    no_one_saw_what_should_not_be, what_was_committed_is_there, what_was_deleted_stays_so, numbers_are_given_once,
    aliases_stand_where_they_were_put, work_is_done_once, every_upgrade_ends,
    the_same_training_makes_the_same_bytes, no_lease_is_old, the_audit_is_whole,
)  # fmt: skip


def _blobs_are_there(session: Session, parts: Parts) -> list[str]:
    """Every blob that something names has a row and bytes of its size."""
    gone = select(Version.digest).where(Version.status == VersionState.DELETED)
    kept = select(Version.digest).where(Version.status != VersionState.DELETED)
    of_kept = or_(col(ManifestBlob.manifest).in_(kept), col(ManifestBlob.manifest).not_in(gone))
    named = set(session.exec(select(ManifestBlob.blob).where(of_kept)))
    sizes = dict(session.exec(select(Blob.digest, Blob.size)).all())
    here = {stat.key: stat.size for stat in parts.store.walk("blobs/")}
    found = [f"blob {digest} is named and has no row" for digest in named - sizes.keys()]
    found += [
        f"blob {digest} of {sizes[digest]} bytes has {here.get(blob_key(digest))} in the store"
        for digest in named & sizes.keys()
        if here.get(blob_key(digest)) != sizes[digest]
    ]
    lost = select(Version.digest).where(col(Version.digest).not_in(select(StoredManifest.digest)))
    return found + [f"version {digest} has no manifest" for digest in session.exec(lost)]


def _nothing_is_left(session: Session, parts: Parts) -> list[str]:
    """What ended pushes left in staging goes; only what belongs to one that lives, or to none, may wait."""
    ended = (PushState.COMMITTED, PushState.REJECTED, PushState.EXPIRED, PushState.ABORTED)
    over = set(session.exec(select(Push.id).where(col(Push.state).in_(ended))))
    pushes.sweep(parts.database, parts.store, parts.clock(), gc.GRACE)
    return [f"{s.key} was left" for s in parts.store.walk("staging/") if s.key.split("/")[1] in over]


def _pulls(town: Town, promised: Promises, seen: set[str]) -> list[str]:
    """Every version that somebody was told of comes, byte by byte; once in its life is enough."""
    found = []
    digests = {line["digest"] for line in promised if line["did"] == "pushed"} - seen
    with RegistryClient(town.place.url, town.place.token) as client:
        for digest in sorted(digests):
            out = town.place.folder / "pulled" / digest.removeprefix("sha256:")
            shutil.rmtree(out, ignore_errors=True)  # what is there would not be asked for
            try:
                pull(client, digest, out)
            except Exception as error:  # noqa: BLE001  # whatever it is, it is a breach
                found.append(f"{digest} cannot be pulled: {type(error).__name__}: {error}")
            else:
                seen.add(digest)
    return found


def _nothing_is_half_written(folder: Path, promised: Promises) -> list[str]:
    """A file that has its name in a reader's folder has all of its bytes: those of the same version elsewhere."""
    right = {
        hashlib.sha256(file.read_bytes()).hexdigest()
        for file in (folder / "pulled").rglob("*")
        if file.is_file() and PARTIAL not in file.parts
    }
    known = {line["digest"].removeprefix("sha256:")[:16] for line in promised if line["did"] == "pushed"}
    return [
        f"{file} is not what was pushed"
        for home in (folder / "homes").glob("*/*-*")
        if home.name.partition("-")[0] in known
        for file in home.rglob("*")
        if file.is_file() and PARTIAL not in file.parts and hashlib.sha256(file.read_bytes()).hexdigest() not in right
    ]
