"""Commands about base upgrades and schedules."""

import csv
import json
import sys
import time
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from registry.core.errors import NoCampaigns, PathUnusable
from registry.core.names import SeriesName, check_name

from . import bases, config
from .output import Output, ago, command, fields, markdown, number, short, table
from .parameters import FILE
from .work import load_recipe

if TYPE_CHECKING:
    from registry.client import RegistryClient
    from registry.schemas import CampaignInfo, CampaignItemInfo, DecisionInfo, UpgradeRequest

WHEN = click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y-%m-%d %H:%M", "%Y-%m-%dT%H:%M:%S%z"])
FINAL = {"finished", "aborted"}
_ID = click.argument("campaign", metavar="ID")
POLL_S = 1.0


@click.group("upgrade", short_help="Base upgrades: plan, start, status, approve, label, abort, report.")
def upgrade() -> None:
    """Carry every adapter of a line to new base weights, each as far as its gate allows."""


@click.group("schedule", short_help="What happens by itself: add, list, rm.")
def schedule() -> None:
    """Rows that start work by themselves: on a cron, on a base upgrade, on new data."""


# ── upgrades ─────────────────────────────────────────────────────────────────


def upgrade_options(function: Any) -> Any:
    """What plan and start share."""
    for option in (
        click.option("--queue", default="cpu", show_default=True, help="Which workers do it."),
        click.option("--namespace", "namespaces", multiple=True, help="Only adapters of this namespace."),
        click.option("--from", "old", metavar="BASE", help="The old weights; default: the revision before."),
    ):
        function = option(function)
    return function


@command(upgrade, "loractl upgrade plan llama --to llama@r2", "loractl upgrade plan llama --to llama@r2 --json")
@click.argument("line", metavar="LINE")
@click.option("--to", "new", required=True, metavar="BASE", help="The new weights.")
@upgrade_options
def plan(out: Output, line: str, new: str, old: str | None, namespaces: tuple[str, ...], queue: str) -> None:
    """Show what an upgrade would do with each adapter; nothing is changed."""
    with config.connect() as client:
        info = client.plan_upgrade(_request(out, line, new, old, namespaces, queue))
    out.emit(info, lambda: _plan(info))


@command(
    upgrade,
    "loractl upgrade start llama --to llama@r2",
    "loractl upgrade start c0123 --no-wait",
)
@click.argument("what", metavar="LINE|ID")
@click.option("--to", "new", metavar="BASE", help="The new weights; without it, the ID of a planned campaign.")
@upgrade_options
@click.option("--parallel", type=click.IntRange(1), metavar="N", help="Adapters worked on at once; default: all.")
@click.option("--budget", type=click.FloatRange(0, min_open=True), metavar="SECONDS",
              help="Device seconds in all; once spent, no further tier is begun.")
@click.option("--deadline", type=WHEN, metavar="TIME", help="What is not final by then (local time) is frozen.")
@click.option("--no-wait", is_flag=True, help="Give the campaign's id, and leave.")
def start(
    out: Output, what: str, new: str | None, old: str | None, namespaces: tuple[str, ...], queue: str,
    parallel: int | None, budget: float | None, deadline: datetime | None, no_wait: bool,
) -> None:  # fmt: skip
    """Start an upgrade, and wait for it."""
    bounds = {
        "parallel": parallel, "budget_seconds": budget, "deadline": deadline.astimezone() if deadline else None,
    }  # fmt: skip
    with config.connect() as client:
        if new is not None:
            request = _request(out, what, new, old, namespaces, queue)
            what = client.create_upgrade(request.model_copy(update=bounds)).id
        elif old or namespaces or any(bounds.values()):
            raise click.UsageError("--from, --namespace, --parallel, --budget and --deadline need --to BASE.")
        info = client.start_upgrade(what)
        if no_wait:
            out.emit(info, lambda: click.echo(info.id))
            return
        info = _follow(out, client, info)
    out.emit(info, lambda: _status(info))


