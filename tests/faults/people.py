"""Those who use a town's registry: processes that may be killed at any moment, with journals of what was promised.

A line of a journal is written after the registry's answer arrived, so whatever it says must be true for ever.
Refusals that say "later" are expected in these towns; anything else than those and a lost race is written down as a
breach.
"""

import errno
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from registry.client import RegistryClient
from registry.core.digest import Digest
from registry.core.errors import (
    AliasMoved,
    DiskFull,
    JobNotFound,
    LeaseLost,
    LoractlError,
    NotYourJob,
    PushExpired,
    Unavailable,
    VersionInUse,
)
from registry.core.manifest import Lineage
from registry.files import digest_base, scan_folder
from registry.schemas import (
    AliasRequest,
    ClaimInfo,
    ClaimRequest,
    FinishRequest,
    HeartbeatRequest,
    JobPushRequest,
    JobRequest,
    Output,
    StandingRequest,
    UpgradeRequest,
    Wishes,
)
from registry.transfer import finish_push, pull, push_adapter, push_base, push_dataset, request_of
from tests.factories import readable_base, tiny_adapter

BOTS = ("town/ada", "town/bob", "town/eve")
LATER = (Unavailable, PushExpired, DiskFull)
LINE, WORKSHOP = "letters", "gpu"
"""What is trained on, and the queue of those who can."""
PLENTY = 50
"""Jobs that wait; nobody asks for more."""
LOST_RACE = (AliasMoved, LeaseLost, NotYourJob, JobNotFound, VersionInUse)


@dataclass(frozen=True)
class Place:
    """What people know of a town."""

    url: str
    token: str
    worker_token: str
    folder: Path
    base: Path

    def journal(self, name: str) -> Path:
        return self.folder / "journals" / f"{name}.jsonl"

    @property
    def closed(self) -> Path:
        """People go home when it is there."""
        return self.folder / "closed"


Line = dict[str, Any]


class Journals:
    """All that was promised to anybody in a town."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "journals"
        self._read: dict[Path, int] = {}

    def news(self) -> Iterator[Line]:
        """What was written since the last look, whole lines only: their writer may have been killed."""
        for path in sorted(self.folder.glob("*.jsonl")):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(whole)
            yield from map(json.loads, whole.splitlines())


class Person:
    """A name, chances of their own, a client, and a journal."""

    def __init__(self, place: Place, name: str, seed: int, *, works: bool = False) -> None:
        self.place, self.name = place, name
        self.chance = random.Random(f"{name} {seed}")
        self.client = RegistryClient(place.url, place.worker_token if works else place.token, timeout_s=20)
        self.base = str(digest_base(place.base).digest)
        self.home = place.folder / "homes" / name
        self.home.mkdir(parents=True, exist_ok=True)
        self._journals, self._pushed, self._jobs = Journals(place.folder), list[Line](), Counter[str]()

    def pushed(self) -> list[Line]:
        """What was committed for anybody."""
        for line in self._journals.news():
            self._pushed += [line] if line["did"] == "pushed" else []
            self._jobs[line["did"]] += 1
        return self._pushed

    def waits(self) -> int:
        """How much work was asked for and is not done, as far as is known."""
        return self._jobs["asked"] - self._jobs["finished"]

    def note(self, did: str, **facts: Any) -> None:
        line = json.dumps({"did": did, "who": self.name, **facts}) + "\n"
        with self.place.journal(self.name).open("ab", buffering=0) as file:
            file.write(line.encode())

    def live(self, act: Callable[[], None]) -> None:
        """Act again and again; what is refused for now, or lost to somebody quicker, is part of life here."""
        while not self.place.closed.exists():
            try:
                act()
            except LATER as refusal:
                self.note("refused", code=refusal.code)
                time.sleep(self.chance.uniform(0.05, 0.3))
            except LOST_RACE as refusal:
                self.note("lost", code=refusal.code)
            except LoractlError as error:
                self.note("breach", code=error.code, told=f"{act.__name__}: {error.message}"[:500])
            except Exception as error:  # noqa: BLE001  # whatever it was, the driver shall hear of it
                self.note("breach", code=type(error).__name__, told=f"{act.__name__}: {error}"[:500])


@contextmanager
def own_work() -> Iterator[None]:
    """What a person writes without the client: a full disk is no surprise there."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise DiskFull(path="what is mine") from error


