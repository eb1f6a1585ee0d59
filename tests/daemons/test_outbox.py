"""Webhooks over a real socket: signed, in order, again until taken, and never to an address inside."""

import hashlib
import hmac
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from cryptography.fernet import Fernet
from sqlmodel import select

from registry.broker import Broker
from registry.core.errors import AddressRefused, BadRequest, ScopeMissing, WebhookNotFound
from registry.daemons import gc, outbox
from registry.db.models import AuditRow, Webhook
from registry.parts import Parts
from registry.schemas import WebhookRequest
from registry.services import audit, webhooks
from registry.services.seals import Seals
from registry.services.tokens import Caller
from tests.world import ADMIN, World, caller

NO_PLACES = ("http://[x/", "http://[::1", "http://x:99999/", "http://x:0/", "http://a..b/", "http://" + "x" * 64 + "/")


@dataclass
class Receiver:
    """What an address was told, and what it answers."""

    url: str = ""
    status: int = 200
    heard: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    def told(self) -> list[str]:
        return [json.loads(body)["subject"] for _, body in self.heard]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    found = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            found.heard.append(({name.lower(): value for name, value in self.headers.items()}, body))
            self.send_response(found.status)
            if found.status == 302:
                self.send_header("location", found.url + "/elsewhere")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_address[1]}/hook"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


def parts_of(world: World, *, private: bool = True, keys: tuple[str, ...] = ()) -> Parts:
    world = world.with_settings(webhook_private=private, seal_keys=keys)
    return Parts(world.settings, world.database, world.store, Broker("memory://"), world.clock)


def add(world: World, url: str, who: Caller = ADMIN, **more: Any) -> tuple[Webhook, str]:
    with world.database.write() as session:
        return webhooks.add(session, who, WebhookRequest(url=url, **more), world.now, private=True)


def change(world: World, subject: str, event: str = "alias.moved", namespace: str | None = "team") -> None:
    with world.database.write() as session:
        audit.record(
            session, event, subject, actor="ada", now=world.now, namespace=namespace, after={"version": 1}
        )
    with world.database.write() as session:
        audit.chain(session)


def deliver(world: World, *, private: bool = True) -> int:
    count = 0
    while outbox.step(parts_of(world, private=private)):
        count += 1
    return count


def test_changes_are_told_in_their_order_signed_and_once(world: World, receiver: Receiver) -> None:
    change(world, "before it was added")
    _, secret = add(world, receiver.url)
    for number in range(3):
        change(world, f"s{number}")
    deliver(world)
    assert receiver.told()[1:] == ["s0", "s1", "s2"]  # the first tells of itself
    for headers, body in receiver.heard:
        at, _, mac = headers["x-loractl-signature"].removeprefix("t=").partition(",v1=")
        assert hmac.new(secret.encode(), f"{at}.".encode() + body, hashlib.sha256).hexdigest() == mac
        assert headers["x-loractl-seq"] == str(json.loads(body)["seq"])
    assert json.loads(receiver.heard[1][1])["after"] == {"version": 1}
    assert deliver(world) == 0


def test_only_what_it_asked_for_and_may_know_is_told(world: World, receiver: Receiver) -> None:
    boss = caller("boss", team=["admin"])
    hook, _ = add(world, receiver.url, boss, namespace="team", events=["alias.", "job.failed"])
    for subject, event, namespace in (
        ("yes", "alias.moved", "team"), ("other", "alias.moved", "other"), ("none", "alias.moved", None),
        ("kind", "job.queued", "team"), ("also", "job.failed", "team"),
    ):  # fmt: skip
        change(world, subject, event, namespace)
    with world.database.write() as session:
        webhooks.test(session, boss, hook.id, world.now)
    change(world, "last")
    deliver(world)
    assert receiver.told() == ["yes", "also", hook.id, "last"]


def test_an_address_that_fails_is_asked_again_after_growing_pauses_and_loses_nothing(
    world: World, receiver: Receiver
) -> None:
    add(world, receiver.url, events=["alias."])
    for number in range(2):
        change(world, f"s{number}")
    receiver.status = 500
    pauses = []
    for _ in range(4):
        assert deliver(world) == 1
        row = world.one(select(Webhook))
        pauses.append((row.due_at - world.now).total_seconds())
        world.now = row.due_at
    assert pauses == [1, 2, 4, 8]
    assert world.one(select(Webhook)).last_error == "HTTP 500"
    receiver.status = 200
    deliver(world)
    assert receiver.told() == [*["s0"] * 5, "s1"]
    assert world.one(select(Webhook)).last_error is None