@command(upgrade, "loractl upgrade status", "loractl upgrade status c0123", "loractl upgrade status c0123 --watch")
@click.argument("campaign", metavar="ID", required=False)
@click.option("--watch", is_flag=True, help="Wait until it has ended.")
def status(out: Output, campaign: str | None, watch: bool) -> None:
    """Show an upgrade, or all of them."""
    with config.connect() as client:
        if campaign is None and not watch:
            found = client.upgrades().items
            out.emit(found, lambda: _campaigns(found))
            return
        info = client.upgrade(campaign) if campaign else _newest(client)
        if watch:
            info = _follow(out, client, info)
    out.emit(info, lambda: _status(info))


@command(
    upgrade,
    "loractl upgrade approve c0123 team/bot",
    "loractl upgrade approve c0123 team/bot --alias prod",
    "loractl upgrade approve c0123 team/bot --decline",
)
@_ID
@click.argument("name", metavar="ADAPTER")
@click.option("--alias", "alias_name", default="prod", show_default=True, help="The alias that waits.")
@click.option("--decline", is_flag=True, help="Say no: the alias stays on the old base.")
def approve(out: Output, campaign: str, name: str, alias_name: str, decline: bool) -> None:
    """Promote an adapter that passed its gate and whose policy asks first, or decline it."""
    from registry.schemas import ApproveRequest

    with config.connect() as client:
        series = str(SeriesName.parse(name))
        info = client.approve(campaign, ApproveRequest(adapter=series, alias=alias_name, approved=not decline))
    out.emit(info, lambda: _status(info))


@command(upgrade, "loractl upgrade disagreements c0123 team/bot -o differ.jsonl")
@_ID
@click.argument("name", metavar="ADAPTER")
@click.option("--alias", "alias_name", default="prod", show_default=True, help="The alias that waits.")
@click.option("-o", "--out", "path", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
              help="Where to; default: print it.")
def disagreements(out: Output, campaign: str, name: str, alias_name: str, path: Path | None) -> None:
    """Fetch the pool's inputs on which an adapter's candidate and what serves differ, to be labelled.

    Each line has the input, the answers by letter (nothing says whose they are), and 'right' to be filled in: the
    letters of all right answers, such as "a" or "a b", or "none", or "all".
    """
    from .report import whole

    if path is not None and path.exists():
        raise PathUnusable(path=str(path), reason="it is there already, and may hold labels: name another file")
    with config.connect() as client:
        info = client.disagreements(campaign, str(SeriesName.parse(name)), alias_name)
    if path is None:
        out.emit(info, lambda: click.echo(info.lines, nl=False))
        return
    whole(path, lambda part: part.write_text(info.lines, encoding="utf-8"))
    told = f"{info.differ} of {info.n} differ. Fill in 'right', then: loractl upgrade label {campaign} {name} {path}"
    out.emit({"written": str(path), "differ": info.differ, "n": info.n}, lambda: click.echo(told))


@command(upgrade, "loractl upgrade label c0123 team/bot differ.jsonl")
@_ID
@click.argument("name", metavar="ADAPTER")
@click.argument("path", metavar="FILE", type=FILE)
@click.option("--alias", "alias_name", default="prod", show_default=True, help="The alias that waits.")
def label(out: Output, campaign: str, name: str, path: Path, alias_name: str) -> None:
    """Give the labels of all differing answers; the gate then decides on all inputs of the pool, once."""
    from registry.schemas import LabelsRequest

    series, lines = str(SeriesName.parse(name)), _text(path)
    with config.connect() as client:
        info = client.label(campaign, LabelsRequest(adapter=series, alias=alias_name, lines=lines))
    out.emit(info, lambda: _status(info))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PathUnusable(path=str(path), reason=f"it is no UTF-8 text: {error.reason}") from error


@command(upgrade, "loractl upgrade pause c0123", "loractl upgrade pause c0123 --now")
@_ID
@click.option("--now", "running", is_flag=True, help="Stop running jobs too; they go on from their checkpoints.")
def pause(out: Output, campaign: str, running: bool) -> None:
    """Let nothing further begin; jobs that run go on to their end."""
    with config.connect() as client:
        info = client.pause_upgrade(campaign, running=running)
    out.emit(info, lambda: _status(info))


@command(upgrade, "loractl upgrade resume c0123")
@_ID
def resume(out: Output, campaign: str) -> None:
    """Go on with a paused upgrade."""
    with config.connect() as client:
        info = client.resume_upgrade(campaign)
    out.emit(info, lambda: _status(info))


