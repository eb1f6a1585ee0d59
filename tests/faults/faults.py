"""What goes wrong: each a verb on a town, done in the middle of everything. `Town.heal` comes after it."""

import random
import time
from collections.abc import Callable

from registry.parts import Parts
from tests.faults import machines
from tests.faults.town import WORKERS, Town
from tests.link import Link

Fault = Callable[[Town, random.Random], None]
SKEW_S = 20.0
"""By how much clocks are wrong at most, in seconds."""


def nothing(_town: Town, _chance: random.Random) -> None:
    """The world is kind: what fails now fails without a reason."""


def client_dies(town: Town, chance: random.Random) -> None:
    """Somebody who pushes, pulls, moves or works is killed, and another takes the place."""
    for person in chance.sample(town.crowd, chance.randint(1, 4)):
        person.kill()
        person.join()


def api_dies(town: Town, chance: random.Random) -> None:
    """One of two APIs."""
    town.kill(f"api-{chance.randint(1, 2)}")
    time.sleep(chance.uniform(0, 1))


def apis_die(town: Town, chance: random.Random) -> None:
    """Both."""
    town.kill("api-1")
    town.kill("api-2")
    time.sleep(chance.uniform(0, 0.5))


def daemons_die(town: Town, chance: random.Random) -> None:
    """One set, or both: the verifier too, in the middle of a file."""
    for number in chance.sample((1, 2), chance.randint(1, 2)):
        town.kill(f"daemons-{number}")
    time.sleep(chance.uniform(0, 1))


def database_dies(town: Town, chance: random.Random) -> None:
    """PostgreSQL, without a chance to write what it holds in memory."""
    town.kill("database")
    time.sleep(chance.uniform(0, 1))


def store_dies(town: Town, chance: random.Random) -> None:
    """The S3 server, in the middle of uploads and copies."""
    town.kill("store")
    time.sleep(chance.uniform(0, 1))


def broker_forgets(town: Town, chance: random.Random) -> None:
    """Everything it held."""
    town.kill("broker")
    time.sleep(chance.uniform(0, 1))


def woken_for_nothing(town: Town, chance: random.Random) -> None:
    """Deliveries come many times, and for work that is not there."""
    parts = Parts.of(town.settings)
    for _ in range(chance.randint(5, 50)):
        parts.broker.wake_for(chance.choice(("cpu", "gpu")), chance.randint(1, 3))
    parts.close()


def workers_die(town: Town, chance: random.Random) -> None:
    """One of two, or both, with what they are at."""
    time.sleep(chance.uniform(0, 6))
    for name in chance.sample(WORKERS, chance.randint(1, 2)):
        town.kill(name)
    time.sleep(chance.uniform(0, 1))


def child_dies(town: Town, chance: random.Random) -> None:
    """What computes is killed, as by the kernel for want of memory; its worker is not."""
    deadline = time.monotonic() + chance.uniform(1, 10)
    while time.monotonic() < deadline:
        for child in town.children():
            time.sleep(chance.uniform(0, 4))
            child.kill()
            return
        time.sleep(0.1)


def workers_are_stopped(town: Town, chance: random.Random) -> None:
    """As at the end of a shift: a worker may end what it is at, or hands it back."""
    time.sleep(chance.uniform(0, 6))
    for name in chance.sample(WORKERS, chance.randint(1, 2)):
        town.stop(name)


def wire_is_cut(town: Town, chance: random.Random) -> None:
    """Nobody reaches the API, or the store."""
    _wire(town, chance).become("cut")
    time.sleep(chance.uniform(0.1, 2))


def wire_is_slow(town: Town, chance: random.Random) -> None:
    """Every piece waits."""
    _wire(town, chance).become("slow")
    time.sleep(chance.uniform(0.5, 2))


def wire_is_deaf(town: Town, chance: random.Random) -> None:
    """Connections are open, and nothing comes through."""
    _wire(town, chance).become("deaf")
    time.sleep(chance.uniform(0.5, 2))


def connections_break(town: Town, chance: random.Random) -> None:
    """Again and again, in the middle of whatever they carry."""
    wire = _wire(town, chance)
    for _ in range(chance.randint(1, 8)):
        wire.hang_up(chance.uniform(0.2, 1))
        time.sleep(chance.uniform(0, 0.3))


def somebody_freezes(town: Town, chance: random.Random) -> None:
    """A worker or a client stands still for longer than a lease, and then goes on as if nothing had been."""
    for person in chance.sample(town.crowd, chance.randint(1, 3)):
        if person.pid is not None:
            town.freeze(person.pid)
    time.sleep(town.settings.lease_s + chance.uniform(0.2, 1))


