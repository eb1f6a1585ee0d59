"""What several API processes on one PostgreSQL keep together: real ones, each on a port of its own."""

import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import psycopg
import pytest
from sqlalchemy import make_url
from sqlmodel import col, select

from registry.db.engine import Database
from registry.db.models import Token
from registry.services.tokens import make_text
from registry.settings import S3Settings
from tests import servers
from tests.waiting import wait_for

ADMIN = make_text()


def environment(database: Database, s3: S3Settings, **more: str) -> dict[str, str]:
    return {
        "PATH": str(Path(sys.executable).parent),
        "PYTHONPATH": str(Path(__file__).parent.parent.parent),
        "LORACTL_DATABASE_URL": make_url(database.engine.url).render_as_string(hide_password=False),
        "LORACTL_BROKER_URL": "memory://",
        "LORACTL_PUBLIC_URL": "http://localhost",
        "LORACTL_SIGNING_KEY": "a key of tests that is long enough",
        "LORACTL_S3_BUCKET": s3.bucket,
        "LORACTL_S3_ENDPOINT": str(s3.endpoint),
        "LORACTL_S3_ACCESS_KEY": s3.access_key,
        "LORACTL_S3_SECRET_KEY": s3.secret_key,
        "LORACTL_BOOTSTRAP_TOKEN": ADMIN,
        **more,
    }


def serving(stack: ExitStack, folder: Path, env: dict[str, str], *more: str) -> httpx.Client:
    """An API process (``more``: what uvicorn is told besides), and a client of it."""
    [port] = servers.free_ports(1)
    folder.mkdir()
    line = [sys.executable, "-m", "uvicorn", "--factory", "registry.api.app:create_app", "--port", str(port), *more]
    process = stack.enter_context(servers.running("API", line, folder, env=env))
    client = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60))

    def answers() -> bool:
        try:
            return client.get("/health").is_success
        except httpx.TransportError:
            return False

    process.wait_until(answers)
    return client


def test_of_two_hundred_clients_at_once_each_is_answered_or_refused_and_nothing_let_in_is_dropped(
    postgres_database: Database, s3_settings: S3Settings, tmp_path: Path
) -> None:
    clients = 200
    env = environment(postgres_database, s3_settings, LORACTL_IN_FLIGHT="8")
    headers = {"authorization": f"Bearer {ADMIN}"}
    with ExitStack() as stack:
        url = serving(stack, tmp_path / "one", env).base_url
        limits = httpx.Limits(max_connections=clients)
        client = stack.enter_context(httpx.Client(base_url=url, timeout=120, limits=limits))
        pool = stack.enter_context(ThreadPoolExecutor(clients))
        ready = threading.Barrier(clients)

        def ask(number: int) -> httpx.Response:
            ready.wait(60)
            return client.post("/v1/tokens", json={"name": f"n{number}", "scopes": {"team": ["read"]}}, headers=headers)

        answers = list(pool.map(ask, range(clients)))
    assert {answer.status_code for answer in answers} == {201, 503}
    refused = [answer for answer in answers if answer.status_code == 503]
    assert all(answer.json()["code"] == "overloaded" and int(answer.headers["retry-after"]) > 0 for answer in refused)
    with postgres_database.read() as session:
        kept = session.exec(select(Token.name).where(col(Token.name).startswith("n"))).all()
    assert sorted(kept) == sorted(answer.json()["name"] for answer in answers if answer.status_code == 201)