@command(
    upgrade,
    "loractl upgrade rollback c0123 -m 'wrong answers in production'",
    "loractl upgrade rollback c0123 --adapter team/bot",
)
@_ID
@click.option("--adapter", metavar="NAME", help="Only this one; default: all that the upgrade promoted.")
@click.option("--alias", "alias_name", default="prod", show_default=True, help="With --adapter: its alias.")
@click.option("--reason", "-m", default="", help="Why, for the log.")
def rollback(out: Output, campaign: str, adapter: str | None, alias_name: str, reason: str) -> None:
    """Take promotions back: aliases on the new base go, the old base keeps serving. One that runs is ended."""
    from registry.schemas import UndoRequest

    series = str(SeriesName.parse(adapter)) if adapter else None
    with config.connect() as client:
        info = client.roll_back_upgrade(campaign, UndoRequest(adapter=series, alias=alias_name, reason=reason))
    out.emit(info, lambda: _status(info))


@command(upgrade, "loractl upgrade abort c0123")
@_ID
def abort(out: Output, campaign: str) -> None:
    """End an upgrade; what was promoted stays, the rest stays on the old base."""
    with config.connect() as client:
        info = client.abort_upgrade(campaign)
    out.emit(info, lambda: _status(info))


@command(
    upgrade,
    "loractl upgrade report",
    "loractl upgrade report c0123 > report.md",
    "loractl upgrade report c0123 --out report",
)
@click.argument("campaign", metavar="ID", required=False)
@click.option("--out", "folder", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
              help="Write it here, as Markdown and JSON, with plots as SVG and PNG.")
def report(out: Output, campaign: str | None, folder: Path | None) -> None:
    """Print the outcome of an upgrade (the newest by default) as Markdown."""
    from .report import write

    with config.connect() as client:
        info = client.upgrade(campaign) if campaign else _newest(client)
    if folder is None:
        out.emit(info, lambda: click.echo(report_text(info)))
        return
    written = write(info, report_text(info), folder)
    out.emit({"written": written}, lambda: click.echo("\n".join(map(str, written))))


@command(
    upgrade,
    "loractl upgrade ledger c0123",
    "loractl upgrade ledger --adapter team/bot",
    "loractl upgrade ledger --csv > ledger.csv",
)
@click.argument("campaign", metavar="ID", required=False)
@click.option("--line", help="Only upgrades of this line.")
@click.option("--adapter", metavar="NAME", help="Only this adapter.")
@click.option("--csv", "as_csv", is_flag=True, help="Comma-separated, the facts as JSON in the last column.")
def ledger(out: Output, campaign: str | None, line: str | None, adapter: str | None, as_csv: bool) -> None:
    """Print every decision of upgrades: signals, tiers tried, verdicts, costs, outcomes."""
    from registry.client import every

    with config.connect() as client:
        found = list(every(
            lambda cursor: client.decisions(campaign=campaign, line=line, adapter=adapter, cursor=cursor)
        ))  # fmt: skip
    out.emit(found, lambda: _csv(found) if as_csv else _ledger(found))


_DECIDED = ["at", "campaign", "adapter", "alias", "kind", "tier", "actor"]


