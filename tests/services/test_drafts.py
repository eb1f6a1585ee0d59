"""Laws of a draft: large files that are new for certain are sent before their digests are known, and none is lost."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from sqlmodel import select

from registry import files
from registry.core.digest import Digest
from registry.core.errors import (
    BadManifest,
    BlobsMissing,
    DigestMismatch,
    DraftTaken,
    NotSealed,
    PushExpired,
    QuotaExceeded,
    UploadNotFound,
)
from registry.daemons import gc
from registry.db.models import AuditRow, Base, Blob, Push, PushBlob
from registry.files import Sketch, sketch_base
from registry.schemas import BlobState, PartsInfo, PartsRequest, PartWanted, PushInfo, PushRequest, QuotaRequest, Wishes
from registry.services import blobs, pushes, quotas
from registry.services.tokens import Caller
from tests.daemons.test_gc import parts_of
from tests.factories import base_of, tiny_base, write_json, write_safetensors
from tests.world import ADMIN, World, adapter_push, base_push, caller, put, table_of

PART = 5 << 20  # S3 takes no smaller part but the last
WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def _small_files_are_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_LATE_FROM", 1000)


@pytest.fixture
def here(world: World) -> World:
    """A registry that takes in parts what is over a megabyte."""
    return world.with_settings(multipart_from=1 << 20, part_size=PART)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Weights in two parts, the second a short one."""
    return tiny_base(tmp_path / "base", width=64, vocabulary=24_000)


def draft(folder: Path, **wishes: Any) -> tuple[PushRequest, Sketch]:
    model = base_of(folder)
    sketch = sketch_base(folder, model.digest)
    assert sketch is not None
    manifest = sketch.draft.model_dump(mode="json", by_alias=True)
    return PushRequest(manifest=manifest, wishes=Wishes(**wishes), table=table_of(model)), sketch


def digests(sketch: Sketch) -> dict[str, str]:
    return {late.path: str(Digest.sha256(sketch.files[late.path].read_bytes())) for late in sketch.draft.late}


def pieces(data: bytes) -> list[bytes]:
    return [data[start : start + PART] for start in range(0, len(data), PART)]


def ask(world: World, info: PushInfo, blob: BlobState, data: bytes, who: Caller = ADMIN) -> PartsInfo:
    wanted = [PartWanted(number=n, sha256=str(Digest.sha256(part))) for n, part in enumerate(pieces(data), 1)]
    request = PartsRequest(digest=blob.digest, parts=wanted)
    return pushes.parts(world.database, world.store, world.settings, who, info.id, request, world.now)


def send(world: World, info: PushInfo, sketch: Sketch, who: Caller = ADMIN) -> int:
    """Send what the draft may send at once; how many parts went."""
    sent = 0
    for blob in info.blobs:
        if blob.path:
            data = sketch.files[blob.path].read_bytes()
            for number, signed in ask(world, info, blob, data, who).put.items():
                while (answer := put(signed, pieces(data)[number - 1])).status_code == 503:
                    pass  # somebody else sends this part just now
                answer.raise_for_status()
                sent += 1
    return sent


def seal(world: World, info: PushInfo, told: dict[str, str], who: Caller = ADMIN) -> PushInfo:
    with world.database.write() as session:
        push = pushes.seal(session, who, world.settings, info.id, told, world.now)
    with world.database.read() as session:
        return pushes.describe(session, world.store, world.settings, push, world.now)


def finish(world: World, info: PushInfo, sketch: Sketch, who: Caller = ADMIN) -> PushInfo:
    """Send what is needed after the seal, and commit."""
    by_digest = {str(Digest.sha256(path.read_bytes())): path.read_bytes() for path in sketch.files.values()}
    world.send(info, by_digest)
    for blob in info.blobs:
        if blob.state == "needed" and blob.part_size:
            for number, signed in ask(world, info, blob, by_digest[blob.digest], who).put.items():
                put(signed, pieces(by_digest[blob.digest])[number - 1]).raise_for_status()
    world.commit(info.id, who)
    return world.describe(info.id, who)


