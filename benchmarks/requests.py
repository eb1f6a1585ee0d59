"""Requests per second on PostgreSQL: manifest by digest and resolve, against an empty route behind the same access.

One API process; the load comes from a process of its own over keep-alive connections, in rounds that take turns, over
many different adapters. MLflow's registry answers the closest question it has (get-model-version by name and version)
from the same PostgreSQL server, with one worker process and without authentication, installed in an environment of
its own.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psycopg
from fastapi import FastAPI, Response
from sqlalchemy import make_url

from registry.api.app import create_app
from registry.api.deps import User
from tests import servers

from . import fill, load
from .house import ROOT, answers, started
from .table import Row, at_least

ADAPTERS, MODELS = 1_000, 200
MLFLOW = ("mlflow==3.17.2", "psycopg2-binary==2.9.13")


def with_an_empty_route() -> FastAPI:
    """The API, and a route that only asks who is there."""
    app = create_app()

    @app.get("/empty")
    async def empty(caller: User) -> Response:  # noqa: ARG001  # the question is what asking costs
        return Response(b"{}", media_type="application/json")

    app.router.routes.insert(0, app.router.routes.pop())  # found at once: no route could be cheaper
    return app


def run(scale: float = 1.0) -> list[Row]:
    times, seconds = (5, 3.0) if scale >= 1 else (max(1, int(5 * scale)), max(0.2, 3.0 * scale))
    with (
        tempfile.TemporaryDirectory() as name,
        fill.served(Path(name), f"{__name__}:with_an_empty_route", max(20, int(ADAPTERS * scale))) as served,
    ):
        registry, filled, database = served
        aliased = fill.aliased(filled.names)
        paths = {
            "empty": ["/empty"],
            "manifest": [f"/v1/adapters/{name}/versions/{digest}/manifest" for name, digest, _ in filled.names],
            "resolve": [f"/v1/resolve?ref={name}:prod&base={base}" for name, _, base in aliased],
        }
        targets = {name: (registry.url, load.gets(registry.url, of, registry.token)) for name, of in paths.items()}
        with _mlflow(Path(name), database, scale) as other:
            if other is not None:
                targets["mlflow"] = other
            found = load.rounds(targets, times=times, seconds=seconds)
    rate = {name: load.median(loads) for name, loads in found.items()}
    busy = max(load.busy for loads in found.values() for load in loads)
    note = f"{load.CONNECTIONS} connections, one API process; the load generator used at most {busy:.0%} of a core"
    empty = f"an empty route, {rate['empty']:,.0f}/s"
    rows = [
        at_least("manifest by digest, requests per second", rate["manifest"] / rate["empty"], 0.7, peer=empty,
                 note=f"{rate['manifest']:,.0f}/s; {note}"),
        at_least("resolve, requests per second", rate["resolve"] / rate["empty"], 0.25, peer=empty,
                 note=f"{rate['resolve']:,.0f}/s over {len(aliased)} adapters whose answers were made before and are "
                 f"checked by one statement; made for the first time: {found['resolve'][0].first:,.0f}/s"),
    ]  # fmt: skip
    if "mlflow" in rate:
        rows.append(
            at_least("resolve, against MLflow's get-model-version", rate["resolve"] / rate["mlflow"], 10,
                     peer=f"{MLFLOW[0]} without authentication, {rate['mlflow']:,.0f}/s", note="same PostgreSQL server")
        )  # fmt: skip
    return rows


# ── MLflow ───────────────────────────────────────────────────────────────────


@contextmanager
def _mlflow(folder: Path, database: str, scale: float) -> Iterator[tuple[str, list[bytes]] | None]:
    """A running MLflow with registered models: its URL and requests; None in a quick look (it takes a minute)."""
    if scale < 0.05:
        yield None
        return
    python = _environment()
    with psycopg.connect(_plain(database), autocommit=True) as connection:
        connection.execute("CREATE DATABASE mlflow")
    where = make_url(database).set(drivername="postgresql+psycopg2", database="mlflow")
    [port] = servers.free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [str(python), "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", where.render_as_string(hide_password=False)]
    command += ["--default-artifact-root", str(folder / "artifacts")]
    with started("mlflow", command, folder) as server:
        server.wait_until(lambda: answers(f"{url}/health"), patience_s=180)
        with httpx.Client(base_url=f"{url}/api/2.0/mlflow", timeout=60) as client:
            for index in range(MODELS):
                name = {"name": f"bot-{index}"}
                client.post("/registered-models/create", json=name).raise_for_status()
                made = name | {"source": f"s3://bucket/bot-{index}"}
                client.post("/model-versions/create", json=made).raise_for_status()
        paths = [f"/api/2.0/mlflow/model-versions/get?name=bot-{index}&version=1" for index in range(MODELS)]
        yield url, load.gets(url, paths)


def _plain(url: str) -> str:
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def _environment() -> Path:
    """The interpreter of an environment with MLflow in it, made once: its versions are not ours."""
    folder = Path(os.environ.get("LORACTL_BENCH_CACHE", ROOT / ".demo" / "benchmarks")) / "-".join(MLFLOW)
    python = folder / "bin" / "python"
    done = folder / "installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-qq", *MLFLOW], check=True)
        done.touch()
    return python