def test_what_is_too_much_is_refused_at_the_door_and_what_was_let_in_is_answered(
    postgres_database: Database, s3_settings: S3Settings, tmp_path: Path
) -> None:
    limit = 3
    env = environment(postgres_database, s3_settings, LORACTL_IN_FLIGHT=str(limit))
    admin, wanted = {"authorization": f"Bearer {ADMIN}"}, {"name": "x", "scopes": {"team": ["read"]}}
    url = make_url(postgres_database.engine.url).set(drivername="postgresql").render_as_string(hide_password=False)
    waiting = b"SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'tokens'::regclass"
    with ExitStack() as stack:
        client = serving(stack, tmp_path / "one", env)
        client.get("/v1/whoami", headers=admin)
        lock = stack.enter_context(psycopg.connect(url))
        look = stack.enter_context(psycopg.connect(url, autocommit=True))
        pool = stack.enter_context(ThreadPoolExecutor(limit))
        lock.execute("LOCK TABLE tokens IN EXCLUSIVE MODE")  # reading goes on, writing waits
        let_in = [pool.submit(client.post, "/v1/tokens", json=wanted, headers=admin) for _ in range(limit)]
        deadline = time.monotonic() + 30
        while look.execute(waiting).fetchone() not in ((limit,), (limit + 1,)):  # one may write down the last use
            assert time.monotonic() < deadline
            time.sleep(0.02)
        for _ in range(10):
            refused = client.post("/v1/tokens", json=wanted, headers=admin)
            assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
            assert refused.headers["retry-after"] == "1"
        assert client.get("/health").status_code == 200
        lock.rollback()
        assert [done.result().status_code for done in let_in] == [201] * limit
        assert len(client.get("/v1/tokens", headers=admin).json()["items"]) == limit + 1
        assert client.post("/v1/tokens", json=wanted, headers=admin).status_code == 201


@pytest.fixture
def two(postgres_database: Database, s3_settings: S3Settings, tmp_path: Path) -> Iterator[list[httpx.Client]]:
    env = environment(postgres_database, s3_settings)
    with ExitStack() as stack:
        yield [serving(stack, tmp_path / name, env) for name in ("one", "two")]


def test_a_revocation_holds_on_every_process_within_a_second(two: list[httpx.Client]) -> None:
    one, other = two
    admin = {"authorization": f"Bearer {ADMIN}"}
    for _ in range(5):
        made = one.post("/v1/tokens", json={"name": "x", "scopes": {"team": ["read"]}}, headers=admin).json()
        mine = {"authorization": f"Bearer {made['token']}"}
        assert other.get("/v1/whoami", headers=mine).status_code == 200  # from here on it is remembered there
        assert one.delete(f"/v1/tokens/{made['id']}", headers=admin).status_code == 200
        revoked = time.monotonic()
        assert one.get("/v1/whoami", headers=mine).status_code == 401
        last = revoked  # when the last request that was still answered had been sent
        while (sent := time.monotonic()) < revoked + 1.5:
            if other.get("/v1/whoami", headers=mine).status_code == 200:
                last = sent
        assert last - revoked < 1.0  # the promise itself; what is remembered ends after 0.8 s


def test_processes_behind_one_port_count_together_and_drop_a_token_within_a_second(
    postgres_database: Database, s3_settings: S3Settings, tmp_path: Path
) -> None:
    counts = str(tmp_path / "metrics")
    env = environment(postgres_database, s3_settings, LORACTL_FAILED_SIGN_INS="0", PROMETHEUS_MULTIPROC_DIR=counts)
    (tmp_path / "metrics").mkdir()
    gone = tmp_path / "metrics" / "gauge_livesum_4194305.db"  # no process has so high a number
    gone.touch()
    headers, whoami = {"authorization": f"Bearer {ADMIN}"}, 'route="/v1/whoami"'
    with ExitStack() as stack:
        url = str(serving(stack, tmp_path / "api", env, "--workers", "2").base_url)

        def ask(path: str, **more: str) -> httpx.Response:  # over a connection each: either process may take it
            return httpx.get(f"{url}{path}", headers=headers | more, timeout=60)

        def counted() -> float:
            lines = ask("/metrics").text.splitlines()
            return sum(float(line.split()[-1]) for line in lines if "_count{" in line and whoami in line)

        wanted = {"name": "a", "scopes": {"*": ["read"]}}
        made = httpx.post(f"{url}/v1/tokens", json=wanted, headers=headers, timeout=60)
        theirs = {"authorization": f"Bearer {made.json()['token']}"}
        asked, served = 0, set[str]()
        deadline = time.monotonic() + 60
        while len(served) < 2 and time.monotonic() < deadline:
            for _ in range(10):
                assert ask("/v1/whoami", **theirs).is_success
                asked += 1
            wait_for(lambda: counted() == asked)  # noqa: B023  # a request is counted after its answer
            served = {path.name for path in (tmp_path / "metrics").glob("histogram_*.db")}
        assert len(served) == 2
        assert not gone.exists()
        httpx.delete(f"{url}/v1/tokens/{made.json()['id']}", headers=headers, timeout=60).raise_for_status()
        time.sleep(1)
        assert {ask("/v1/whoami", **theirs).status_code for _ in range(20)} == {401}