def push_whole(world: World, folder: Path) -> None:
    """As a client of before drafts would, without parts."""
    world.with_settings(multipart_from=1 << 30).push_base(folder)


def early(info: PushInfo) -> list[str]:
    return [blob.path for blob in info.blobs if blob.path]


# ── the way ──────────────────────────────────────────────────────────────────


def test_a_draft_that_was_sent_and_sealed_is_a_push_like_any_other(here: World, base: Path) -> None:
    request, sketch = draft(base, line="demo")
    info = here.open("base", None, request)
    assert (info.sealed, early(info)) == (False, [WEIGHTS])
    assert send(here, info, sketch) == 2
    sealed = seal(here, info, digests(sketch))
    assert (sealed.id, sealed.sealed, early(sealed)) == (info.id, True, [])
    assert {blob.state for blob in sealed.blobs if blob.part_size} == {"arrived"}
    done = finish(here, sealed, sketch)
    assert done.state == "committed"
    scan = files.scan_folder("base", base, base=base_of(base).digest)
    assert done.version_digest == sealed.version_digest == str(scan.manifest.digest)
    assert here.one(select(Base)).weights == "full"
    for path in base.iterdir():
        with here.store.open(blobs.blob_key(str(Digest.sha256(path.read_bytes())))) as reader:
            assert b"".join(reader.chunks()) == path.read_bytes()
    assert list(here.store.walk(f"staging/{info.id}/")) == []


def test_of_two_that_send_one_push_the_second_is_told_that_all_is_there(here: World, base: Path) -> None:
    request, sketch = draft(base)
    info = here.open("base", None, request)
    send(here, info, sketch)
    finish(here, seal(here, info, digests(sketch)), sketch)
    assert here.describe(info.id).state == "committed"
    [blob] = [blob for blob in info.blobs if blob.part_size]
    assert ask(here, info, blob, sketch.files[WEIGHTS].read_bytes()).put == {}
    assert seal(here, info, digests(sketch)).state == "committed"


def test_a_large_base_is_committed_by_the_checksums_of_its_parts(here: World, base: Path) -> None:
    request, sketch = draft(base)
    info = here.open("base", None, request)
    send(here, info, sketch)
    sealed = seal(here, info, digests(sketch))
    here.send(sealed, {str(Digest.sha256(path.read_bytes())): path.read_bytes() for path in sketch.files.values()})
    here.ask(info.id)
    assert here.verify(read_first=0)
    assert here.describe(info.id).state == "committed"
    assert here.one(select(Base)).weights == "parts"


def test_nothing_is_committed_before_the_seal(here: World, base: Path) -> None:
    request, sketch = draft(base)
    info = here.open("base", None, request)
    send(here, info, sketch)
    with pytest.raises(NotSealed):
        here.ask(info.id)
    assert not here.verify()
    assert here.all(select(Blob)) == []


def test_what_did_not_arrive_before_the_seal_is_sent_after_it(here: World, base: Path) -> None:
    request, sketch = draft(base)
    info = here.open("base", None, request)
    [blob] = [blob for blob in info.blobs if blob.path]
    data = (base / WEIGHTS).read_bytes()
    put(ask(here, info, blob, data).put[1], pieces(data)[0]).raise_for_status()
    sealed = seal(here, info, digests(sketch))
    with pytest.raises(BlobsMissing):
        here.ask(info.id)
    [needed] = [blob for blob in sealed.blobs if blob.part_size]
    assert list(ask(here, sealed, needed, data).put) == [2]
    assert finish(here, sealed, sketch).state == "committed"


# ── what is sent at once ─────────────────────────────────────────────────────


