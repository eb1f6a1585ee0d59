"""Commands about access and health: login, whoami, doctor, tokens; and completion."""

import platform
import shutil
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from registry.core.errors import LoractlError, NotFound, ScopeMissing, Unauthenticated, Unavailable
from registry.core.names import check_name

from . import config
from .output import Output, ago, command, fields, size, table
from .signin import sign_in, sign_in_elsewhere

if TYPE_CHECKING:
    from registry.client import RegistryClient
    from registry.schemas import Finding, SignIn, WhoAmI

MAX_SKEW_S = 60.0
LITTLE_DISK = 5 << 30


@click.group("token", short_help="Tokens: create, list, rotate, revoke.")
def token() -> None:
    """What people, programs and workers authenticate with."""


@command(
    None,
    'loractl login http://127.0.0.1:8080 --token "$(cat loractl-data/secrets/admin-token)"',
    "loractl login https://registry.example",
    "loractl login https://registry.example --device",
)
@click.argument("url", metavar="URL")
@click.option("--token", "text", metavar="T", help="The token; without it one signs in, or is asked.")
@click.option("--device", is_flag=True, help="Sign in on another machine: this one has no browser.")
def login(out: Output, url: str, text: str | None, device: bool) -> None:
    """Keep a registry's URL and a token for all further commands.

    Where the registry knows an identity provider, a browser opens there; with --device one signs in on any other
    machine, by a code.

    LORACTL_URL and LORACTL_TOKEN go before what is kept.
    """
    from registry.client import RegistryClient

    if device and text is not None:
        raise click.UsageError("--device signs in; a --token is taken as it is. Give one of them.")
    if text is None:
        with RegistryClient(url) as stranger:
            offer = _offer(stranger)
        if device and offer is None:
            raise click.UsageError("this registry knows no identity provider; log in with --token T.")
        way = sign_in_elsewhere if device else sign_in
        text = way(offer, out.say) if offer else click.prompt("Token", hide_input=True, err=True)
    with RegistryClient(url, text.strip()) as client:
        who = client.whoami()
        kept = config.save(config.Login(client.url, text.strip(), ""))
    out.emit({"url": url, "file": str(kept), "who": who}, lambda: click.echo(f"Logged in to {url} as {who.name}."))


def _offer(client: "RegistryClient") -> "SignIn | None":
    """The registry's identity provider; None where it has none, or is too old to say."""
    try:
        return client.sign_in_offer().oidc
    except (NotFound, Unauthenticated, Unavailable):
        return None


@command(None, "loractl whoami", "loractl whoami --json")
def whoami(out: Output) -> None:
    """Show which registry you are logged in to, and as whom."""
    login = config.load()
    with config.connect() as client:
        who = client.whoami()
    out.emit({"url": login.url, "source": login.source, **who.model_dump(mode="json")}, lambda: fields({
        "registry": f"{login.url} (from {login.source})",
        "name": who.name,
        "kind": who.kind,
        "scopes": _scopes(who),
        "expires": ago(who.expires_at) or "never",
    }))  # fmt: skip


def _scopes(who: "WhoAmI") -> str:
    return "; ".join(f"{namespace}: {', '.join(scopes)}" for namespace, scopes in sorted(who.scopes.items()))


@command(None, "loractl doctor", "loractl doctor --json")
def doctor(out: Output) -> None:
    """Look for what is wrong, here and on the registry; exits with 1 when something is."""
    found = [("here", finding) for finding in _here()]
    try:
        with config.connect() as client:
            health = client.health()
            found.append(("registry", _finding("versions", True, f"registry {health.version}, here {_version()}")))
            found += [("registry", finding) for finding in _there(client)]
    except LoractlError as error:
        found.append(("registry", _finding("registry", False, error.message, error.hint)))
    wrong = [finding for _, finding in found if not finding.ok]
    document = [{"where": where, **finding.model_dump()} for where, finding in found]
    out.emit({"ok": not wrong, "findings": document}, lambda: table(
        ["", "where", "check", "detail", "help"],
        (["ok" if f.ok else "WRONG", where, f.check, f.detail, "" if f.ok else f.help] for where, f in found),
    ))  # fmt: skip
    if wrong:
        raise click.exceptions.Exit(1)


def _there(client: "RegistryClient") -> "list[Finding]":
    """What the registry says of itself to admins of everything; others hear that they are none, which is no fault."""
    try:
        return client.doctor().findings
    except ScopeMissing:
        return [_finding("its parts", True, "not looked at: that needs the scope 'admin' everywhere")]


def _here() -> "list[Finding]":
    """What can be said without a registry, and how far its clock is from ours."""
    extras = [name for name, module in (("server", "fastapi"), ("worker", "torch")) if find_spec(module) is not None]
    found = [_finding("loractl", True, f"{_version()}, Python {platform.python_version()}, extras: "
                      f"{', '.join(extras) or 'none'}")]  # fmt: skip
    free = shutil.disk_usage(Path.cwd()).free
    found.append(_finding("disk", free > LITTLE_DISK, f"{size(free)} free here", "Free some space before a pull."))
    try:
        login = config.load()
    except LoractlError as error:
        return [*found, _finding("login", False, error.message, error.hint)]
    found.append(_finding("login", login.token is not None, f"{login.url} (from {login.source})",
                          "Log in: loractl login URL --token TOKEN"))  # fmt: skip
    kept = config.path()
    if kept.exists():
        mode = kept.stat().st_mode & 0o777
        found.append(_finding("login file", not mode & 0o077, f"{kept} has mode {mode:04o}", f"chmod 600 {kept}"))
    if (skew := _skew(login.url)) is not None:
        found.append(_finding("clock", abs(skew) < MAX_SKEW_S, f"{skew:+.0f} s from the registry's",
                              "Set the clock: signed URLs expire by it."))  # fmt: skip
    return found