def test_what_is_refused_too_often_is_left_out_on_record(
    world: World, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "ATTEMPTS", 2)
    add(world, receiver.url, events=["alias."])
    change(world, "poison")
    receiver.status = 400
    deliver(world)
    world.later(seconds=2)
    deliver(world)
    receiver.status = 200
    change(world, "next")
    deliver(world)
    assert receiver.told() == ["poison", "poison", "next"]
    assert [row.event for row in world.all(select(AuditRow).where(AuditRow.event == "webhook.gave-up"))]


def test_whoever_dies_while_telling_is_followed_by_another(world: World, receiver: Receiver) -> None:
    add(world, receiver.url, events=["alias."])
    change(world, "s0")
    with world.database.write() as session:
        assert webhooks.claim(session, world.now) is not None  # and then it died
    assert deliver(world) == 0
    world.later(seconds=61)
    deliver(world)
    assert receiver.told() == ["s0"]


def test_a_deliverer_that_lost_its_lease_moves_nothing(world: World, receiver: Receiver) -> None:
    add(world, receiver.url, events=["alias."])
    change(world, "s0")
    with world.database.write() as session:
        slow = webhooks.claim(session, world.now)
    assert slow is not None
    world.later(seconds=61)
    deliver(world)
    cursor = world.one(select(Webhook)).cursor
    with world.database.write() as session:
        assert not webhooks.told(session, slow, 0, world.now)
    assert world.one(select(Webhook)).cursor == cursor


def test_deliverers_at_once_tell_each_change_once(world: World, receiver: Receiver) -> None:
    add(world, receiver.url, events=["alias."])
    for number in range(6):
        change(world, f"s{number}")
    crowd = [threading.Thread(target=deliver, args=(world,)) for _ in range(3)]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()
    deliver(world)
    assert receiver.told() == [f"s{number}" for number in range(6)]


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "10.1.2.3", "192.168.0.1", "169.254.169.254", "[::1]", "[fd00::1]",
     "[::ffff:127.0.0.1]", "100.64.0.1", "224.0.0.1", "2130706433", "0x7f000001"],
)  # fmt: skip
def test_addresses_inside_are_refused_unless_allowed(host: str) -> None:
    with pytest.raises(AddressRefused):
        outbox.reachable(f"http://{host}:8080/x", private=False)
    assert outbox.reachable(f"http://{host}:8080/x", private=True)


def test_nothing_is_sent_inside_and_the_list_says_why(embedded: World, receiver: Receiver) -> None:
    add(embedded, receiver.url, events=["alias."])
    change(embedded, "s0")
    deliver(embedded, private=False)
    assert receiver.heard == []
    assert "not an address on the internet" in (embedded.one(select(Webhook)).last_error or "")


