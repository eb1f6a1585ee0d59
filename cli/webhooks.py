"""Commands of webhooks: add, list, rm, test."""

import click

from . import config
from .output import Output, ago, command, table


@click.group("webhook", short_help="Webhooks: add, list, rm, test.")
def webhook() -> None:
    """Addresses that are told what changes: signed, in order, again until they answer."""


@command(
    webhook,
    "loractl webhook add https://ci.example/hook --namespace team --event alias. --event adapter.version",
    "loractl webhook add https://audit.example/in",
)
@click.argument("url", metavar="URL")
@click.option("--namespace", help="Only what changes there; without it everything, for admins of everything.")
@click.option("--event", "events", multiple=True, help="Only this kind, or kinds that begin so; default: all.")
def add(out: Output, url: str, namespace: str | None, events: tuple[str, ...]) -> None:
    """Tell an address what changes from now on; the secret that signs is shown this once."""
    from registry.schemas import WebhookRequest

    with config.connect() as client:
        made = client.add_webhook(WebhookRequest(url=url, namespace=namespace, events=list(events)))

    def show() -> None:
        out.say(f"Webhook {made.id}; its secret is not shown again:")
        click.echo(made.secret)

    out.emit(made, show)


@command(webhook, "loractl webhook list", name="list")
def list_webhooks(out: Output) -> None:
    """List webhooks, and how they fare."""
    with config.connect() as client:
        found = client.webhooks().items
    out.emit(found, lambda: table(
        ["webhook", "address", "namespace", "events", "told up to", "failures", "next", "last error"],
        ([w.id, w.url, w.namespace or "all", ", ".join(w.events) or "all", w.cursor, w.attempts,
          ago(w.due_at) if w.attempts else "", w.last_error] for w in found),
        empty="No webhooks.",
    ))  # fmt: skip


@command(webhook, "loractl webhook rm w0123456789ab", name="rm")
@click.argument("webhook_id", metavar="ID")
def remove(out: Output, webhook_id: str) -> None:
    """Tell it nothing more."""
    with config.connect() as client:
        client.remove_webhook(webhook_id)
    out.emit({"removed": webhook_id}, lambda: click.echo(f"removed {webhook_id}"))


@command(webhook, "loractl webhook test w0123456789ab")
@click.argument("webhook_id", metavar="ID")
def test(out: Output, webhook_id: str) -> None:
    """Let it be told something now; loractl webhook list says how that went."""
    with config.connect() as client:
        info = client.test_webhook(webhook_id)
    out.emit(info, lambda: click.echo(f"{info.url} is told within seconds; see: loractl webhook list"))


COMMANDS: dict[str, click.Command] = {"webhook": webhook}
