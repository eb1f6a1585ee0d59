"""What only S3 has to prove: two endpoints, reused signatures, and a server that goes away."""

import os
import signal
from dataclasses import replace

import httpx
import pytest

from registry.core.digest import Digest
from registry.core.errors import StorageDown
from registry.settings import S3Settings
from registry.storage.probe import probe
from registry.storage.s3 import S3Store
from tests import servers

DATA = b"some bytes"
SHA256 = Digest.sha256(DATA)
KEY = f"staging/p1/{SHA256.hex}"
NOWHERE = S3Settings(
    bucket="bucket",
    endpoint="http://inside.invalid:9000",
    public_endpoint="https://public.example",
    region="eu-central-1",
    access_key="AKIDEXAMPLE",
    secret_key="a secret of tests",
)


def test_signatures_are_for_the_public_endpoint_and_our_own_for_the_internal_one() -> None:
    store = S3Store(NOWHERE)
    assert store.presign_get(KEY, expires_s=60).url.startswith(f"https://public.example/bucket/{KEY}?")
    assert store.inside().presign_get(KEY, expires_s=60).url.startswith(f"http://inside.invalid:9000/bucket/{KEY}?")
    one_endpoint = S3Store(replace(NOWHERE, public_endpoint=None))
    assert one_endpoint.presign_get(KEY, expires_s=60).url.startswith("http://inside.invalid:9000/")


def test_the_bucket_may_stand_in_the_host_name() -> None:
    store = S3Store(replace(NOWHERE, path_style=False))
    assert store.presign_get(KEY, expires_s=60).url.startswith(f"https://bucket.public.example/{KEY}?")


def test_a_put_signs_length_and_checksum() -> None:
    request = S3Store(NOWHERE).presign_put(KEY, size=len(DATA), sha256=SHA256, expires_s=60)
    signed = httpx.URL(request.url).params["X-Amz-SignedHeaders"].split(";")
    assert set(signed) == {"host", *request.headers}
    assert request.headers == {"content-length": "10", "x-amz-checksum-sha256": SHA256.base64}


def test_a_get_is_signed_once_for_a_quarter_of_its_life() -> None:
    now = [1000.0]
    store = S3Store(NOWHERE, clock=lambda: now[0])
    first = store.presign_get(KEY, expires_s=100)
    now[0] = 1024
    assert store.presign_get(KEY, expires_s=100) is first
    assert store.presign_get(KEY, expires_s=101) is not first
    assert store.presign_get(KEY, expires_s=100, filename="x") is not first
    now[0] = 1025
    later = store.presign_get(KEY, expires_s=100)
    assert (first.expires_at, later.expires_at) == (1100, 1125)


def test_secrets_are_in_no_url() -> None:
    store = S3Store(NOWHERE)
    for request in (
        store.presign_get(KEY, expires_s=60),
        store.presign_put(KEY, size=10, sha256=SHA256, expires_s=60),
        store.presign_part(KEY, "id", 1, size=10, sha256=SHA256, expires_s=60),
    ):
        assert "secret" not in request.url


def test_a_stopped_server_is_storage_down(http: httpx.Client) -> None:
    with servers.seaweedfs() as server:
        store = S3Store(
            S3Settings(
                bucket=server.bucket,
                endpoint=server.endpoint,
                public_endpoint=None,
                region=server.region,
                access_key=server.access_key,
                secret_key=server.secret_key,
            )
        )
        store.put(KEY, DATA, SHA256)
        with store.open(KEY) as blob:
            os.kill(server.pid, signal.SIGKILL)
            with pytest.raises(StorageDown):
                blob.read(0, 10)
        for call in (
            lambda: store.head(KEY),
            lambda: store.put(KEY, DATA, SHA256),
            lambda: list(store.walk("staging/")),
            lambda: probe(store, http),
        ):
            with pytest.raises(StorageDown):
                call()


def test_a_wrong_setting_is_storage_down_with_what_the_store_said(s3_settings: S3Settings) -> None:
    for settings, said in (
        (replace(s3_settings, secret_key="wrong"), "SignatureDoesNotMatch"),
        (replace(s3_settings, access_key="wrong"), "InvalidAccessKeyId"),
        (replace(s3_settings, bucket="no-such-bucket"), "NoSuchBucket"),
    ):
        with pytest.raises(StorageDown, match=said):
            S3Store(settings).put(KEY, DATA, SHA256)
