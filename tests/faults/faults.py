"""What goes wrong: each a verb on a town, done in the middle of everything. `Town.heal` comes after it."""

import random
import time
from collections.abc import Callable

from registry.parts import Parts
from tests.faults.town import LEASE_S, Town
from tests.link import Link

Fault = Callable[[Town, random.Random], None]


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
        parts.broker.wake_for("cpu", chance.randint(1, 3))
    parts.close()


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
    time.sleep(LEASE_S + chance.uniform(0.2, 1))


def daemons_freeze(town: Town, chance: random.Random) -> None:
    """One set stands still, in the middle of a transaction perhaps, while the other goes on."""
    town.freeze(town.lives[f"daemons-{chance.randint(1, 2)}"][0].process.pid)
    time.sleep(chance.uniform(0.5, LEASE_S))


def all_of_ours_die(town: Town, chance: random.Random) -> None:
    """A power cut, but for those who keep the data."""
    for name in town.own:
        town.kill(name)
    client_dies(town, chance)


def two_at_once(town: Town, chance: random.Random) -> None:
    """Two of the others, one right after the other."""
    for fault in chance.sample([fault for fault in faults_of(town) if fault is not two_at_once], 2):
        fault(town, chance)
        for name, start in town.starters.items():
            if name not in town.lives:
                town.lives[name] = start()


def _wire(town: Town, chance: random.Random) -> Link:
    return chance.choice([link for link in (town.link, town.store_link) if link is not None])


ANYWHERE: tuple[Fault, ...] = (
    nothing, client_dies, api_dies, apis_die, daemons_die, woken_for_nothing, wire_is_cut, wire_is_slow, wire_is_deaf,
    connections_break, somebody_freezes, daemons_freeze, all_of_ours_die, two_at_once,
)  # fmt: skip
SERVERS: dict[str, Fault] = {"database": database_dies, "store": store_dies, "broker": broker_forgets}


def faults_of(town: Town) -> list[Fault]:
    """What can go wrong in a town: what it does not have cannot die."""
    return [*ANYWHERE, *(fault for name, fault in SERVERS.items() if name in town.starters)]
