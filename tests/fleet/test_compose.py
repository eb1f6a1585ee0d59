"""docker-compose.yml and the Dockerfile say what the code needs: valid, no secret inside, every command there.

Docker is not needed: the file is read and interpolated as compose does it, and the parts of it that other programs
interpret (the users of Redis, the command lines and identities of SeaweedFS) are given to those programs.
"""

import importlib.util
import json
import os
import re
import secrets
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import boto3
import jsonschema
import pytest
import redis
import yaml

from registry.broker import Broker
from registry.services import tokens
from registry.settings import Settings, WorkerSettings
from tests.fleet.compose import BIN, HOUSE, REQUIRED, TEXT, VARIABLE, composed, greeting, interpolate, redis_server
from tests.servers import free_ports, running

DOCKERFILE = (HOUSE / "Dockerfile").read_text()
SECRET = re.compile(r"PASSWORD|SECRET|TOKEN|_KEY$")
ONE_SHOT = {"migrate", "bucket"}

VALUES = {name: f"{name.lower().replace('_', '')}{secrets.token_hex(16)}" for name in REQUIRED} | {
    "LORACTL_PUBLIC_URL": "http://registry.example:8080",
    "LORACTL_S3_PUBLIC_ENDPOINT": "http://registry.example:8333",
}
FILE = composed(VALUES)
SERVICES: dict[str, dict[str, Any]] = FILE["services"]


def schema() -> dict[str, Any]:
    vendored = resources.files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    read: dict[str, Any] = json.loads(vendored.read_text())
    return read


# ── the file ─────────────────────────────────────────────────────────────────


def test_the_file_follows_the_compose_specification() -> None:
    jsonschema.validate(FILE, schema())


def test_the_schema_would_notice_a_misspelled_key() -> None:
    with pytest.raises(jsonschema.ValidationError, match="helthcheck"):
        jsonschema.validate({"services": {"api": {"image": "x", "helthcheck": {}}}}, schema())


def test_every_secret_must_be_given_and_has_no_default() -> None:
    used = {match["name"]: match["how"] for match in VARIABLE.finditer(TEXT) if match["name"]}
    assert {name: how for name, how in used.items() if SECRET.search(name) and how != ":?"} == {}


def test_what_is_missing_is_named_with_what_belongs_there() -> None:
    assert [
        match["name"] for match in VARIABLE.finditer(TEXT) if match["how"] == ":?" and len(match["text"]) < 10
    ] == []
    for name in REQUIRED:
        with pytest.raises(KeyError, match=name):
            interpolate(TEXT, {key: value for key, value in VALUES.items() if key != name})


def test_no_secret_is_written_in_the_file() -> None:
    raw = yaml.safe_load(TEXT)
    for service in raw["services"].values():
        for name, value in service.get("environment", {}).items():
            assert not SECRET.search(name) or value.startswith("${"), name
    assert re.findall(r"://[^/\s$]*:[^/\s$]*@", TEXT) == []


def test_every_service_has_a_health_check_or_runs_once() -> None:
    without = {name for name, service in SERVICES.items() if "healthcheck" not in service}
    awaited = {
        needed
        for service in SERVICES.values()
        for needed, how in service.get("depends_on", {}).items()
        if how["condition"] == "service_completed_successfully"
    }
    assert without == ONE_SHOT == awaited


def test_who_is_waited_for_healthy_has_a_health_check() -> None:
    for service in SERVICES.values():
        for needed, how in service.get("depends_on", {}).items():
            assert how["condition"] != "service_healthy" or "healthcheck" in SERVICES[needed]