def test_a_name_is_asked_for_once_and_the_connection_goes_to_the_address_that_was_checked(
    embedded: World, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, resolve, asked = receiver.url.rpartition(":")[2].partition("/")[0], socket.getaddrinfo, list[str]()

    def rebinding(host: str, *more: Any, **named: Any) -> Any:
        if host != "hook.example":
            return resolve(host, *more, **named)
        asked.append(host)
        assert len(asked) == 1, "asked again, it might mean another address"
        return resolve("127.0.0.1", *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    add(embedded, f"http://hook.example:{port}/hook", events=["alias."])
    change(embedded, "s0")
    deliver(embedded)
    assert asked == ["hook.example"]
    assert [headers["host"] for headers, _ in receiver.heard] == [f"hook.example:{port}"]


def test_a_redirect_is_not_followed(embedded: World, receiver: Receiver) -> None:
    receiver.status = 302
    add(embedded, receiver.url, events=["alias."])
    change(embedded, "s0")
    deliver(embedded)
    assert len(receiver.heard) == 1
    assert embedded.one(select(Webhook)).last_error == "HTTP 302"


@pytest.mark.parametrize("url", NO_PLACES)
def test_an_address_that_no_client_can_use_is_told_as_an_error(embedded: World, receiver: Receiver, url: str) -> None:
    hook, _ = add(embedded, receiver.url)
    with embedded.database.write() as session:  # as one that was taken before the door knew
        found = session.get(Webhook, hook.id)
        assert found is not None
        found.url = url
        session.add(found)
    change(embedded, "a")
    assert outbox.step(parts_of(embedded))
    with embedded.database.read() as session:
        assert (session.exec(select(Webhook.attempts)).one(), receiver.heard) == (1, [])


def test_webhooks_are_for_admins_and_others_see_none(embedded: World) -> None:
    hook, _ = add(embedded, "https://x.example", namespace="team")
    with pytest.raises(ScopeMissing):
        add(embedded, "https://x.example", caller("x", team=["admin"]))
    with pytest.raises(ScopeMissing):
        add(embedded, "https://x.example", caller("x", team=["publish"]), namespace="team")
    for url in ("ftp://x.example", "https://", "https://user:word@x.example/", "x.example", *NO_PLACES):
        with pytest.raises(BadRequest):
            add(embedded, url)
    stranger = caller("x", other=["admin"])
    with embedded.database.read() as session:
        assert webhooks.listed(session, stranger) == []
    with pytest.raises(WebhookNotFound), embedded.database.write() as session:
        webhooks.remove(session, stranger, hook.id, embedded.now)


# ── sealed secrets ───────────────────────────────────────────────────────────


def test_with_a_key_the_database_has_no_secret_and_the_receiver_sees_no_difference(
    world: World, receiver: Receiver
) -> None:
    key = Fernet.generate_key().decode()
    with world.database.write() as session:
        request = WebhookRequest(url=receiver.url)
        hook, secret = webhooks.add(session, ADMIN, request, world.now, Seals([key]), private=True)
    assert (hook.secret, secret in str(hook.sealed)) == ("", False)
    change(world, "one")
    outbox.step(parts_of(world, keys=(key,)))
    [(headers, body)] = receiver.heard
    assert headers["x-loractl-signature"] == webhooks.signature(secret, body, world.now)


def test_a_key_is_replaced_without_a_gap_and_what_was_in_clear_is_sealed(world: World, receiver: Receiver) -> None:
    old, new = (Fernet.generate_key().decode() for _ in range(2))
    _, first = add(world, receiver.url)  # before there was a key
    for keys in ((old,), (new, old), (new,)):
        gc.step(parts_of(world, keys=keys))
        change(world, keys[0])
        outbox.step(parts_of(world, keys=keys))
        with world.database.read() as session:
            row = session.exec(select(Webhook)).one()
            assert row.secret == ""
            assert Seals([keys[0]]).open(str(row.sealed)) == (first, True)
    assert [headers["x-loractl-signature"] for headers, _ in receiver.heard] == [
        webhooks.signature(first, body, world.now) for _, body in receiver.heard
    ]
    assert len(receiver.heard) == 3
    with world.database.write() as session:
        assert webhooks.reseal(session, Seals([new])) == 0


def test_a_webhook_whose_key_is_missing_waits_and_loses_nothing(world: World, receiver: Receiver) -> None:
    key, other = (Fernet.generate_key().decode() for _ in range(2))
    add(world, receiver.url)
    gc.step(parts_of(world, keys=(key,)))
    change(world, "one")
    for _ in range(webhooks.ATTEMPTS + 1):
        outbox.step(parts_of(world, keys=(other,)))
        world.later(hours=1)
    gc.step(parts_of(world, keys=(other,)))  # what it cannot open it leaves as it is
    assert receiver.heard == []
    with world.database.read() as session:
        row = session.exec(select(Webhook)).one()
        assert (row.attempts, "LORACTL_SEAL_KEYS" in str(row.last_error)) == (0, True)
    while outbox.step(parts_of(world, keys=(other, key))):
        pass
    assert receiver.told() == [row.id, "one"]  # that it was added, and the change


@pytest.mark.parametrize(("answer", "then", "told"), [
    (b"HTTP/1.1 200 OK\r\ncontent-length: 100000000000\r\n\r\n", b"x" * 65536, None),
    (b"HTTP/1.1 500 No\r\ncontent-length: 100000000000\r\n\r\n", b"x" * 65536, "HTTP 500"),
    (b"HTTP/1.1 200 OK\r\n", b"x-more: x\r\n", "no answer within 1 s"),
], ids=["a body without end", "likewise refused", "headers without end"])  # fmt: skip
def test_a_receiver_that_never_comes_to_an_end_holds_nobody_up(
    embedded: World, answer: bytes, then: bytes, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "TIMEOUT_S", 1.0)
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip() -> None:
            taken, _ = server.accept()
            with taken, suppress(OSError):
                taken.recv(65536)
                taken.sendall(answer)
                while not done.wait(0.3):
                    taken.sendall(then)

        thread = threading.Thread(target=drip)
        thread.start()
        parts = parts_of(embedded)
        hook, _ = add(embedded, f"http://127.0.0.1:{server.getsockname()[1]}/")
        began = time.monotonic()
        row = AuditRow(event="alias.moved", subject="team/bot", namespace="team", seq=1, at=embedded.now, actor="a")
        try:
            assert outbox.send(hook, "secret", row, parts) == told
        finally:
            done.set()
            thread.join()
    assert time.monotonic() - began < 20  # not for ever