def test_a_base_that_is_here_is_committed_when_its_draft_is_opened(here: World, base: Path) -> None:
    request, sketch = draft(base)
    info = here.open("base", None, request)
    send(here, info, sketch)
    finish(here, seal(here, info, digests(sketch)), sketch)
    again = here.open("base", None, draft(base, line="demo")[0])
    assert again.state == "committed"
    assert again.outcome is not None
    assert again.outcome["ref"] == "demo@r1"


def test_a_base_that_is_here_and_not_read_yet_is_not_sent_again(here: World, base: Path) -> None:
    small = here.with_settings(multipart_from=1 << 30)
    request, contents = base_push(base)
    info = small.open("base", None, request)
    small.send(info, contents)
    small.ask(info.id)
    assert small.verify(read_first=0)
    again, sketch = draft(base)
    opened = here.open("base", None, again)
    assert (opened.sealed, early(opened)) == (False, [])
    sealed = seal(here, opened, digests(sketch))
    assert (sealed.id, sealed.state) == (info.id, "committed")
    assert seal(here, opened, digests(sketch)).id == info.id


def test_weights_under_another_config_are_hashed_first_and_found(here: World, tmp_path: Path, base: Path) -> None:
    push_whole(here, base)
    other = tmp_path / "other"
    other.mkdir()
    (other / WEIGHTS).write_bytes((base / WEIGHTS).read_bytes())
    write_json(other / "config.json", json.loads((base / "config.json").read_text()) | {"rms_norm_eps": 0.01})
    request, sketch = draft(other)
    info = here.open("base", None, request)
    assert early(info) == []
    sealed = seal(here, info, digests(sketch))
    assert {blob.state for blob in sealed.blobs if blob.size > 1 << 20} == {"present"}
    assert finish(here, sealed, sketch).state == "committed"


def test_of_shards_with_the_sizes_of_others_those_are_sent_that_hold_another_tensor(
    here: World, tmp_path: Path
) -> None:
    one = tiny_base(tmp_path / "one", width=512, shards=2)
    two = tiny_base(tmp_path / "two", width=512, shards=2)
    names = sorted(path.name for path in two.glob("*.safetensors") if path.stat().st_size > 1 << 20)
    tensors = load_file(two / names[0])
    largest = max(tensors, key=lambda name: tensors[name].size)
    write_safetensors(two / names[0], tensors | {largest: tensors[largest] * 2}, {"format": "pt"})
    assert len(names) == 2
    assert [(one / name).stat().st_size for name in names] == [(two / name).stat().st_size for name in names]
    push_whole(here, one)
    info = here.open("base", None, draft(two)[0])
    assert early(info) == names[:1]


def test_who_may_not_read_a_base_learns_nothing_of_its_files(here: World, tmp_path: Path, base: Path) -> None:
    push_whole(here, base)
    other = tmp_path / "other"
    other.mkdir()
    (other / WEIGHTS).write_bytes((base / WEIGHTS).read_bytes())
    write_json(other / "config.json", json.loads((base / "config.json").read_text()) | {"rms_norm_eps": 0.01})
    stranger = caller("stranger", base=["publish"])
    request, sketch = draft(other)
    info = here.open("base", None, request, stranger)
    assert early(info) == [WEIGHTS]
    sealed = seal(here, info, digests(sketch), stranger)
    assert {blob.state for blob in sealed.blobs} == {"needed"}


def test_small_files_are_not_sent_before_they_are_hashed(embedded: World, base: Path) -> None:
    info = embedded.open("base", None, draft(base)[0])
    assert (info.sealed, early(info)) == (False, [])


def test_only_bases_may_be_opened_as_drafts(embedded: World, base: Path) -> None:
    request, _ = draft(base)
    with pytest.raises(BadManifest, match="lacks its digest"):
        embedded.open("dataset", "team/rows", request.model_copy(update={
            "manifest": {"kind": "dataset", "files": [{"path": "data.jsonl", "size": 1}]}
        }))  # fmt: skip


# ── the seal ─────────────────────────────────────────────────────────────────