def test_only_the_gpu_worker_is_behind_a_profile_and_it_asks_for_a_gpu() -> None:
    assert {name: service["profiles"] for name, service in SERVICES.items() if "profiles" in service} == {
        "worker-gpu": ["gpu"]
    }
    [device] = SERVICES["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


def test_only_the_api_and_the_store_can_be_reached_from_outside() -> None:
    assert {name for name, service in SERVICES.items() if "ports" in service} == {"api", "seaweedfs"}


def test_our_own_processes_cannot_change_their_image_or_gain_rights() -> None:
    ours = {name: service for name, service in SERVICES.items() if "build" in service}
    assert len(ours) == 5
    for name, service in ours.items():
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        mounted = [volume.split(":")[1] for volume in service.get("volumes", [])]
        assert {*service["tmpfs"], *mounted} == {"/tmp"} | {  # what they may write to
            service["environment"][key] for key in service["environment"] if key == "LORACTL_CACHE_DIR"
        }, name


def test_every_volume_config_and_anchor_is_used() -> None:
    mounted = {volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}
    assert mounted == set(FILE["volumes"])
    assert {config["source"] for service in SERVICES.values() for config in service.get("configs", [])} == set(
        FILE["configs"]
    )


def test_the_guide_makes_every_secret_and_the_tokens_have_their_form(tmp_path: Path) -> None:
    guide = (HOUSE / "docs" / "deploy.md").read_text()
    [script] = [block for block in re.findall(r"```sh\n(.*?)```", guide, re.DOTALL) if "cat > .env" in block]
    subprocess.run(["bash", "-eu", "-c", script], cwd=tmp_path, check=True)
    made = dict(line.split("=", 1) for line in (tmp_path / ".env").read_text().splitlines())
    assert sorted(made) == REQUIRED
    assert len(set(made.values())) == len(made)
    for name in ("LORACTL_BOOTSTRAP_TOKEN", "LORACTL_BOOTSTRAP_WORKER_TOKEN"):
        assert tokens.split(made[name])
    assert (tmp_path / ".env").stat().st_mode & 0o077 == 0


# ── what the code reads ──────────────────────────────────────────────────────


class Asked(dict[str, str]):
    """An environment that remembers what it was asked for."""

    def __init__(self, values: Mapping[str, str]) -> None:
        super().__init__({name: str(value) for name, value in values.items()})
        self.names: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)


OF_LIBRARIES = {"WEB_CONCURRENCY", "PROMETHEUS_MULTIPROC_DIR"}
"""Variables that uvicorn and prometheus_client read by themselves."""


@pytest.mark.parametrize("name", ["api", "daemons", "migrate"])
def test_the_registry_finds_its_settings(name: str) -> None:
    environment = Asked(SERVICES[name]["environment"])
    settings = Settings.from_environment(environment)
    assert settings.mode == "fleet"
    assert settings.s3 is not None
    assert settings.s3.endpoint != settings.s3.public_endpoint == "http://registry.example:8333"
    assert set(environment) - environment.names == (OF_LIBRARIES if name == "api" else set())


@pytest.mark.parametrize("name", ["worker-cpu", "worker-gpu"])
def test_a_worker_finds_its_settings_and_holds_no_key_but_its_token(name: str) -> None:
    environment = Asked(SERVICES[name]["environment"])
    assert WorkerSettings.from_environment(environment).token == VALUES["LORACTL_BOOTSTRAP_WORKER_TOKEN"]
    assert set(environment) <= environment.names
    assert not [key for key in environment if "DATABASE" in key or "S3" in key or "SIGNING" in key]
    held = [value for value in VALUES.values() if any(value in text for text in environment.values())]
    assert sorted(held) == sorted(
        VALUES[key] for key in ("LORACTL_BOOTSTRAP_WORKER_TOKEN", "LORACTL_PUBLIC_URL", "REDIS_WORKERS_PASSWORD")
    )


# ── commands ─────────────────────────────────────────────────────────────────


def stages() -> dict[str, list[str]]:
    """Instructions of each target of the Dockerfile, those of the stages below it included."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in DOCKERFILE.replace("\\\n", " ").splitlines():
        if match := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            lines = found[match[2]] = list(found.get(match[1], []))
        elif line and not line.startswith("#"):
            lines.append(line)
    return found


BUILT = {name: service for name, service in SERVICES.items() if "build" in service}


@pytest.mark.parametrize("name", BUILT)
def test_the_image_of_a_service_does_the_same_by_itself(name: str) -> None:
    *_, command = [line for line in stages()[BUILT[name]["build"]["target"]] if line.startswith("CMD ")]
    assert json.loads(command.removeprefix("CMD ")) == BUILT[name]["command"]


@pytest.mark.parametrize("name", BUILT)
def test_the_image_of_a_service_checks_its_health_in_the_same_way(name: str) -> None:
    *_, check = [line for line in stages()[BUILT[name]["build"]["target"]] if line.startswith("HEALTHCHECK")]
    if name in ONE_SHOT:
        assert check == "HEALTHCHECK NONE"
    else:
        assert ["CMD", *json.loads(check.partition(" CMD ")[2])] == BUILT[name]["healthcheck"]["test"]


@pytest.mark.parametrize("name", BUILT)
def test_no_image_runs_as_root_or_holds_a_secret(name: str) -> None:
    lines = stages()[BUILT[name]["build"]["target"]]
    *_, user = [line for line in lines if line.startswith("USER ")]
    assert user == "USER loractl"
    assert [line for line in lines if re.match(r"(ENV|ARG) ", line) and SECRET.search(line)] == []


@pytest.mark.parametrize("name", BUILT)
def test_the_command_of_a_service_exists(name: str) -> None:
    command = BUILT[name]["command"]
    assert (BIN / command[0]).exists()
    match command:
        case ["python", "-m", module] | ["celery", "-A", module, "worker", *_]:
            assert importlib.util.find_spec(module) is not None
        case ["uvicorn", "--factory", factory, *_]:
            module, _, function = factory.partition(":")
            assert callable(getattr(importlib.import_module(module), function))
        case _:
            pytest.fail(f"an unknown kind of command: {command}")


def test_the_build_sends_only_what_the_images_install() -> None:
    lines = (HOUSE / ".dockerignore").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith(("#", "!", "**/"))] == ["*"]
    assert {line[1:] for line in lines if line.startswith("!")} == {
        "requirements", "pyproject.toml", "README.md", "LICENSE", "registry", "workers", "cli", "migrations",
    }  # fmt: skip


# ── Redis and SeaweedFS, as the file configures them ─────────────────────────


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a server that runs the command of the service `redis` with its users."""
    [port] = free_ports(1)
    with redis_server(FILE, port, tmp_path_factory.mktemp("redis")):
        yield port