# ── pushing and pulling ──────────────────────────────────────────────────────


def author(place: Place, name: str, seed: int, data: float = 0.25) -> None:
    """Pushes adapters, some with an alias, some twice; and a share of ``data``, large enough to go in parts."""
    me = Person(place, name, seed)

    def push_one() -> None:
        number = me.chance.randrange(1 << 30)
        if me.chance.random() < data:
            _push_data(me, number)
            return
        with own_work():
            folder = tiny_adapter(me.home / f"a{number}", place.base, seed=number)
        wishes = Wishes(aliases=["prod"] if me.chance.random() < 0.5 else [])
        bot = me.chance.choice(BOTS)
        made = push_adapter(me.client, folder, bot, me.base, wishes)
        me.note("pushed", kind="adapter", name=bot, digest=made.version_digest, outcome=made.outcome)
        if me.chance.random() < 0.3:
            again = push_adapter(me.client, folder, bot, me.base)
            if (again.version_digest, _number(again.outcome)) != (made.version_digest, _number(made.outcome)):
                me.note("breach", code="twice", told=f"{bot}: {made.outcome} and then {again.outcome}")

    me.live(push_one)


def remover(place: Place, name: str, seed: int) -> None:
    """Pushes one of a few contents to a series of its own, and deletes it, while others need the same bytes."""
    me = Person(place, name, seed)

    def come_and_go() -> None:
        number = me.chance.randrange(4)
        with own_work():
            folder = tiny_adapter(me.home / f"b{number}", place.base, seed=number, rank=1)
        series = f"town/brief{me.chance.randrange(1 << 40)}"
        made = push_adapter(me.client, folder, series, me.base)
        if me.chance.random() < 0.2:
            me.note("pushed", kind="adapter", name=series, digest=made.version_digest, outcome=made.outcome)
            return
        me.client.change_standing(series, (made.outcome or {})["version"], "delete", StandingRequest(reason="is brief"))
        me.note("deleted", name=series, digest=made.version_digest, outcome=made.outcome)

    me.live(come_and_go)


def _number(outcome: dict[str, Any] | None) -> Any:
    return (outcome or {}).get("version")


def _push_data(me: Person, number: int) -> None:
    file = me.home / f"d{number}.jsonl"
    size = me.chance.choice((1, 1, 1, 40, 400))
    text = me.chance.randbytes(10_000).hex()
    with own_work():
        file.write_text("".join(f'{{"prompt": "{number} {row}", "completion": "{text}"}}\n' for row in range(size)))
    made = push_dataset(me.client, "dataset", file, "town/data")
    me.note("pushed", kind="dataset", name="town/data", digest=made.version_digest, outcome=made.outcome)
    file.unlink()


def reader(place: Place, name: str, seed: int) -> None:
    """Pulls what was promised to somebody."""
    me = Person(place, name, seed)

    def pull_one() -> None:
        if not (known := me.pushed()):
            time.sleep(0.05)
            return
        wanted = me.chance.choice(known)
        out = me.home / f"{wanted['digest'].removeprefix('sha256:')[:16]}-{me.chance.randrange(3)}"
        pull(me.client, wanted["digest"], out)
        me.note("pulled", digest=wanted["digest"], out=str(out))

    me.live(pull_one)


def mover(place: Place, name: str, seed: int) -> None:
    """Moves an alias by compare-and-set, and takes moves back."""
    me = Person(place, name, seed)

    def move_one() -> None:
        bot = me.chance.choice(BOTS)
        known = [line["digest"] for line in me.pushed() if line["name"] == bot]
        if not known:
            time.sleep(0.05)
            return
        now = {alias.alias: alias.generation for alias in me.client.aliases(bot)}
        wanted = AliasRequest(version=me.chance.choice(known), reason=name)
        moved = me.client.move_alias(bot, "live", wanted, generation=now.get("live", 0))
        me.note("moved", name=bot, alias="live", generation=moved.generation, digest=moved.digest)
        time.sleep(me.chance.uniform(0, 0.05))

    me.live(move_one)


# ── work ─────────────────────────────────────────────────────────────────────