def test_a_seal_sent_twice_is_one(here: World, base: Path) -> None:
    request, sketch = draft(base)
    info = here.open("base", None, request)
    send(here, info, sketch)
    once, again = (seal(here, info, digests(sketch)) for _ in range(2))
    assert [(b.digest, b.state) for b in once.blobs] == [(b.digest, b.state) for b in again.blobs]
    assert once.version_digest == again.version_digest
    [told] = here.all(select(AuditRow).where(AuditRow.event == "push.sealed"))
    assert (told.subject, told.actor) == (info.id, ADMIN.token_id)
    assert finish(here, again, sketch).state == "committed"
    assert seal(here, info, digests(sketch)).outcome == here.describe(info.id).outcome


def test_a_seal_with_another_digest_than_before_is_refused(here: World, base: Path) -> None:
    request, sketch = draft(base)
    info = here.open("base", None, request)
    seal(here, info, digests(sketch))
    with pytest.raises(DraftTaken) as refused:
        seal(here, info, {WEIGHTS: str(Digest.sha256(b"other bytes"))})
    assert refused.value.path == WEIGHTS
    assert here.describe(info.id).sealed


@pytest.mark.parametrize(
    ("told", "word"),
    [((), "has no digest"), ((WEIGHTS, "config.json"), "config.json"), (("other",), "digest")],
)
def test_a_seal_of_other_files_than_the_draft_left_open_is_refused(
    embedded: World, base: Path, told: tuple[str, ...], word: str
) -> None:
    request, sketch = draft(base)
    info = embedded.open("base", None, request)
    with pytest.raises(BadManifest, match=word):
        seal(embedded, info, {path: digests(sketch)[WEIGHTS] for path in told})
    assert not embedded.describe(info.id).sealed


def test_a_push_that_was_opened_with_all_digests_has_no_seal(embedded: World, base: Path) -> None:
    info = embedded.open("base", None, base_push(base)[0])
    with pytest.raises(BadManifest, match="all digests"):
        seal(embedded, info, {WEIGHTS: str(Digest.sha256(b""))})


def test_a_digest_that_is_not_that_of_what_was_sent_is_rejected(here: World, base: Path) -> None:
    request, sketch = draft(base)
    info = here.open("base", None, request)
    send(here, info, sketch)
    sealed = seal(here, info, {WEIGHTS: str(Digest.sha256(b"other bytes"))})
    here.send(sealed, {str(Digest.sha256(path.read_bytes())): path.read_bytes() for path in sketch.files.values()})
    here.ask(info.id)
    assert here.verify()
    with pytest.raises(DigestMismatch):
        here.ask(info.id)
    assert here.all(select(Blob)) == []
    assert list(here.store.walk(f"staging/{info.id}/")) == []


def test_a_size_that_is_not_that_of_what_is_sent_takes_no_bytes(here: World, base: Path) -> None:
    request, sketch = draft(base)
    manifest = json.loads(json.dumps(request.manifest))
    [late] = [entry for entry in manifest["files"] if entry["path"] == WEIGHTS]
    late["size"] += 1
    info = here.open("base", None, request.model_copy(update={"manifest": manifest}))
    [blob] = [blob for blob in info.blobs if blob.path]
    data = (base / WEIGHTS).read_bytes()
    signed = ask(here, info, blob, data).put
    put(signed[1], pieces(data)[0]).raise_for_status()
    assert put(signed[2], pieces(data)[1] + b"x").status_code >= 400
    seal(here, info, digests(sketch))
    with pytest.raises(BlobsMissing):
        here.ask(info.id)