def _skew(url: str) -> float | None:
    """Seconds that this clock is ahead of the registry's, by its Date header; None when it does not say."""
    import httpx

    try:
        said = httpx.get(f"{url}/health", timeout=5).headers.get("date")
    except httpx.HTTPError:
        return None
    return (datetime.now(UTC) - parsedate_to_datetime(said)).total_seconds() if said else None


def _finding(check: str, ok: bool, detail: str, help: str = "") -> "Finding":
    from registry.schemas import Finding

    return Finding(check=check, ok=ok, detail=detail, help=help)


def _version() -> str:
    return metadata.version("loractl")


# ── tokens ───────────────────────────────────────────────────────────────────


@command(
    token,
    "loractl token create ci --scope read --scope publish --namespace team",
    "loractl token create gpu-1 --worker --queue gpu",
    "loractl token create guest --scope read --namespace '*' --days 7",
)
@click.argument("name", metavar="NAME")
@click.option("--scope", "scopes", multiple=True, type=click.Choice(["read", "publish", "promote", "run", "admin"]))
@click.option("--namespace", "namespaces", multiple=True, help="Where the scopes hold; '*': everywhere.")
@click.option("--worker", is_flag=True, help="A worker's token: it can claim jobs of its queues, and nothing else.")
@click.option("--queue", "queues", multiple=True, help="Queues of a worker; default: cpu.")
@click.option("--days", type=click.FloatRange(0, min_open=True), help="Until it expires; default: never.")
def create(
    out: Output,
    name: str,
    scopes: tuple[str, ...],
    namespaces: tuple[str, ...],
    worker: bool,
    queues: tuple[str, ...],
    days: float | None,
) -> None:
    """Make a token; it is shown this once."""
    from registry.schemas import TokenRequest

    if worker and (scopes or namespaces):
        raise click.UsageError("A worker's token has queues, and no scopes.")
    if not worker and (queues or not scopes or not namespaces):
        raise click.UsageError("Say what it may do, and where: --scope SCOPE --namespace NAMESPACE.")
    request = TokenRequest.model_validate({
        "name": name,
        "kind": "worker" if worker else "user",
        "scopes": {n if n == "*" else check_name(n, "namespace"): list(scopes) for n in namespaces},
        "queues": list(queues) or (["cpu"] if worker else []),
        "expires_in": days * 86400 if days else None,
    })  # fmt: skip
    with config.connect() as client:
        made = client.create_token(request)

    def show() -> None:
        out.say(f"Token {made.id} ({made.name}); it is not shown again:")
        click.echo(made.token)

    out.emit(made, show)


@command(token, "loractl token list", "loractl token list --prefix lora_0123", name="list")
@click.option("--prefix", metavar="TEXT", help="Only tokens whose text begins so.")
def list_tokens(out: Output, prefix: str | None) -> None:
    """List tokens; their secrets are kept nowhere."""
    public = "_".join(prefix.split("_")[:2]) if prefix else None  # a secret goes into no query
    with config.connect() as client:
        found = client.tokens(prefix=public).items
    out.emit(found, lambda: table(
        ["token", "name", "kind", "scopes", "made", "used", "expires", "revoked"],
        ([t.id, t.name, t.kind, _scopes(t), *map(ago, (t.created_at, t.last_used_at, t.expires_at, t.revoked_at))]
         for t in found),
    ))  # fmt: skip


@command(token, "loractl token rotate 0123456789ab", "loractl token rotate 0123456789ab --grace 24")
@click.argument("token_id", metavar="ID")
@click.option("--grace", type=click.FloatRange(0, 720), default=1.0, show_default=True, metavar="HOURS",
              help="How long the old secret stays good; 0: not at all.")  # fmt: skip
def rotate(out: Output, token_id: str, grace: float) -> None:
    """Give a token a new secret; it is shown this once."""
    from registry.schemas import RotateRequest

    with config.connect() as client:
        made = client.rotate_token(token_id, RotateRequest(grace_s=grace * 3600))

    def show() -> None:
        out.say(f"Token {made.id} ({made.name}); the old secret is good for {grace:g} h. It is not shown again:")
        click.echo(made.token)

    out.emit(made, show)


@command(token, "loractl token revoke 0123456789ab")
@click.argument("token_id", metavar="ID")
def revoke(out: Output, token_id: str) -> None:
    """End a token's life at once."""
    with config.connect() as client:
        client.revoke_token(token_id)
    out.emit({"revoked": token_id}, lambda: click.echo(f"revoked {token_id}"))


# ── completion ───────────────────────────────────────────────────────────────


@command(
    None,
    'eval "$(loractl completion bash)"',
    "loractl completion zsh > ~/.zfunc/_loractl",
    "loractl completion fish > ~/.config/fish/completions/loractl.fish",
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(out: Output, shell: str) -> None:
    """Print the completion script of a shell."""
    from click.shell_completion import get_completion_class

    from .main import cli

    found = get_completion_class(shell)
    assert found is not None, "click completes bash, zsh and fish"
    script = found(cli, {}, "loractl", "_LORACTL_COMPLETE").source()
    out.emit({"shell": shell, "script": script}, lambda: click.echo(script))


COMMANDS: dict[str, click.Command] = {
    "login": login, "whoami": whoami, "doctor": doctor, "token": token, "completion": completion,
}  # fmt: skip
