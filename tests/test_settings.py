"""Settings: read once, complete or refused by name; secrets have no default and are never shown."""

from dataclasses import fields
from pathlib import Path

import pytest

from registry.settings import BadSetting, S3Settings, Settings, WorkerSettings

FLEET = {
    "LORACTL_DATABASE_URL": "postgresql+psycopg://u:hunter2@db/loractl",
    "LORACTL_BROKER_URL": "redis://:hunter2@broker/0",
    "LORACTL_PUBLIC_URL": "https://registry.example/",
    "LORACTL_SIGNING_KEY": "hunter2",
    "LORACTL_S3_BUCKET": "blobs",
    "LORACTL_S3_ACCESS_KEY": "access",
    "LORACTL_S3_SECRET_KEY": "hunter2",
}
WORKER = {"LORACTL_URL": "https://registry.example", "LORACTL_TOKEN": "lora_hunter2", "LORACTL_BROKER_URL": "redis://b"}


def test_a_fleet_is_the_default() -> None:
    found = Settings.from_environment(FLEET)
    assert (found.mode, found.data, found.public_url) == ("fleet", None, "https://registry.example")
    assert found.s3 is not None
    assert (found.s3.bucket, found.s3.public_endpoint, found.s3.path_style) == ("blobs", None, True)


@pytest.mark.parametrize("name", FLEET)
def test_what_is_missing_is_named(name: str) -> None:
    for env in ({key: value for key, value in FLEET.items() if key != name}, FLEET | {name: ""}):
        with pytest.raises(BadSetting, match=f"{name} is missing"):
            Settings.from_environment(env)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("MODE", "cloud", "'embedded'"), ("LEASE_S", "soon", "a whole number"),
        ("LEASE_S", "0", "more than 0"), ("PART_SIZE", "-1", "more than 0"),
        ("SEAL_KEYS", "c2hvcnQ=", "number 1"), ("SEAL_KEYS", f"{'A' * 43}=, not base64", "number 2"),
        ("S3_ADDRESSING", "virtul", "'path' and 'virtual'"), ("LOG_LEVEL", "loud", "'debug', 'error', 'info' and"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_what_is_allowed(name: str, value: str, told: str) -> None:
    with pytest.raises(BadSetting, match=told):
        Settings.from_environment(FLEET | {f"LORACTL_{name}": value})


def test_embedded_keeps_blobs_in_a_folder_unless_a_bucket_is_named() -> None:
    env = {key: value for key, value in FLEET.items() if "S3" not in key} | {"LORACTL_MODE": "embedded"}
    with pytest.raises(BadSetting, match="LORACTL_DATA"):
        Settings.from_environment(env)
    found = Settings.from_environment(env | {"LORACTL_DATA": "/data", "LORACTL_FILE_ROOTS": "/a:/b"})
    assert (found.data, found.s3, found.file_roots) == (Path("/data"), None, (Path("/a"), Path("/b")))
    assert Settings.from_environment(FLEET | {"LORACTL_MODE": "embedded"}).data is None


def test_a_public_endpoint_is_the_internal_one_until_it_is_named() -> None:
    inside = FLEET | {"LORACTL_S3_ENDPOINT": "http://s3:8333"}
    found = Settings.from_environment(inside).s3
    apart = Settings.from_environment(inside | {"LORACTL_S3_PUBLIC_ENDPOINT": "https://s3.example"}).s3
    assert found is not None and apart is not None
    assert (found.endpoint, found.public_endpoint) == ("http://s3:8333", "http://s3:8333")
    assert (apart.endpoint, apart.public_endpoint) == ("http://s3:8333", "https://s3.example")


def test_a_replica_is_a_folder_or_a_bucket_with_keys_of_its_own_or_the_stores() -> None:
    assert Settings.from_environment(FLEET).replica is None
    for url in ("/mnt/backup", "file:///mnt/backup"):
        assert Settings.from_environment(FLEET | {"LORACTL_REPLICA_URL": url}).replica == Path("/mnt/backup")
    bucket = FLEET | {"LORACTL_REPLICA_URL": "s3://copy", "LORACTL_S3_ENDPOINT": "http://s3:8333"}
    same = Settings.from_environment(bucket).replica
    assert same == S3Settings("copy", "http://s3:8333", None, "us-east-1", "access", "hunter2")
    apart = {"ENDPOINT": "https://far.example", "ACCESS_KEY": "reader", "SECRET_KEY": "far", "ADDRESSING": "virtual"}
    other = Settings.from_environment(bucket | {f"LORACTL_REPLICA_S3_{name}": value for name, value in apart.items()})
    assert other.replica == S3Settings("copy", "https://far.example", None, "us-east-1", "reader", "far", False)
    for wrong in ("backup", "http://far.example", "s3://", "s3://copy/blobs"):
        with pytest.raises(BadSetting, match=r"LORACTL_REPLICA_URL is '.*'; expected /a/folder or s3://bucket"):
            Settings.from_environment(FLEET | {"LORACTL_REPLICA_URL": wrong})


def test_a_worker_holds_no_database_and_no_key() -> None:
    found = WorkerSettings.from_environment(WORKER | {"HOME": "/home/w", "HOSTNAME": "w1"})
    assert (found.name, found.cache) == ("w1", Path("/home/w/.cache/loractl"))
    assert not {field.name for field in fields(WorkerSettings)} & {"database_url", "signing_key", "s3"}
    for name in WORKER:
        with pytest.raises(BadSetting, match=name):
            WorkerSettings.from_environment({key: value for key, value in WORKER.items() if key != name})


def test_no_secret_is_shown() -> None:
    shown = repr(Settings.from_environment(FLEET)) + repr(WorkerSettings.from_environment(WORKER))
    assert "hunter2" not in shown