def url(port: int, service: str) -> str:
    written: str = SERVICES[service]["environment"]["LORACTL_BROKER_URL"]
    return written.replace("@redis:6379", f"@127.0.0.1:{port}")


def test_nobody_talks_to_redis_without_a_name_and_the_health_check_knows_it(broker: int) -> None:
    assert greeting(broker).startswith(b"-NOAUTH")
    assert "grep -q NOAUTH" in SERVICES["redis"]["healthcheck"]["test"][1]


@pytest.mark.parametrize("queue", ["cpu", "gpu"])
def test_the_registry_may_wake_a_queue_and_its_worker_may_listen(broker: int, queue: str) -> None:
    assert Broker(url(broker, "api")).wake(queue)
    worker = redis.Redis.from_url(url(broker, f"worker-{queue}"))
    assert worker.llen(queue) == 1
    assert worker.brpop([queue], timeout=1) is not None


@pytest.mark.parametrize(
    "command",
    [["SET", "other", "1"], ["GET", "other"], ["FLUSHALL"], ["KEYS", "*"], ["CONFIG", "GET", "*"], ["ACL", "LIST"]],
)
def test_a_worker_may_do_nothing_else_in_redis(broker: int, command: list[str]) -> None:
    with pytest.raises(redis.exceptions.NoPermissionError):
        redis.Redis.from_url(url(broker, "worker-cpu")).execute_command(*command)  # type: ignore[no-untyped-call]


def test_the_store_starts_as_configured_and_its_bucket_is_made_once(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    identities = tmp_path / "s3.json"
    identities.write_text(FILE["configs"]["s3-identities"]["content"])
    parts = ["master", "volume", "filer", "s3"]
    ports = dict(zip([*parts, *(f"{part}.grpc" for part in parts)], free_ports(8), strict=True))
    command = [str(BIN / "weed"), "-logtostderr", *SERVICES["seaweedfs"]["command"]]
    command += [f"-dir={tmp_path / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.config={identities}"]
    command += [f"-{part}.port={ports[part]}" for part in parts]
    command += [f"-{part}.port.grpc={ports[f'{part}.grpc']}" for part in parts]
    command += [f"-s3.localSocket={tmp_path / 's3.sock'}", f"-filer.localSocket={tmp_path / 'filer.sock'}"]
    bucket = SERVICES["bucket"]
    environment = {
        **os.environ,
        **bucket["environment"],
        "MASTER": f"127.0.0.1:{ports['master']}.{ports['master.grpc']}",
        "FILER": f"127.0.0.1:{ports['filer']}.{ports['filer.grpc']}",
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    with running("SeaweedFS", command, tmp_path, stop=signal.SIGKILL) as server:
        server.wait_until(lambda: healthy(ports["s3"]))
        for _ in range(2):
            subprocess.run(
                [*bucket["entrypoint"], *bucket["command"]], env=environment, check=True, capture_output=True
            )
        registry = SERVICES["api"]["environment"]
        client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{ports['s3']}",
            aws_access_key_id=registry["LORACTL_S3_ACCESS_KEY"],
            aws_secret_access_key=registry["LORACTL_S3_SECRET_KEY"],
            region_name=registry["LORACTL_S3_REGION"],
        )
        assert [made["Name"] for made in client.list_buckets()["Buckets"]] == [registry["LORACTL_S3_BUCKET"]]


def healthy(port: int) -> bool:
    """What the health check of the service `seaweedfs` asks."""
    asked = re.search(r"http://127.0.0.1:8333(/\S+)", SERVICES["seaweedfs"]["healthcheck"]["test"][1])
    assert asked is not None
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{asked[1]}", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        time.sleep(0.1)
        return False