def planner(place: Place, name: str, seed: int) -> None:
    """Asks for work on what was pushed."""
    me = Person(place, name, seed)

    def ask_one() -> None:
        known = [line["digest"] for line in me.pushed() if line["name"] in BOTS]  # what is brief may be deleted
        if not known or me.waits() > PLENTY:
            time.sleep(0.05)
            return
        recipe = {"kind": "compress", "base": me.base, "adapter": me.chance.choice(known),
                  "energy": round(me.chance.uniform(0.5, 0.99), 6)}  # fmt: skip
        job = me.client.submit(JobRequest(recipe=recipe, output=Output(adapter="town/small"), queue="cpu"))
        me.note("asked", job=job.id)
        time.sleep(me.chance.uniform(0.05, 0.3))

    me.live(ask_one)


def trainer(place: Place, name: str, seed: int) -> None:
    """Asks for trainings, the same few again and again, each for an adapter of its own."""
    me = Person(place, name, seed)

    def train_one() -> None:
        output = Output(adapter=f"town/t{me.chance.randrange(1 << 30)}")
        job = me.client.submit(JobRequest(recipe=training(me.chance.randrange(3)), output=output, queue=WORKSHOP))
        me.note("asked", job=job.id)
        time.sleep(me.chance.uniform(2, 5))

    me.live(train_one)


def training(seed: int) -> dict[str, Any]:
    """A recipe of a second or two, which leaves checkpoints on its way."""
    return {
        "kind": "finetune", "base": f"{LINE}@r1", "datasets": ["town/letters"], "targets": ["q_proj", "v_proj"],
        "rank": 2, "learning_rate": 5e-3, "steps": 120, "checkpoint_every": 10, "batch_tokens": 128, "max_length": 32,
        "precision": "fp32", "seed": seed,
    }  # fmt: skip


def upgrader(place: Place, name: str, seed: int) -> None:
    """Brings a new revision of the line, and starts a campaign to it; one that is planned already comes first."""
    me = Person(place, name, seed)
    news = [readable_base(me.home / f"base-{seed}", drift=0.01, seed=seed)]

    def upgrade() -> None:
        time.sleep(0.3)
        active = [one for one in me.client.upgrades().items if one.state in ("planned", "running")]
        if not active and news:
            pushed = push_base(me.client, news[0], Wishes(line=LINE))
            to = (pushed.outcome or {})["ref"]
            active = [me.client.create_upgrade(UpgradeRequest(line=LINE, to=to, old=f"{LINE}@r1", queue=WORKSHOP))]
            news.clear()
        for one in active:
            if one.state == "planned":
                me.client.start_upgrade(one.id)
                me.note("upgrades", campaign=one.id)

    me.live(upgrade)


def worker(place: Place, name: str, seed: int) -> None:
    """Claims work and hands in what it made: the protocol of a worker, without what takes torch."""
    me = Person(place, name, seed, works=True)

    def work_one() -> None:
        claimed = me.client.claim(ClaimRequest(queue="cpu", worker=name))
        if claimed.job is None:
            time.sleep(0.05)
            return
        work_on(me, claimed)

    me.live(work_one)


def work_on(me: Person, claimed: ClaimInfo) -> None:
    """One attempt, from its claim to the registry's word that it is taken."""
    job = claimed.job
    assert job is not None
    me.note("claimed", job=job.id, attempt=job.attempt)
    with own_work():
        made = tiny_adapter(me.home / f"{job.id}-{job.attempt}", me.place.base, seed=job.attempt, rank=2)
    lineage = Lineage(parents=(job.recipe["adapter"],), recipe={"job": job.id, **job.recipe})
    scan = scan_folder("adapter", made, base=Digest.parse(me.base), lineage=lineage)
    time.sleep(me.chance.uniform(0, 0.2))
    me.client.heartbeat(job.id, HeartbeatRequest(attempt=job.attempt, progress={"step": 1, "steps": 2}))
    opened = me.client.job_push(job.id, JobPushRequest(attempt=job.attempt, push=request_of(scan)))
    pushed = finish_push(me.client, opened, scan).id
    report = FinishRequest(attempt=job.attempt, result={"seconds": 0.1}, pushes=[pushed])
    while True:  # as the real one does: hours may be at stake
        with suppress(Unavailable):
            me.client.finish(job.id, report)
            break
        time.sleep(0.1)
    me.note("finished", job=job.id, attempt=job.attempt)
