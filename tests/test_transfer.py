"""Push and pull against a real registry: they are inverse, resume after any kill, and move no byte twice."""

import datetime as dt
import hashlib
import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from registry import transfer
from registry.client import RegistryClient
from registry.core.errors import (
    BadDataset,
    BadPath,
    BlobNotFound,
    BlobsMissing,
    DigestMismatch,
    DiskFull,
    LoractlError,
    NonFinite,
    PathUnusable,
    RouteNotFound,
    SignatureRefused,
    StorageDown,
)
from registry.core.manifest import Manifest
from registry.files import HashCache, scan_folder, sha256_file
from registry.schemas import BaseRegistration, Download, PushInfo, SealRequest, SignedRequest, Wishes
from registry.services import pushes
from tests import live
from tests.factories import base_of, tiny_adapter, tiny_base, write_safetensors


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[live.Live]:
    with live.registry(tmp_path_factory.mktemp("registry")) as found:
        yield found


@pytest.fixture
def client(registry: live.Live) -> Iterator[RegistryClient]:
    registry.seen.clear()
    with registry.client() as made:
        yield made


@pytest.fixture(scope="module")
def base(registry: live.Live, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model that the registry knows by its table."""
    folder = tiny_base(tmp_path_factory.mktemp("base"))
    with registry.client() as client:
        client.register_base(BaseRegistration(table=transfer.table_of(base_of(folder))))
    return folder


def rows(path: Path, size: int, seed: int) -> Path:
    """A dataset of about ``size`` bytes."""
    draw = random.Random(seed)
    lines = []
    while size > 0:
        lines.append(json.dumps({"prompt": f"{draw.getrandbits(256):x}", "completion": f"{draw.getrandbits(8000):x}"}))
        size -= len(lines[-1]) + 1
    path.write_text("\n".join(lines) + "\n")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ── laws ─────────────────────────────────────────────────────────────────────


def test_push_then_pull_is_the_identity(client: RegistryClient, base: Path, tmp_path: Path) -> None:
    adapter = tiny_adapter(tmp_path / "adapter", base)
    digest = str(base_of(base).digest)
    info = transfer.push_adapter(client, adapter, "team/identity", digest, Wishes(aliases=["prod"]))
    assert info.state == "committed"
    written = transfer.pull(client, info.version_digest, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(adapter)
    assert {path.name for path in written} == set(contents(adapter))


def test_a_base_in_many_parts_and_shards_comes_back_as_it_was(client: RegistryClient, tmp_path: Path) -> None:
    folder = tiny_base(tmp_path / "base", 7, width=128, vocabulary=8192, shards=3)
    assert max(path.stat().st_size for path in folder.glob("*.safetensors")) > 3 * live.PART
    info = transfer.push_base(client, folder, Wishes(line="parts"))
    transfer.pull(client, info.version_digest, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(folder)
    assert base_of(tmp_path / "out").digest == base_of(folder).digest


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """A base whose weights come in nine parts, beside small files."""
    return tiny_base(tmp_path / "large", secrets.randbits(30), width=128, vocabulary=16_384)


def sent_of(registry: live.Live) -> int:
    """Bytes of the weights that were sent; a config of before may be there."""
    return sum(request.received for request in registry.puts() if request.received > 1000)


def sealed(registry: live.Live) -> list[int]:
    return [request.status for request in registry.seen if request.path.endswith("/seal")]


def test_a_new_base_is_sealed_after_its_parts_were_sent_and_each_byte_travels_once(
    registry: live.Live, client: RegistryClient, fresh: Path, tmp_path: Path
) -> None:
    info = transfer.push_base(client, fresh)
    assert sent_of(registry) == (fresh / "model.safetensors").stat().st_size
    last = max(at for at, request in enumerate(registry.seen) if request.received == live.PART)
    [seal] = [at for at, request in enumerate(registry.seen) if request.path.endswith("/seal")]
    assert last < seal
    transfer.pull(client, info.version_digest, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(fresh)


def test_a_base_that_is_there_is_one_request_and_its_files_are_not_read(
    registry: live.Live, client: RegistryClient, fresh: Path
) -> None:
    model = base_of(fresh)
    first = transfer.push_base(client, fresh, base=model)
    registry.seen.clear()
    weights = fresh / "model.safetensors"
    with weights.open("r+b") as file:  # what is in it now is never seen
        file.seek(-4, 2)
        file.write(b"else")
    again = transfer.push_base(client, fresh, base=model)
    assert [request.method for request in registry.seen] == ["POST"]
    assert (again.id, registry.sent()) == (first.id, 0)


def test_a_base_whose_digests_are_known_is_pushed_without_a_seal(
    registry: live.Live, client: RegistryClient, fresh: Path, tmp_path: Path
) -> None:
    for path in fresh.iterdir():
        os.utime(path, (1e9, 1e9))
    cache = HashCache(tmp_path / "cache")
    scan_folder("base", fresh, base=base_of(fresh).digest, cache=cache)
    assert transfer.push_base(client, fresh, cache=cache).state == "committed"
    assert sealed(registry) == []


def test_digests_that_were_taken_while_sending_are_remembered(
    registry: live.Live, client: RegistryClient, fresh: Path, tmp_path: Path
) -> None:
    for path in fresh.iterdir():
        os.utime(path, (1e9, 1e9))
    cache = HashCache(tmp_path / "cache")
    transfer.push_base(client, fresh, cache=cache)
    assert sealed(registry) == [200]
    weights = fresh / "model.safetensors"
    assert cache.get(weights, "sha256") == str(sha256_file(weights))


def test_a_registry_that_does_not_know_drafts_is_told_all_digests_first(
    registry: live.Live, client: RegistryClient, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pushes, "parse_listing", Manifest.parse)  # as it was
    assert transfer.push_base(client, fresh).state == "committed"
    assert sealed(registry) == []
    assert sent_of(registry) == (fresh / "model.safetensors").stat().st_size


def test_a_registry_of_which_one_process_knows_no_seal_gets_its_base(
    registry: live.Live, client: RegistryClient, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(push_id: str, request: SealRequest) -> PushInfo:
        raise RouteNotFound(method="POST", path=f"/v1/pushes/{push_id}/seal ({len(request.digests)} digests)")

    monkeypatch.setattr(client, "seal", unknown)
    assert transfer.push_base(client, fresh).state == "committed"


def test_other_files_under_the_same_draft_are_pushed_with_all_digests(
    registry: live.Live, client: RegistryClient, fresh: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(fresh, other)
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b'"pt"', b'"tp"'))  # the same tensors in another file
    assert base_of(other).digest == base_of(fresh).digest

    def killed(what: str, done: int, total: int) -> None:
        if what == "sending" and done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transfer.push_base(client, fresh, progress=killed)
    info = transfer.push_base(client, other)
    assert info.state == "committed"
    assert sealed(registry) == []
    transfer.pull(client, info.version_digest, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(other)


def test_pushing_the_same_adapter_again_is_one_request_and_no_bytes(
    registry: live.Live, client: RegistryClient, base: Path, tmp_path: Path
) -> None:
    adapter = tiny_adapter(tmp_path / "adapter", base, seed=3)
    digest = str(base_of(base).digest)
    first = transfer.push_adapter(client, adapter, "team/again", digest)
    assert registry.sent() > 0
    registry.seen.clear()
    again = transfer.push_adapter(client, adapter, "team/again", digest, Wishes(message="another message"))
    assert [request.method for request in registry.seen] == ["POST"]
    assert registry.sent() == 0
    assert again.version_digest == first.version_digest


def test_what_the_registry_has_and_the_caller_may_read_is_not_sent(
    registry: live.Live, client: RegistryClient, base: Path, tmp_path: Path
) -> None:
    adapter = tiny_adapter(tmp_path / "adapter", base, seed=4)
    digest = str(base_of(base).digest)
    transfer.push_adapter(client, adapter, "team/one", digest)
    registry.seen.clear()
    (adapter / "README.md").write_text("now with words\n")
    transfer.push_adapter(client, adapter, "team/two", digest)
    assert [request.received for request in registry.puts()] == [len("now with words\n")]


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.integers(1, 6 * live.PART)
    | st.sampled_from([live.PART, 2 * live.PART, 2 * live.PART + 1, 3 * live.PART - 1, 3 * live.PART]),
    threads=st.integers(1, 8),
)
def test_any_size_with_any_number_of_threads_arrives(
    registry: live.Live, tmp_path_factory: pytest.TempPathFactory, size: int, threads: int
) -> None:
    folder = tmp_path_factory.mktemp("data")
    row = json.dumps({"prompt": "a", "completion": "b"})
    blank = (" " * 999 + "\n") * (size // 1000 + 1)
    (folder / "data.jsonl").write_text(row + "\n" + blank[: max(0, size - len(row) - 1)])
    scan = transfer.scanned("dataset", folder / "data.jsonl")
    with registry.client() as client:
        info = transfer.push(client, "dataset", "team/sizes", scan, threads=threads)
        transfer.pull(client, info.version_digest, folder / "out", threads=threads)
    assert (folder / "out" / "data.jsonl").read_bytes() == (folder / "data.jsonl").read_bytes()


# ── refusals of a push ───────────────────────────────────────────────────────


def test_what_the_verifier_found_is_raised_as_itself(client: RegistryClient, base: Path, tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import load_file

    adapter = tiny_adapter(tmp_path / "adapter", base, seed=5)
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = min(tensors)
    tensors[name] = np.full_like(tensors[name], np.nan)
    write_safetensors(adapter / "adapter_model.safetensors", tensors, {"format": "pt"})
    with pytest.raises(NonFinite) as caught:
        transfer.push_adapter(client, adapter, "team/nan", str(base_of(base).digest))
    assert caught.value.tensor == name


def test_equal_weights_with_another_template_say_that_the_first_files_are_kept(
    client: RegistryClient, tmp_path: Path
) -> None:
    one, two = (tiny_base(tmp_path / name, 77) for name in ("one", "two"))
    (one / "chat_template.jinja").write_text("{{ messages }}")
    (two / "chat_template.jinja").write_text("{{ messages[0] }}")
    first = transfer.push_base(client, one)
    assert (first.outcome or {})["warnings"] == []
    again = transfer.push_base(client, two)
    [warning] = (again.outcome or {})["warnings"]
    assert "this chat template was not taken" in warning
    assert "an adapter may bring its own" in warning
    assert again.version_digest == first.version_digest
    assert (transfer.push_base(client, one).outcome or {})["warnings"] == []
    transfer.pull(client, again.version_digest, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(one)


@pytest.mark.parametrize(
    ("text", "code", "told"),
    [
        ('{"prompt": "a", "completion": "b"}\n{"prompt": 1}\n', "bad-dataset", "'sums.jsonl', line 2: expected"),
        ("\n", "unusable-dataset", "'sums.jsonl': there are no rows"),
    ],
)
def test_a_refusal_of_rows_names_the_file_as_it_is_called_here(
    client: RegistryClient, tmp_path: Path, text: str, code: str, told: str
) -> None:
    (tmp_path / "sums.jsonl").write_text(text)
    with pytest.raises(LoractlError, match=told) as refused:
        transfer.push_dataset(client, "dataset", tmp_path / "sums.jsonl", "team/sums")
    assert refused.value.code == code


def test_an_item_that_is_twice_in_a_suite_is_named_by_its_file(client: RegistryClient, tmp_path: Path) -> None:
    (tmp_path / "sums.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    with pytest.raises(BadDataset, match=r"'sums\.jsonl', line 2: it is the same item as sums\.jsonl, line 1"):
        transfer.push_dataset(client, "suite", tmp_path / "sums.jsonl", "team/sums")


def test_a_file_that_changes_while_it_is_sent_is_refused_and_never_committed(
    client: RegistryClient, tmp_path: Path
) -> None:
    file = rows(tmp_path / "data.jsonl", 3 * live.PART, seed=1)
    scan = transfer.scanned("dataset", file)
    file.write_text(file.read_text().replace("a", "b"))
    info = client.open_push("dataset", "team/changing", transfer.request_of(scan))
    transfer.upload(client, info, {scan.manifest.files[0].digest: file})  # every part is what it says
    with pytest.raises(LoractlError):  # and the whole is not what was promised
        transfer.settle(client, info.id)
    assert client.push(info.id).state == "rejected"


def test_a_file_that_shrinks_while_it_is_sent_is_refused(client: RegistryClient, tmp_path: Path) -> None:
    file = rows(tmp_path / "data.jsonl", 3 * live.PART, seed=2)
    scan = transfer.scanned("dataset", file)
    file.write_bytes(file.read_bytes()[:100])
    info = client.open_push("dataset", "team/shrinking", transfer.request_of(scan))
    with pytest.raises(PathUnusable, match="shorter"):
        transfer.upload(client, info, {scan.manifest.files[0].digest: file})


def test_what_has_not_arrived_cannot_be_committed(client: RegistryClient, tmp_path: Path) -> None:
    scan = transfer.scanned("dataset", rows(tmp_path / "data.jsonl", 1000, seed=3))
    info = client.open_push("dataset", "team/nothing-sent", transfer.request_of(scan))
    with pytest.raises(BlobsMissing):
        transfer.settle(client, info.id)


# ── resuming a push ──────────────────────────────────────────────────────────


def test_parts_that_arrived_are_not_sent_again(
    registry: live.Live, client: RegistryClient, tmp_path: Path
) -> None:
    file = rows(tmp_path / "data.jsonl", 12 * live.PART, seed=4)
    scan = transfer.scanned("dataset", file)
    info = client.open_push("dataset", "team/resumed", transfer.request_of(scan))
    seen = 0

    def stop_half_way(what: str, done: int, total: int) -> None:
        nonlocal seen
        seen = done
        if done > total // 2:
            raise KeyboardInterrupt

    paths = {scan.manifest.files[0].digest: file}
    with pytest.raises(KeyboardInterrupt):
        transfer.upload(client, info, paths, progress=stop_half_way, threads=2)
    arrived = [request for request in registry.puts() if request.status == 200]
    again = transfer.push(client, "dataset", "team/resumed", scan)
    assert again.id == info.id
    assert again.state == "committed"
    finished = [request.headers["x-amz-checksum-sha256"] for request in registry.puts() if request.status == 200]
    assert len(finished) == len(set(finished)) == -(-file.stat().st_size // live.PART)
    assert 0 < len(arrived) < len(finished)


PUSH = """
import sys
from pathlib import Path
from registry import transfer
from registry.client import RegistryClient

url, token, file, name = sys.argv[1:]
with RegistryClient(url, token) as client:
    print("start", flush=True)
    info = transfer.push_dataset(client, "dataset", Path(file), name, progress=lambda *now: print(*now, flush=True))
    print(info.version_digest, flush=True)
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""


def test_a_client_killed_at_random_bytes_resumes_and_sends_no_finished_part_twice(
    registry: live.Live, tmp_path: Path
) -> None:
    registry.seen.clear()
    file = rows(tmp_path / "data.jsonl", 16 * live.PART, seed=5)
    line = [sys.executable, "-c", PUSH, registry.url, registry.token, str(file), "team/killed"]
    draw = random.Random(6)
    for _ in range(3):
        with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            limit = draw.randrange(1, 12 * live.PART)
            for said in child.stdout:
                if said.startswith("sending") and int(said.split()[1]) > limit:
                    break
            child.kill()
    ended = subprocess.run(line, check=True, capture_output=True, text=True)
    finished = [request.headers["x-amz-checksum-sha256"] for request in registry.puts() if request.status == 200]
    assert len(finished) == len(set(finished)) == -(-file.stat().st_size // live.PART)
    with registry.client() as client:
        transfer.pull(client, ended.stdout.split()[-2], tmp_path / "out")
    assert (tmp_path / "out" / "data.jsonl").read_bytes() == file.read_bytes()


PUSH_BASE = PUSH.replace(
    'push_dataset(client, "dataset", Path(file), name, ', "push_base(client, Path(file), "
)


def test_a_client_killed_while_it_hashes_and_sends_resumes_and_sends_no_finished_part_twice(
    registry: live.Live, fresh: Path, tmp_path: Path
) -> None:
    registry.seen.clear()
    line = [sys.executable, "-c", PUSH_BASE, registry.url, registry.token, str(fresh), "-"]
    draw = random.Random(7)
    for _ in range(3):
        with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            limit = draw.randrange(1, 6 * live.PART)
            for said in child.stdout:
                if said.startswith("sending") and int(said.split()[1]) > limit:
                    break
            child.kill()
    ended = subprocess.run(line, check=True, capture_output=True, text=True)
    parts = [
        request.headers["x-amz-checksum-sha256"]
        for request in registry.puts()
        if request.status == 200 and request.received > 1000
    ]
    assert len(parts) == len(set(parts)) == -(-(fresh / "model.safetensors").stat().st_size // live.PART)
    assert sealed(registry) == [200]
    with registry.client() as client:
        transfer.pull(client, ended.stdout.split()[-2], tmp_path / "out")
    assert contents(tmp_path / "out") == contents(fresh)


def test_a_url_that_expired_is_asked_for_once_more(client: RegistryClient, tmp_path: Path) -> None:
    file = rows(tmp_path / "data.jsonl", 1000, seed=7)
    scan = transfer.scanned("dataset", file)
    info = client.open_push("dataset", "team/stale", transfer.request_of(scan))
    put = info.blobs[0].put
    assert put is not None
    put.url = put.url.replace("expires=", "expires=1")
    transfer.upload(client, info, {scan.manifest.files[0].digest: file})
    assert transfer.settle(client, info.id).state == "committed"


# ── pull ─────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def large(registry: live.Live, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    """A dataset of several ranges: its version digest and bytes."""
    file = rows(tmp_path_factory.mktemp("large") / "data.jsonl", 3 << 20, seed=8)
    with registry.client() as client:
        return transfer.push_dataset(client, "dataset", file, "team/large").version_digest, file.read_bytes()


@pytest.fixture
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "RANGE", 100_000)


def test_a_large_file_arrives_in_parallel_ranges(
    registry: live.Live, client: RegistryClient, large: tuple[str, bytes], small_ranges: None, tmp_path: Path
) -> None:
    transfer.pull(client, large[0], tmp_path)
    assert (tmp_path / "data.jsonl").read_bytes() == large[1]
    asked = [request.headers.get("range") for request in registry.seen if request.path.startswith("/store/")]
    assert len(asked) == len(set(asked)) == -(-len(large[1]) // 100_000)
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_files_that_are_there_are_not_fetched_and_others_are_replaced(
    registry: live.Live, client: RegistryClient, large: tuple[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "data.jsonl").write_bytes(large[1])
    assert transfer.pull(client, large[0], tmp_path) == []
    assert not [request for request in registry.seen if request.path.startswith("/store/")]
    (tmp_path / "data.jsonl").write_bytes(b"x" + large[1][1:])
    assert transfer.pull(client, large[0], tmp_path) == [tmp_path / "data.jsonl"]
    assert (tmp_path / "data.jsonl").read_bytes() == large[1]


def test_an_interrupted_pull_leaves_only_partial_files_and_goes_on_from_them(
    registry: live.Live, client: RegistryClient, large: tuple[str, bytes], small_ranges: None, tmp_path: Path
) -> None:
    def stop_half_way(what: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transfer.pull(client, large[0], tmp_path, progress=stop_half_way, threads=2)
    assert [path.name for path in tmp_path.iterdir()] == [transfer.PARTIAL]
    marks = next((tmp_path / transfer.PARTIAL).glob("*.done")).read_text().split()
    assert len(marks) > 5
    registry.seen.clear()
    transfer.pull(client, large[0], tmp_path)
    again = [request for request in registry.seen if request.path.startswith("/store/")]
    assert len(again) == -(-len(large[1]) // 100_000) - len(marks)
    assert (tmp_path / "data.jsonl").read_bytes() == large[1]


def killed_behind_the_first_file(monkeypatch: pytest.MonkeyPatch, pull: Callable[[], object]) -> None:
    """Pull until one file has its name."""
    place = transfer._Partial.place

    def last(file: transfer._Partial) -> None:
        place(file)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(transfer._Partial, "place", last)
        with pytest.raises(KeyboardInterrupt):
            pull()


def test_of_two_versions_no_folder_is_a_mixture(
    client: RegistryClient, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, digest = [], str(base_of(base).digest)
    for number, rank in enumerate((64, 32)):
        adapter = tiny_adapter(tmp_path / f"a{number}", base, rank=rank, seed=number)
        made.append((adapter, transfer.push_adapter(client, adapter, "team/mixed", digest).version_digest))
    out = tmp_path / "out"
    transfer.pull(client, made[0][1], out)
    before = contents(out)

    def stop_near_the_end(what: str, done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transfer.pull(client, made[1][1], out, progress=stop_near_the_end)
    assert {name: data for name, data in contents(out).items() if transfer.PARTIAL not in name} == before
    killed_behind_the_first_file(monkeypatch, lambda: transfer.pull(client, made[1][1], out))
    assert not (out / "adapter_config.json").exists()  # so nobody loads it
    transfer.pull(client, made[1][1], out)
    assert contents(out) == contents(made[1][0])


def test_nor_is_it_a_mixture_where_the_configuration_is_the_same(
    client: RegistryClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for seed in range(2):
        folder = tiny_base(tmp_path / f"b{seed}", seed=seed, shards=2)
        made.append((folder, transfer.push_base(client, folder).version_digest))
    out = tmp_path / "out"
    transfer.pull(client, made[0][1], out)
    killed_behind_the_first_file(monkeypatch, lambda: transfer.pull(client, made[1][1], out))
    assert not (out / "config.json").exists()
    transfer.pull(client, made[1][1], out)
    assert contents(out) == contents(made[1][0])


PULL = """
import sys
from pathlib import Path
from registry import transfer
from registry.client import RegistryClient

transfer.RANGE = 100_000
url, token, digest, out = sys.argv[1:]
with RegistryClient(url, token) as client:
    transfer.pull(client, digest, Path(out), progress=lambda *now: print(*now, flush=True))
"""


def test_a_pull_killed_at_random_bytes_never_shows_a_file_that_is_not_whole(
    registry: live.Live, large: tuple[str, bytes], tmp_path: Path
) -> None:
    line = [sys.executable, "-c", PULL, registry.url, registry.token, large[0], str(tmp_path)]
    draw = random.Random(9)
    for _ in range(3):
        with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            limit = draw.randrange(1, len(large[1]))
            for said in child.stdout:
                if int(said.split()[1]) > limit:
                    break
            child.kill()
        if (tmp_path / "data.jsonl").exists():
            assert (tmp_path / "data.jsonl").read_bytes() == large[1]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    assert contents(tmp_path) == {"data.jsonl": large[1]}


def test_bytes_that_are_not_what_was_promised_never_get_a_name(
    client: RegistryClient, large: tuple[str, bytes], tmp_path: Path
) -> None:
    [file] = client.downloads([large[0]]).files[large[0]]
    lie = file.model_copy(update={"digest": f"sha256:{hashlib.sha256(b'other').hexdigest()}"})
    with pytest.raises(DigestMismatch):
        transfer.fetch([lie], tmp_path, refresh=lambda: [lie])
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("path", ["../out", "/etc/x", "a/../../b", ".partial/x", "link/x"])
def test_nothing_is_written_outside_of_the_folder(
    client: RegistryClient, large: tuple[str, bytes], tmp_path: Path, path: str
) -> None:
    out, outside = tmp_path / "out", tmp_path / "outside"
    out.mkdir()
    outside.mkdir()
    (out / "link").symlink_to(outside)
    [file] = client.downloads([large[0]]).files[large[0]]
    aimed = file.model_copy(update={"path": path})
    with pytest.raises(BadPath):
        transfer.fetch([aimed], out, refresh=lambda: [aimed])
    assert contents(outside) == {}


def test_an_expired_get_is_renewed_once_for_all_ranges(
    registry: live.Live, client: RegistryClient, large: tuple[str, bytes], small_ranges: None, tmp_path: Path
) -> None:
    files = client.downloads([large[0]]).files[large[0]]
    stale = [file.model_copy(update={"get": _expired(file.get)}) for file in files]
    renewed = []

    def refresh() -> list[Download]:
        renewed.append(1)
        return files

    transfer.fetch(stale, tmp_path, refresh=refresh)
    assert renewed == [1]
    assert (tmp_path / "data.jsonl").read_bytes() == large[1]


def test_a_get_that_stays_refused_is_a_refusal(
    client: RegistryClient, large: tuple[str, bytes], tmp_path: Path
) -> None:
    stale = [
        file.model_copy(update={"get": _expired(file.get)}) for file in client.downloads([large[0]]).files[large[0]]
    ]
    with pytest.raises(SignatureRefused):
        transfer.fetch(stale, tmp_path, refresh=lambda: stale)


def _store_that_answers(*answers: bytes) -> tuple[str, list[str]]:
    """A server that gives one raw answer per connection and hangs up: its URL, and the ranges it is asked for."""
    listening = socket.create_server(("127.0.0.1", 0))
    asked: list[str] = []

    def serve() -> None:
        with listening:
            for answer in answers:
                connection, _ = listening.accept()
                with connection:
                    head = connection.recv(65536).decode().lower()
                    asked.append(head.partition("range: bytes=")[2].partition("\r\n")[0])
                    connection.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{listening.getsockname()[1]}/blob", asked


def _promised(url: str, content: bytes) -> Download:
    signed = SignedRequest(method="GET", url=url, expires_at=dt.datetime.now(dt.UTC))
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    return Download(path="data.bin", size=len(content), digest=digest, get=signed)


def test_a_body_that_was_cut_off_is_taken_up_where_it_broke(tmp_path: Path) -> None:
    url, asked = _store_that_answers(
        b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n0123",
        b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 206 Partial Content\r\ncontent-length: 6\r\n\r\n456789",
    )
    file = _promised(url, b"0123456789")
    transfer.fetch([file], tmp_path, refresh=lambda: [file])
    assert contents(tmp_path) == {"data.bin": b"0123456789"}
    assert asked == ["", "4-9", "4-9"]


@pytest.mark.parametrize("status", ["200 OK", "302 Found"])
def test_what_is_no_answer_to_the_range_is_not_taken(
    status: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(transfer, "RANGE", 5)
    monkeypatch.setattr(transfer, "TRIES", 1)
    answer = f"HTTP/1.1 {status}\r\nlocation: /blob\r\ncontent-length: 10\r\n\r\n0123456789".encode()
    url, _ = _store_that_answers(answer, answer)
    file = _promised(url, b"0123456789")
    with pytest.raises(StorageDown, match=status[:3]):
        transfer.fetch([file], tmp_path, refresh=lambda: [file], threads=1)
    assert not (tmp_path / "data.bin").exists()


def test_what_is_not_in_the_store_any_more_is_named(tmp_path: Path) -> None:
    answer = b"HTTP/1.1 404 Not Found\r\ncontent-length: 30\r\n\r\n<Error><Code>NoSuchKey</Code>  "
    url, asked = _store_that_answers(answer)
    file = _promised(url, b"0123456789")
    with pytest.raises(BlobNotFound, match="is not there"):
        transfer.fetch([file], tmp_path, refresh=lambda: [file])
    assert len(asked) == 1  # asking again would not bring it back


def _expired(signed: SignedRequest) -> SignedRequest:
    return signed.model_copy(update={"url": signed.url.replace("expires=", "expires=1")})


FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
""" + PULL


def test_a_full_disk_is_said_and_leaves_no_file_with_a_name(
    registry: live.Live, large: tuple[str, bytes], tmp_path: Path
) -> None:
    line = [sys.executable, "-c", FULL, registry.url, registry.token, large[0], str(tmp_path)]
    ended = subprocess.run(line, check=False, capture_output=True, text=True)
    assert ended.returncode == 1
    assert DiskFull.__name__ in ended.stderr
    assert not (tmp_path / "data.jsonl").exists()


def test_two_pulls_into_one_folder_do_not_write_into_each_other(
    client: RegistryClient, large: tuple[str, bytes], small_ranges: None, tmp_path: Path
) -> None:
    inside = threading.Event()
    go_on = threading.Event()

    def wait(what: str, done: int, total: int) -> None:
        inside.set()
        go_on.wait(30)

    first = threading.Thread(target=lambda: transfer.pull(client, large[0], tmp_path, progress=wait))
    first.start()
    inside.wait(30)
    try:
        with pytest.raises(PathUnusable, match="another pull"):
            transfer.pull(client, large[0], tmp_path)
    finally:
        go_on.set()
        first.join()
    assert contents(tmp_path) == {"data.jsonl": large[1]}


def test_the_client_stays_small_whatever_the_size(registry: live.Live, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    row = json.dumps({"prompt": "a", "completion": "b"}).encode()
    file.write_bytes(row + b"\n" + (b" " * 999_999 + b"\n") * 100)
    line = [sys.executable, "-c", PUSH, registry.url, registry.token, str(file), "team/memory"]
    said = subprocess.run(line, check=True, capture_output=True, text=True).stdout.split()
    assert int(said[-1]) < 100_000  # kB of memory for 100 MB of file; two thirds of it are Python and its libraries