def test_two_late_files_with_the_same_bytes_are_one_blob_and_the_other_upload_is_swept(
    here: World, base: Path
) -> None:
    request, sketch = draft(base)
    manifest = json.loads(json.dumps(request.manifest))
    [late] = [entry for entry in manifest["files"] if entry["path"] == WEIGHTS]
    manifest["files"].append({**late, "path": "model2.safetensors"})
    info = here.open("base", None, request.model_copy(update={"manifest": manifest}))
    copied = Sketch(sketch.draft, {**sketch.files, "model2.safetensors": sketch.files[WEIGHTS]})
    assert send(here, info, copied) == 4
    rows = here.all(select(PushBlob).where(PushBlob.upload_id.is_not(None)))  # type: ignore[union-attr]
    sealed = seal(here, info, dict.fromkeys([WEIGHTS, "model2.safetensors"], digests(sketch)[WEIGHTS]))
    assert [blob.state for blob in sealed.blobs if blob.part_size] == ["arrived"]
    here.later(hours=2)
    gc.step(parts_of(here))
    [kept] = here.all(select(PushBlob).where(PushBlob.upload_id.is_not(None)))  # type: ignore[union-attr]
    for row in rows:
        if row.upload_id == kept.upload_id:
            assert len(here.store.list_parts(blobs.staged_at(row), row.upload_id)) == 2
        else:
            with pytest.raises(UploadNotFound):
                here.store.list_parts(blobs.staged_at(row), row.upload_id)


# ── killed, and at once ──────────────────────────────────────────────────────


def test_a_killed_client_resumes_its_draft_and_sends_no_part_twice(here: World, base: Path) -> None:
    request, sketch = draft(base)
    info = here.open("base", None, request)
    [blob] = [blob for blob in info.blobs if blob.path]
    data = (base / WEIGHTS).read_bytes()
    put(ask(here, info, blob, data).put[1], pieces(data)[0]).raise_for_status()
    again = here.open("base", None, request)
    assert again.id == info.id
    assert list(ask(here, again, blob, data).put) == [2]
    assert send(here, again, sketch) == 1
    seal(here, again, digests(sketch))
    after = here.open("base", None, request)  # killed before the commit
    assert (after.id, after.sealed) == (info.id, True)
    assert here.open("base", None, base_push(base)[0]).id == info.id  # with all digests it is the same push, too
    assert finish(here, after, sketch).state == "committed"


def test_another_file_under_the_same_name_is_refused_and_harms_nobody(here: World, base: Path) -> None:
    request, sketch = draft(base)
    info = here.open("base", None, request)
    [blob] = [blob for blob in info.blobs if blob.path]
    data = (base / WEIGHTS).read_bytes()
    put(ask(here, info, blob, data).put[1], pieces(data)[0]).raise_for_status()
    with pytest.raises(DraftTaken) as refused:
        ask(here, info, blob, data[::-1])
    assert refused.value.path == WEIGHTS
    assert send(here, info, sketch) == 1
    assert finish(here, seal(here, info, digests(sketch)), sketch).state == "committed"