def _csv(found: Iterable["DecisionInfo"]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([*_DECIDED, "data"])
    for row in found:
        facts = row.model_dump(mode="json")
        writer.writerow([*(facts[name] for name in _DECIDED), json.dumps(facts["data"], ensure_ascii=False)])


def _ledger(found: Iterable["DecisionInfo"]) -> None:
    table(
        ["at", "upgrade", "adapter", "decision", "tier", "by", "because"],
        (
            [f"{row.at:%Y-%m-%d %H:%M:%S}", row.campaign, row.adapter, row.kind, row.tier, row.actor, _because(row)]
            for row in found
        ),
        empty="No decisions. They are written while an upgrade runs: loractl upgrade start LINE --to BASE",
    )


def _because(row: "DecisionInfo") -> str:
    data = row.data
    match row.kind:
        case "route":
            told = _signals(data["signals"])
            return f"{data['fit']}{f' ({told})' if told else ''}: {' → '.join(data['tiers']) or 'freeze'}"
        case "verdict":
            return f"{data['steps']} steps, {data['seconds']:.0f} s: {data['verdict']['reason']}"
        case "outcome" | "rolled-back":
            return f"{data['state']}: {data['reason']}"
        case "lost":
            return str(data["error"])
        case "asked":
            return f"{data['differ']} of {data['n']} inputs of {data['pool']} differ"
        case "labelled":
            return f"{data['differ']} inputs of {data['pool']}"
        case "pool":
            return f"{data['differ']} of {data['n']} differ: {data['verdict']['reason']}"
        case "replanned":
            return f"{short(data['to'])} serves in place of {short(data['from'])}"
        case "paused":
            return "running jobs stopped too" if data["running"] else ""
    return str(data.get("reason", ""))


def _signals(signals: dict[str, Any]) -> str:
    known = {name: value for name, value in signals.items() if value is not None and value != "unknown"}
    return ", ".join(
        f"{name} {number(value) if isinstance(value, int | float) else value}" for name, value in known.items()
    )


def _request(
    out: Output, line: str, new: str, old: str | None, namespaces: tuple[str, ...], queue: str
) -> "UpgradeRequest":
    from registry.schemas import UpgradeRequest

    with out.progress() as bar:
        to = bases.wanted(new, bar).ref
        before = bases.wanted(old, bar).ref if old else None
    return UpgradeRequest(
        line=check_name(line, "line"), to=to, old=before, namespaces=list(namespaces) or None, queue=queue
    )


def _newest(client: "RegistryClient") -> "CampaignInfo":
    found = client.upgrades(limit=1).items
    if not found:
        raise NoCampaigns
    return client.upgrade(found[0].id)


def _follow(out: Output, client: "RegistryClient", info: "CampaignInfo") -> "CampaignInfo":
    with out.progress() as bar, out.if_interrupted(
        f"Upgrade {info.id} goes on without you. See: loractl upgrade status {info.id};"
        f" end it: loractl upgrade abort {info.id}"
    ):
        waiting = False
        while info.state not in FINAL:
            open_items = [item for item in info.items if item.state in ("planned", "running")]
            doing = ", ".join(f"{item.adapter}: {item.tier or item.state}" for item in open_items[:3])
            bar.count("upgrade", len(info.items) - len(open_items), len(info.items), doing)
            if info.state == "paused":
                out.say(f"It is paused. Go on: loractl upgrade resume {info.id}")
                return info
            if not open_items and any(item.state == "waiting" for item in info.items):
                waiting = True
                break
            time.sleep(POLL_S)
            info = client.upgrade(info.id)
    asked = [item for item in info.items if item.state == "waiting" and not (item.pool and item.pool.waits)]
    if waiting and asked:
        out.say(f"Adapters wait for approval: loractl upgrade approve {info.id} ADAPTER (--decline says no)")
    for item in info.items:
        if waiting and item.pool and item.pool.waits:
            out.say(_wanted(info, item))
    return info


def _campaigns(found: Iterable["CampaignInfo"]) -> None:
    table(
        ["upgrade", "line", "from", "to", "state", "adapters", "started"],
        ([c.id, c.line, c.old_ref, c.new_ref, c.state, _counts(c), ago(c.started_at or c.created_at)] for c in found),
        empty="No upgrades. Plan one: loractl upgrade plan LINE --to BASE",
    )


def _counts(info: "CampaignInfo") -> str:
    counts: dict[str, int] = {}
    for item in info.items:
        counts[item.state] = counts.get(item.state, 0) + 1
    return ", ".join(f"{count} {state}" for state, count in sorted(counts.items())) or "none"


def _heading(info: "CampaignInfo", *, planned: bool = False) -> None:
    """``planned``: nobody has stored it, so its id means nothing."""
    fields({
        "upgrade": "" if planned else info.id,
        "line": f"{info.line}: {info.old_ref} → {info.new_ref}",
        "state": "" if planned else info.state + (f" ({info.reason})" if info.reason else ""),
        "adapters": _counts(info),
        "at once": info.parallel,
        "device time": _spent(info),
        "deadline": f"{info.deadline:%Y-%m-%d %H:%M} UTC" if info.deadline else "",
        "took": _took(info),
    })  # fmt: skip
    click.echo()


def _spent(info: "CampaignInfo") -> str:
    of = f" of {info.budget_seconds:.0f}" if info.budget_seconds else ""
    return f"{info.spent_seconds:.0f}{of} s" if info.spent_seconds or of else ""


def _took(info: "CampaignInfo") -> str:
    if info.started_at is None or info.finished_at is None:
        return ""
    return f"{(info.finished_at - info.started_at).total_seconds():.0f} s"


def _plan(info: "CampaignInfo") -> None:
    _heading(info, planned=True)
    table(
        ["adapter", "alias", "serving", "fit", "signals", "action", "route", "expected", "gate", "data",
         "retraining costs", "why"],
        (
            [item.adapter, item.alias, item.serving, item.fit, _signals(item.plan["signals"]), item.plan["action"],
             item.plan["route"], _expected(item.plan), _gates(item.plan), ", ".join(item.plan["data"]),
             _cost_of_retraining(item.plan), item.reason]
            for item in info.items
        ),
        empty="No adapter is bound to the old weights.",
    )  # fmt: skip
    for item in info.items:
        for told in (*item.plan["because"], *item.plan["missing"]):
            click.echo(f"{item.adapter}: {told}")


def _expected(plan: dict[str, Any]) -> str:
    """Per tier of the route what it took before; a question mark where no upgrade of this shape was seen."""
    known = {found["tier"]: found for found in plan["expected"]}
    return "; ".join(
        f"{tier}: {_cost(known[tier])} (of {known[tier]['seen']})" if tier in known else f"{tier}: ?"
        for tier in plan["tiers"]
    )


def _gates(plan: dict[str, Any]) -> str:
    suites = plan.get("suites") or []
    return "; ".join(f"{name} ({n} items, {least} needed)" for name, n, least in suites) or "none"


def _cost_of_retraining(found: dict[str, Any]) -> str:
    steps, seconds = found.get("retrain_steps"), found.get("retrain_seconds")
    return _cost({"steps": steps, "seconds": seconds}) if steps or seconds else ""


SCORES = ["bare_old", "serving_old", "bare_new", "carry", "align", "transport", "warm-start", "distil", "retrain",
          "final"]  # fmt: skip


def _row(item: "CampaignItemInfo") -> list[object]:
    scores = [number(item.scores[key]) if isinstance(item.scores.get(key), int | float) else "" for key in SCORES]
    tiers = item.cost.get("tiers") or {}
    cost = "; ".join(f"{tier}: {_cost(spent)}" for tier, spent in tiers.items())
    retraining = _cost_of_retraining(item.cost)
    return [item.adapter, item.alias, item.state, item.tier, item.serving, item.final, item.scores.get("metric"),
            *scores, cost, retraining, item.reason]  # fmt: skip


def _cost(spent: dict[str, Any]) -> str:
    steps, seconds = spent.get("steps"), spent.get("seconds")
    return f"{f'{steps:g}' if steps is not None else '?'} steps, {f'{seconds:.0f}' if seconds is not None else '?'} s"


HEADINGS = ["adapter", "alias", "state", "tier", "serving", "final", "metric",
            *(name.replace("_", " ") for name in SCORES), "cost", "retraining", "why"]  # fmt: skip


def _wanted(info: "CampaignInfo", item: "CampaignItemInfo") -> str:
    """How to go on with an adapter that waits for labels."""
    assert item.pool is not None
    named = item.adapter if item.alias == "prod" else f"{item.adapter} --alias {item.alias}"
    return (
        f"{item.adapter}:{item.alias} waits for labels: {item.pool.differ} of {item.pool.n} differ. "
        f"Fetch them: loractl upgrade disagreements {info.id} {named} -o FILE"
    )


def _status(info: "CampaignInfo") -> None:
    _heading(info)
    table(HEADINGS, map(_row, info.items), empty="No adapters.")
    for item in info.items:
        if item.pool and item.pool.waits:
            click.echo(_wanted(info, item))


def report_text(info: "CampaignInfo") -> str:
    """The report of an upgrade in Markdown."""
    from .report import scores_text

    lines = [
        f"# Upgrade {info.id}: {info.line}, {info.old_ref} → {info.new_ref}",
        "",
        f"State: {info.state}{f' ({info.reason})' if info.reason else ''}. Adapters: {_counts(info)}.",
        f"Old base {info.old}, new base {info.new}.",
        f"Planned {info.created_at:%Y-%m-%d %H:%M} UTC by {info.created_by}"
        + (f", took {_took(info)}." if _took(info) else "."),
        "",
        markdown(HEADINGS, (_row(item) for item in info.items)),
    ]
    if scores := scores_text(info):
        lines += ["", scores]
    return "\n".join(lines)


# ── schedules ────────────────────────────────────────────────────────────────


@command(
    schedule,
    "loractl schedule add base-upgrade llama --namespace team --upgrade",
    "loractl schedule add new-data team/reviews --namespace team --train recipe.toml",
    "loractl schedule add cron '0 3 * * 1' --namespace team --train recipe.toml",
)
@click.argument("trigger", type=click.Choice(["cron", "base-upgrade", "new-data"]))
@click.argument("subject", metavar="SUBJECT")
@click.option("--namespace", required=True, help="Who it belongs to.")
@click.option("--upgrade", "upgrades", is_flag=True, help="Start an upgrade campaign.")
@click.option("--train", "recipe", type=FILE, metavar="RECIPE.toml", help="Train by this recipe.")
@click.option("--queue", default="cpu", show_default=True, help="Which workers do it.")
@click.option("--parallel", type=click.IntRange(1), metavar="N", help="Adapters upgraded at once; default: all.")
@click.option("--budget", type=click.FloatRange(0, min_open=True), metavar="SECONDS",
              help="Device seconds of an upgrade in all.")
def add(
    out: Output, trigger: str, subject: str, namespace: str, upgrades: bool, recipe: Path | None, queue: str,
    parallel: int | None, budget: float | None,
) -> None:  # fmt: skip
    """Start work by itself: SUBJECT is a cron expression (UTC), a line, or a dataset."""
    from registry.schemas import JobRequest, ScheduleRequest
    from registry.schemas import Output as Goes

    if upgrades == (recipe is not None):
        raise click.UsageError("Say what to do: --upgrade, or --train RECIPE.toml.")
    if not upgrades and (parallel or budget):
        raise click.UsageError("--parallel and --budget belong to --upgrade.")
    bounds = {"parallel": parallel, "budget_seconds": budget, "queue": None if queue == "cpu" else queue}
    action: dict[str, Any] = {"upgrade": {key: value for key, value in bounds.items() if value is not None}}
    if recipe is not None:
        read = load_recipe(recipe)
        job = JobRequest(recipe=read.recipe, output=Goes.model_validate(read.output), queue=queue)
        action = {"job": job.model_dump(mode="json")}
    request = ScheduleRequest.model_validate(
        {"namespace": namespace, "trigger": trigger, "subject": subject, "action": action}
    )
    with config.connect() as client:
        info = client.create_schedule(request)
    out.emit(info, lambda: click.echo(info.id))


@command(schedule, "loractl schedule list", "loractl schedule list --namespace team", name="list")
@click.option("--namespace", help="Only this namespace.")
def list_schedules(out: Output, namespace: str | None) -> None:
    """List schedules."""
    with config.connect() as client:
        found = [row for row in client.schedules().items if namespace in (None, row.namespace)]
    out.emit(found, lambda: table(
        ["schedule", "namespace", "on", "subject", "does", "next", "last"],
        ([s.id, s.namespace, s.trigger, s.subject, ", ".join(s.action), ago(s.next_at),
          ", ".join(f"{key} {value}" for key, value in (s.last or {}).items())] for s in found),
        empty="No schedules. Add one: loractl schedule add base-upgrade LINE --namespace NS --upgrade",
    ))  # fmt: skip


@command(schedule, "loractl schedule rm s0123")
@click.argument("schedule_id", metavar="ID")
def rm(out: Output, schedule_id: str) -> None:
    """Remove a schedule."""
    with config.connect() as client:
        client.delete_schedule(schedule_id)
    out.emit({"removed": schedule_id}, lambda: click.echo(f"removed {schedule_id}"))


COMMANDS: dict[str, click.Command] = {"upgrade": upgrade, "schedule": schedule}