def api_freezes(town: Town, chance: random.Random) -> None:
    """One stands still, in the middle of a transaction perhaps, and takes connections that it does not answer."""
    town.freeze(town.lives[f"api-{chance.randint(1, 2)}"][0].process.pid)
    time.sleep(chance.uniform(0.5, 2 * town.settings.lease_s))


def daemons_freeze(town: Town, chance: random.Random) -> None:
    """One set stands still, in the middle of a transaction perhaps, while the other goes on."""
    town.freeze(town.lives[f"daemons-{chance.randint(1, 2)}"][0].process.pid)
    time.sleep(chance.uniform(0.5, town.settings.lease_s))


def worker_freezes(town: Town, chance: random.Random) -> None:
    """One stands still for longer than a lease, what it started goes on; then it tells what another has done by now."""
    time.sleep(chance.uniform(0, 6))
    town.freeze(town.lives[chance.choice(WORKERS)][0].process.pid)
    time.sleep(town.settings.lease_s + chance.uniform(1, 3))


def all_of_ours_die(town: Town, chance: random.Random) -> None:
    """A power cut, but for those who keep the data."""
    for name in town.own:
        town.kill(name)
    client_dies(town, chance)


def disk_is_full(town: Town, chance: random.Random) -> None:
    """That of clients, the store or the database; to the last byte, or nearly."""
    town.disks[chance.choice(sorted(town.disks))].fill(chance.choice((0, 1 << 14, 1 << 20)))
    time.sleep(chance.uniform(0.5, 3))


def clocks_differ(town: Town, chance: random.Random) -> None:
    """API, daemons, workers and the database each have a time of their own, by more than a lease."""
    known = [*town.own, *(name for name in ("database",) if name in town.starters)]
    for name in chance.sample(known, chance.randint(1, len(known))):
        town.replace(name, machines.another_time(chance.uniform(-SKEW_S, SKEW_S)))
    town.serve()
    time.sleep(chance.uniform(2, 4))


def older_code_serves(town: Town, chance: random.Random) -> None:
    """As in the middle of an upgrade: the schema and the daemons are new, one API is not, or neither."""
    for number in chance.sample((1, 2), chance.randint(1, 2)):
        town.replace(f"api-{number}", {"PYTHONPATH": str(machines.older_release())})
    town.serve()
    time.sleep(chance.uniform(2, 4))


def host_is_cut_off(town: Town, chance: random.Random) -> None:
    """An API, the store or a worker: packets to and from it vanish, for longer than a lease perhaps."""
    for name in chance.sample(sorted(town.hosts), chance.randint(1, 2)):
        town.hosts[name].cut()
    time.sleep(chance.uniform(0.5, town.settings.lease_s + 3))


def host_is_slow(town: Town, chance: random.Random) -> None:
    """All that goes to it goes through a thin wire."""
    town.hosts[chance.choice(sorted(town.hosts))].slow(chance.choice((200, 1000, 5000)))
    time.sleep(chance.uniform(2, 5))


def two_at_once(town: Town, chance: random.Random) -> None:
    """Two of the others, one right after the other."""
    for fault in chance.sample([fault for fault in faults_of(town) if fault is not two_at_once], 2):
        fault(town, chance)
        town.start()


def _wire(town: Town, chance: random.Random) -> Link:
    return chance.choice([link for link in (town.link, town.store_link) if link is not None])


ANYWHERE: tuple[Fault, ...] = (
    nothing, client_dies, api_dies, apis_die, daemons_die, woken_for_nothing, wire_is_cut, wire_is_slow, wire_is_deaf,
    connections_break, somebody_freezes, api_freezes, daemons_freeze, all_of_ours_die, two_at_once,
)  # fmt: skip
SERVERS: dict[str, tuple[Fault, ...]] = {
    "database": (database_dies,), "store": (store_dies,), "broker": (broker_forgets,),
    "worker-1": (workers_die, child_dies, workers_are_stopped, worker_freezes),
}  # fmt: skip


MEANS: dict[Fault, Callable[[], object]] = {
    clocks_differ: machines.can_shift_time, older_code_serves: machines.older_release, disk_is_full: machines.can_mount,
}  # fmt: skip
"""What takes something of the machine, and the question whether that is here."""


def faults_of(town: Town) -> list[Fault]:
    """What can go wrong in a town: what it does not have cannot die."""
    servers = [fault for name, some in SERVERS.items() if name in town.starters for fault in some]
    wires = (host_is_cut_off, host_is_slow) if town.hosts else ()
    return [*ANYWHERE, *servers, *wires, *(fault for fault in MEANS if why_not(fault) is None)]


def why_not(fault: Fault) -> str | None:
    """Why a fault cannot be had on this machine, in words."""
    try:
        MEANS.get(fault, lambda: None)()
    except machines.NotHere as reason:
        return str(reason)
    return None