def test_of_two_files_that_ask_for_one_name_at_once_one_is_refused(here: World, base: Path) -> None:
    info = here.open("base", None, draft(base)[0])
    [blob] = [blob for blob in info.blobs if blob.path]
    data = (base / WEIGHTS).read_bytes()
    signed, refused = list[PartsInfo](), list[DraftTaken]()

    def begin(mine: bytes) -> None:
        try:
            signed.append(ask(here, info, blob, mine))
        except DraftTaken as error:
            refused.append(error)

    threads = [threading.Thread(target=begin, args=(mine,)) for mine in (data, data[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(signed), len(refused)) == (1, 1)


def test_two_clients_at_once_make_one_base(here: World, base: Path) -> None:
    request, sketch = draft(base, line="demo")
    opened = [here.open("base", None, request) for _ in range(2)]
    assert opened[0].id == opened[1].id
    failed: list[BaseException] = []

    def work() -> None:
        try:
            send(here, opened[0], sketch)
            seal(here, opened[0], digests(sketch))
        except BaseException as error:  # noqa: BLE001  # told by the test
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in opened]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert finish(here, here.describe(opened[0].id), sketch).state == "committed"
    assert len(here.all(select(Push))) == 1


def test_who_still_sends_when_another_seals_goes_on_under_the_same_name(here: World, base: Path) -> None:
    request, sketch = draft(base)
    info = here.open("base", None, request)
    [blob] = [blob for blob in info.blobs if blob.path]
    data = (base / WEIGHTS).read_bytes()
    slow = ask(here, info, blob, data)
    put(slow.put[1], pieces(data)[0]).raise_for_status()
    seal(here, info, digests(sketch))
    assert list(ask(here, info, blob, data).put) == [2]
    put(slow.put[2], pieces(data)[1]).raise_for_status()
    assert finish(here, here.describe(info.id), sketch).state == "committed"


def test_two_tokens_push_the_same_draft_and_make_one_base(here: World, base: Path) -> None:
    other = caller("other", **{"*": ["read", "publish"]})
    request, sketch = draft(base, line="demo")
    mine, theirs = here.open("base", None, request), here.open("base", None, request, other)
    assert mine.id != theirs.id
    send(here, mine, sketch)
    send(here, theirs, sketch, other)
    assert finish(here, seal(here, mine, digests(sketch)), sketch).state == "committed"
    late = seal(here, theirs, digests(sketch), other)
    assert (late.id, late.state) == (mine.id, "committed")
    here.later(hours=25)
    gc.step(parts_of(here))
    assert list(here.store.walk("staging/")) == []


# ── the ends ─────────────────────────────────────────────────────────────────


def test_a_draft_that_expired_cannot_be_sealed_and_leaves_nothing(here: World, base: Path) -> None:
    request, sketch = draft(base)
    info = here.open("base", None, request)
    send(here, info, sketch)
    [row] = here.all(select(PushBlob).where(PushBlob.path == WEIGHTS))
    here.later(hours=25)
    with pytest.raises(PushExpired):
        seal(here, info, digests(sketch))
    assert gc.step(parts_of(here))
    with pytest.raises(UploadNotFound):
        here.store.list_parts(blobs.staged_at(row), row.upload_id)
    assert here.open("base", None, request).id != info.id


def test_an_aborted_push_that_was_sealed_loses_its_upload_at_once(here: World, base: Path) -> None:
    request, sketch = draft(base)
    info = here.open("base", None, request)
    send(here, info, sketch)
    seal(here, info, digests(sketch))
    [row] = here.all(select(PushBlob).where(PushBlob.path == WEIGHTS))
    with here.database.write() as session:
        pushes.abort(session, ADMIN, info.id, here.now)
    assert gc.step(parts_of(here))
    with pytest.raises(UploadNotFound):
        here.store.list_parts(blobs.staged_at(row), row.upload_id)


def test_a_living_draft_is_left_alone_by_the_garbage_collector(here: World, base: Path) -> None:
    request, sketch = draft(base)
    info = here.open("base", None, request)
    send(here, info, sketch)
    here.later(hours=3)
    gc.step(parts_of(here))
    assert send(here, info, sketch) == 0
    assert finish(here, seal(here, info, digests(sketch)), sketch).state == "committed"


def test_an_adapter_is_pushed_beside_a_draft_as_ever(embedded: World, tmp_path: Path, base: Path) -> None:
    from tests.factories import tiny_adapter

    embedded.open("base", None, draft(base)[0])
    embedded.push_base(base)
    request, contents = adapter_push(tiny_adapter(tmp_path / "adapter", base), base)
    assert embedded.push("adapter", "team/bot", request, contents)["ref"] == "team/bot@v1"


def test_what_a_draft_did_not_tell_at_first_counts_when_it_is_sealed(world: World, base: Path) -> None:
    with world.database.write() as session:
        quotas.put(session, ADMIN, "base", QuotaRequest(quota_bytes=10_000, keep_days=None), world.now)
    request, sketch = draft(base)
    info = world.open("base", None, request)
    with pytest.raises(QuotaExceeded):
        seal(world, info, digests(sketch))
    assert not world.describe(info.id).sealed
