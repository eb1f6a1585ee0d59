"""The commands against a real registry: what is typed, what comes out, on stdout one document and nothing else."""

import csv
import io
import json
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Timer
from typing import Any

import click
import pytest
from sqlmodel import col, select

from cli.main import run
from cli.output import Bar
from cli.parameters import METRICS, bytes_of
from registry.core.digest import Digest
from registry.core.metrics import ALLOWED
from registry.core.pool import Answered, input_id, to_paper
from registry.core.pool import questions as pool_questions
from registry.db.models import AliasMove, CampaignItem, PoolPaper
from registry.schemas import UpgradeRequest
from registry.services.blobs import blob_key
from tests import live
from tests.factories import adapter_config, base_of, tiny_adapter, tiny_base, write_json


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[live.Live]:
    with live.registry(tmp_path_factory.mktemp("registry")) as found:
        yield found


@pytest.fixture(autouse=True)
def home(registry: live.Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LORACTL_URL", registry.url)
    monkeypatch.setenv("LORACTL_TOKEN", registry.token)
    registry.seen.clear()


Call = Callable[..., Any]


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command for people; what it printed on stdout."""

    def called(*arguments: object, code: int = 0) -> str:
        capsys.readouterr()
        status = run([*map(str, arguments)])
        said = capsys.readouterr()
        assert status == code, said.err
        return said.out

    return called


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two bases of the same shapes and other weights."""
    folder = tmp_path_factory.mktemp("bases")
    return tiny_base(folder / "one", 1), tiny_base(folder / "two", 2)


@pytest.fixture(scope="module")
def adapter(bases: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_adapter(tmp_path_factory.mktemp("adapter"), bases[0], seed=1)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".loractl"}


def test_login_keeps_what_whoami_shows(
    registry: live.Live, call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("LORACTL_URL")
    monkeypatch.delenv("LORACTL_TOKEN")
    call("whoami", code=2)
    kept = call("login", registry.url, "--token", registry.token)
    assert stat.S_IMODE(Path(kept["file"]).stat().st_mode) == 0o600
    who = call("whoami")
    assert (who["name"], who["url"], who["source"]) == ("admin", registry.url, kept["file"])


def test_a_wrong_token_is_refused_and_not_kept(registry: live.Live, call: Call, tmp_path: Path) -> None:
    refused = call("login", registry.url, "--token", f"lora_0123_{'x' * 40}", code=1)
    assert refused["error"]["code"] == "token-refused"
    assert not (tmp_path / "config").exists()


def test_a_pull_replaces_what_a_pull_wrote_and_nothing_of_yours(
    call: Call, tmp_path: Path
) -> None:
    base = tiny_base(tmp_path / "base", seed=77, width=24)
    adapter, other, mine = (tiny_adapter(tmp_path / name, base, seed=seed) for seed, name in enumerate("abc"))
    for folder in (adapter, other):
        call("push", folder, "mine/bot", "--base", base)
    before = contents(mine)
    refused = call("pull", "mine/bot@v1", "--out", mine, code=1)
    assert refused["error"]["code"] == "path-unusable"
    assert "--force" in refused["error"]["detail"]
    assert contents(mine) == before
    call("pull", "mine/bot@v1", "--out", mine, "--force")
    assert contents(mine) == contents(adapter)
    call("pull", "mine/bot@v2", "--out", mine)  # what the first one wrote
    assert contents(mine) == contents(other)
    call("pull", "mine/bot@v1", "--out", mine)
    (mine / "adapter_model.safetensors").write_bytes(b"trained on")
    assert call("pull", "mine/bot@v2", "--out", mine, code=1)["error"]["code"] == "path-unusable"
    assert (mine / "adapter_model.safetensors").read_bytes() == b"trained on"


def test_the_story_of_an_adapter(
    call: Call, told: Callable[..., str], bases: tuple[Path, Path], adapter: Path, tmp_path: Path
) -> None:
    old, new = bases
    pushed = call("push", adapter, "story/bot", "--base", old, "--alias", "prod", "-m", "first")
    assert pushed["outcome"]["ref"] == "story/bot@v1"
    assert pushed["outcome"]["base"] == str(base_of(old).digest)
    assert call("base", "push", old, "--line", "story")["outcome"]["ref"] == "story@r1"
    assert call("base", "show", "story@r1")["weights"] == "full"

    found = call("pull", "story/bot:prod", "--for", old, "--out", tmp_path / "out")
    assert (found["ref"], found["fit"]["fit"], found["base_assumed"]) == ("story/bot@v1", "exact", False)
    assert contents(tmp_path / "out") == contents(adapter)
    assert call("pull", "story/bot:prod", "--for", "story@r1", "--out", tmp_path / "out")["fetched"] == []

    assert call("base", "push", new, "--line", "story")["outcome"]["ref"] == "story@r2"
    refused = call("pull", "story/bot:prod", "--for", "story@r2", "--out", tmp_path / "other", code=1)
    assert refused["error"]["code"] == "no-compatible-version"
    assert not (tmp_path / "other").exists()
    forced = call("pull", "story/bot@v1", "--for", new, "--fit", "same-shape", "--out", tmp_path / "other")
    assert forced["fit"]["fit"] == "same-shape"

    assert [item["version"]["ref"] for item in call("list", "--fits", "story@r1")] == ["story/bot@v1"]
    assert call("list", "--fits", "story@r2") == []
    assert [item["fit"]["fit"] for item in call("list", "--fits", new, "--class", "same-shape")] == ["same-shape"]
    assert [item["name"] for item in call("list", "--namespace", "story")] == ["story/bot"]

    difference = call("base", "diff", "story@r1", "story@r2")
    assert difference["added"] == difference["removed"] == []
    assert "story/bot@v1" in told("log", "story/bot")
    assert "story@r1" in told("show", "story/bot")
    assert "vllm" in told("show", "story/bot@v1")
    assert "prod" in told("alias", "list", "story/bot")
    assert "story@r1" in told("list")
    assert "story@r2" in told("base", "list", "--line", "story")


def test_pushing_again_with_the_base_as_a_folder_is_one_request(
    registry: live.Live, call: Call, bases: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = tiny_adapter(tmp_path / "adapter", bases[0], seed=2)
    call("push", folder, "again/bot", "--base", bases[0])
    registry.seen.clear()
    call("push", folder, "again/bot", "--base", bases[0])
    assert [request.path for request in registry.seen] == ["/v1/adapters/again/bot/pushes"]


def test_an_adapter_against_a_base_of_other_shapes_is_refused_with_what_does_not_fit(
    call: Call, adapter: Path, tmp_path: Path
) -> None:
    other = tiny_base(tmp_path / "wide", width=32)
    refused = call("push", adapter, "wrong/bot", "--base", other, code=1)["error"]
    assert refused["code"] == "does-not-fit"
    assert "q_proj" in refused["detail"]


def test_aliases_move_and_roll_back(
    call: Call, told: Callable[..., str], bases: tuple[Path, Path], tmp_path: Path
) -> None:
    for seed in (1, 2):
        call("push", tiny_adapter(tmp_path / str(seed), bases[0], seed=seed), "moves/bot", "--base", bases[0])
    assert call("alias", "set", "moves/bot@v1", "prod")["generation"] == 1
    stale = call("alias", "set", "moves/bot@v2", "prod", "--generation", 0, code=1)
    assert stale["error"]["code"] == "alias-moved"
    assert call("promote", "moves/bot@v2", "prod", "-m", "better")["version"] == 2
    assert call("rollback", "moves/bot", "prod", "--for", bases[0])["version"] == 1
    assert "is now v2" in told("alias", "set", "moves/bot", "prod")
    difference = call("diff", "moves/bot@v1", "moves/bot@v2")["differing"]
    assert "file adapter_model.safetensors" in difference
    assert "base" not in difference


def test_a_gate_that_has_not_passed_exits_with_4(call: Call, bases: tuple[Path, Path], tmp_path: Path) -> None:
    suite = tmp_path / "suite.jsonl"
    suite.write_text("".join(f'{{"prompt": "{i}+1=", "completion": " {i + 1}"}}\n' for i in range(700)))
    assert call("suite", "push", suite, "gated/sums", "--metric", "likelihood")["outcome"]["ref"] == "gated/sums@v1"
    policy = call("policy", "set", "gated", "--suite", "gated/sums", "--metric", "likelihood", "--margin", "2%gain")
    assert policy["policy"]["gates"][0]["margin"] == {"value": 0.02, "of_gain": True}
    call("push", tiny_adapter(tmp_path / "a", bases[0], seed=9), "gated/bot", "--base", bases[0])
    refused = call("promote", "gated/bot@v1", "prod", code=4)["error"]
    assert refused["code"] == "gate-not-passed"
    assert "loractl evaluate" in refused["detail"]
    changed = call("policy", "set", "gated/bot", "--action", "ask")["policy"]
    assert (changed["action"], len(changed["gates"])) == ("ask", 1)  # what is not named stays
    assert call("policy", "show", "gated/bot")["inherited"] is False


def test_a_folder_of_tasks_is_pushed_as_a_suite_and_gates(call: Call, tmp_path: Path) -> None:
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps({"n": n}) + "\n" for n in range(700)))
    (tmp_path / "suite.json").write_text('{"lm_eval": {"tasks": ["sums.yaml"]}}')
    (tmp_path / "sums.yaml").write_text(
        "task: sums\noutput_type: loglikelihood\ndoc_to_text: '{{n}}+1='\ndoc_to_target: '{{n + 1}}'\n"
        "dataset_path: json\ndataset_kwargs: {data_files: {test: sums.jsonl}}\ntest_split: test\n"
    )
    pushed = call("suite", "push", tmp_path, "tasks/sums", "--metric", "lm-eval:acc")
    assert (pushed["outcome"]["ref"], pushed["outcome"]["rows"]) == ("tasks/sums@v1", 700)
    noted = call("policy", "set", "tasks", "--suite", "tasks/sums", "--metric", "lm-eval:acc", "--margin", "0.05")
    assert "without a flip" in noted["notes"][0]


def test_a_gate_may_be_on_a_metric_whose_code_is_only_on_workers(call: Call, tmp_path: Path) -> None:
    suite = tmp_path / "suite.jsonl"
    rows = ({"prompt": f"{i}", "completion": "x", "references": ["y"]} for i in range(700))
    suite.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pushed = call("suite", "push", suite, "custom/s", "--metric", "chrf", "--metric", "custom:sql",
                  "--metric", "custom-binary:runs", "--form", "json")  # fmt: skip
    assert pushed["outcome"]["ref"] == "custom/s@v1"
    gate = ["--suite", "custom/s", "--margin", "0.02"]
    mean = call("policy", "set", "custom/a", *gate, "--metric", "custom:sql")
    right = call("policy", "set", "custom/b", *gate, "--metric", "custom-binary:runs")
    assert "at least 100 are needed" in mean["notes"][0]
    assert "without a flip, at least" in right["notes"][0]


@pytest.mark.parametrize("arguments", [
    ["policy", "set", "gated", "--suite", "a/b", "--metric", "beauty", "--margin=0.1"],
    ["suite", "push", "FILE", "a/b", "--metric", "custom:"],
    ["suite", "push", "FILE", "a/b", "--form", "xml"],
])  # fmt: skip
def test_a_metric_or_a_form_that_is_none_is_wrong_usage(call: Call, tmp_path: Path, arguments: list[str]) -> None:
    file = tmp_path / "suite.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n')
    arguments = [str(file) if argument == "FILE" else argument for argument in arguments]
    assert call(*arguments, code=2)["error"]["code"] == "usage"


def test_the_help_names_the_metrics_that_there_are() -> None:
    assert METRICS == ALLOWED


@pytest.mark.parametrize("margin", ["x", "0", "2", "-1%gain"])
def test_a_margin_that_is_none_is_wrong_usage(call: Call, margin: str) -> None:
    arguments = ["policy", "set", "gated", "--suite", "a/b", "--metric", "accuracy", f"--margin={margin}"]
    assert call(*arguments, code=2)["error"]["code"] == "usage"


def test_work_that_cannot_run_is_refused_at_planning(
    call: Call, bases: tuple[Path, Path], tmp_path: Path
) -> None:
    absent = tiny_base(tmp_path / "absent", 77)
    call("base", "push", absent, "--line", "absent", "--no-weights")
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    call("dataset", "push", data, "work/data")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('base = "absent@r1"\ndatasets = ["work/data"]\nsteps = 1\n[output]\nadapter = "work/bot"\n')
    assert call("train", recipe, "--no-wait", code=1)["error"]["code"] == "weights-absent"
    recipe.write_text("base = [\n")
    assert call("train", recipe, code=1)["error"]["code"] == "bad-config"
    recipe.write_text('base = "absent@r1"\n[output]\nsurprise = 1\n')
    assert call("train", recipe, code=1)["error"]["code"] == "bad-config"


def test_jobs_are_asked_for_listed_cancelled_and_retried(
    call: Call, told: Callable[..., str], bases: tuple[Path, Path], tmp_path: Path
) -> None:
    call("base", "push", bases[0], "--line", "jobs")
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    call("dataset", "push", data, "jobs/data")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('base = "jobs@r1"\ndatasets = ["jobs/data"]\nsteps = 3\n[output]\nadapter = "jobs/bot"\n')
    job = call("train", recipe, "--no-wait")
    assert job["state"] == "queued"
    assert call("train", recipe, "--no-wait")["id"] == job["id"]
    assert job["id"] in told("jobs", "list")
    recipe.write_text('kind = "full-finetune"\nbase = "jobs@r1"\ndatasets = ["jobs/data"]\nsteps = 3\n')
    assert "--line llama-bot" in call("train", recipe, "--no-wait", code=2)["error"]["detail"]
    full = call("train", recipe, "--no-wait", "--line", "jobs-full")
    assert (full["kind"], full["output"]["line"]) == ("full-finetune", "jobs-full")
    assert call("jobs", "cancel", full["id"])["state"] == "cancelled"
    assert call("jobs", "cancel", job["id"])["state"] == "cancelled"
    assert [event["kind"] for event in call("jobs", "logs", job["id"])] == ["queued", "cancelled"]
    assert call("jobs", "watch", job["id"], code=1)["error"]["code"] == "work-failed"
    assert call("jobs", "retry", job["id"], "--no-wait")["state"] == "queued"
    assert "finetune" in told("jobs", "show", job["id"])
    call("jobs", "cancel", job["id"])


def test_several_recipes_are_asked_for_and_followed_together(
    registry: live.Live, call: Call, bases: tuple[Path, Path], tmp_path: Path
) -> None:
    call("base", "push", bases[0], "--line", "several")
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    call("dataset", "push", data, "several/data")
    recipes = [tmp_path / f"{name}.toml" for name in ("one", "two")]
    for recipe in recipes:
        output = f'[output]\nadapter = "several/{recipe.stem}"\n'
        recipe.write_text(f'base = "several@r1"\ndatasets = ["several/data"]\nsteps = 3\n{output}')
    problem = call("train", *recipes, "--output", "several/bot", code=2)["error"]
    assert "of several recipes each has its own [output]" in problem["detail"]
    asked = call("train", *recipes, "--no-wait")["jobs"]
    assert [job["output"]["adapter"] for job in asked] == ["several/one", "several/two"]

    def end() -> None:
        with registry.client() as client:
            for job in asked:
                client.cancel_job(job["id"])

    later = Timer(1.0, end)
    later.start()
    failed = call("train", *recipes, code=1)["error"]
    assert failed["code"] == "work-failed"
    assert asked[0]["id"] in failed["detail"]
    later.join()


def test_of_several_recipes_all_are_asked_for_or_none(call: Call, bases: tuple[Path, Path], tmp_path: Path) -> None:
    call("base", "push", bases[0], "--line", "allornone")
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "one", "completion": "two"}\n')
    call("dataset", "push", data, "allornone/data")
    recipes = [tmp_path / f"{name}.toml" for name in ("one", "two")]
    for recipe, rank in zip(recipes, (2, -2), strict=True):
        output = f'[output]\nadapter = "allornone/{recipe.stem}"\n'
        recipe.write_text(f'base = "allornone@r1"\ndatasets = ["allornone/data"]\nrank = {rank}\n{output}')
    assert "rank" in call("train", *recipes, "--no-wait", code=2)["error"]["detail"]
    [asked] = [job for job in call("jobs", "list") if job["output"].get("adapter") == "allornone/one"]
    assert asked["state"] == "cancelled"


def test_tokens_are_made_listed_and_revoked(registry: live.Live, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    made = call("token", "create", "reader", "--scope", "read", "--namespace", "story", "--days", 1)
    assert made["token"] not in json.dumps(call("token", "list"))
    monkeypatch.setenv("LORACTL_TOKEN", made["token"])
    assert call("whoami")["scopes"] == {"story": ["read"]}
    assert call("token", "create", "more", "--scope", "admin", "--namespace", "story", code=1)["error"]["code"] == (
        "scope-missing"
    )
    monkeypatch.setenv("LORACTL_TOKEN", registry.token)
    call("token", "revoke", made["id"])
    monkeypatch.setenv("LORACTL_TOKEN", made["token"])
    registry.parts.callers.clear()
    assert call("whoami", code=1)["error"]["code"] == "token-refused"


def test_schedules_are_added_listed_and_removed(call: Call, told: Callable[..., str], bases: tuple[Path, Path]) -> None:
    call("base", "push", bases[0], "--line", "nightly")
    made = call("schedule", "add", "base-upgrade", "nightly", "--namespace", "team", "--upgrade")
    assert made["id"] in told("schedule", "list")
    assert call("schedule", "rm", made["id"]) == {"removed": made["id"]}
    assert made["id"] not in told("schedule", "list")
    upgrades = ("schedule", "add", "base-upgrade", "nightly", "--namespace", "team", "--upgrade")
    bounded = call(*upgrades, "--parallel", 3, "--budget", 600)
    assert bounded["action"] == {"upgrade": {"parallel": 3, "budget_seconds": 600.0}}
    call("schedule", "rm", bounded["id"])


def test_an_upgrade_is_planned_started_reported_and_aborted(
    call: Call, told: Callable[..., str], bases: tuple[Path, Path], tmp_path: Path
) -> None:
    old, new = bases
    call("base", "push", old, "--line", "upgraded")
    call("push", tiny_adapter(tmp_path / "a", old, seed=5), "upgraded/bot", "--base", old, "--alias", "prod")
    suite = tmp_path / "suite.jsonl"  # a gate that can pass: the daemons wait for its scores instead of freezing
    suite.write_text("".join(f'{{"prompt": "one and {i}", "completion": "two"}}\n' for i in range(600)))
    call("suite", "push", suite, "upgraded/sums", "--metric", "exact-match")
    call("policy", "set", "upgraded", "--suite", "upgraded/sums", "--metric", "exact-match", "--margin", "0.05")
    call("base", "push", new, "--line", "upgraded")
    planned = call("upgrade", "plan", "upgraded", "--to", "upgraded@r2", "--from", "upgraded@r1")
    assert "upgraded/bot" in {item["adapter"] for item in planned["items"]}
    assert "upgraded/bot" in told("upgrade", "plan", "upgraded", "--to", "upgraded@r2", "--from", "upgraded@r1")
    started = call("upgrade", "start", "upgraded", "--to", "upgraded@r2", "--namespace", "upgraded", "--no-wait")
    assert started["id"] in told("upgrade", "status")
    assert "upgraded/bot" in told("upgrade", "status", started["id"])
    assert f"# Upgrade {started['id']}: upgraded, upgraded@r1 → upgraded@r2" in told("upgrade", "report", started["id"])
    assert call("upgrade", "report")["id"] == started["id"]
    assert call("upgrade", "pause", started["id"], "--now")["state"] == "paused"
    assert "paused" in told("upgrade", "status", started["id"])
    held = next(job for job in call("jobs", "list") if job["held_by"] == started["id"])
    assert f"held by the paused upgrade {started['id']}" in told("jobs", "show", held["id"])
    assert call("upgrade", "resume", started["id"])["state"] == "running"
    kinds = [row["kind"] for row in call("upgrade", "ledger", started["id"])]
    assert kinds[0] == "started"
    assert {"paused", "resumed"} <= set(kinds)
    assert "running jobs stopped too" in told("upgrade", "ledger", "--line", "upgraded")
    lines = list(csv.reader(io.StringIO(told("upgrade", "ledger", started["id"], "--csv"))))
    assert [line[4] for line in lines[: 1 + len(kinds)]] == ["kind", *kinds]  # more may have come since
    assert json.loads(lines[1][-1]) == {}
    written = told("upgrade", "report", started["id"], "--out", tmp_path / "report").splitlines()
    assert {"report.md", "report.json"} <= {Path(line).name for line in written}
    undone = call("upgrade", "rollback", started["id"], "-m", "not today")
    assert (undone["state"], undone["reason"]) == ("aborted", "not today")
    refused = call("upgrade", "rollback", started["id"], "--adapter", "upgraded/none", code=2)
    assert refused["error"]["code"] == "bad-request"


@pytest.mark.parametrize("decline", [False, True])
def test_a_person_says_yes_or_no_where_a_policy_asks(
    registry: live.Live, call: Call, bases: tuple[Path, Path], tmp_path: Path, *, decline: bool
) -> None:
    old, new = bases
    line = f"asked-{decline}".lower()
    call("base", "push", old, "--line", line)
    call("push", tiny_adapter(tmp_path / "a", old, seed=6), f"{line}/bot", "--base", old, "--alias", "prod")
    call("base", "push", new, "--line", line)
    request = UpgradeRequest(line=line, to=f"{line}@r2", old=f"{line}@r1", namespaces=[line])
    with registry.client() as client:
        planned = client.create_upgrade(request)  # never started, so nobody but us moves it
    with registry.parts.database.write() as session:
        item = session.exec(select(CampaignItem).where(CampaignItem.campaign_id == planned.id)).one()
        item.state = "waiting"
        session.add(item)
    call("upgrade", "approve", planned.id, f"{line}/bot", *(["--decline"] if decline else []))
    with registry.parts.database.read() as session:
        item = session.exec(select(CampaignItem).where(CampaignItem.campaign_id == planned.id)).one()
    assert (item.facts["approved"], item.facts["decided_by"]) == (not decline, "admin")


def test_differing_answers_are_fetched_labelled_and_given(
    registry: live.Live, call: Call, told: Callable[..., str], bases: tuple[Path, Path], tmp_path: Path
) -> None:
    old, new = bases
    call("base", "push", old, "--line", "pooled")
    call("push", tiny_adapter(tmp_path / "a", old, seed=7), "pooled/bot", "--base", old, "--alias", "prod")
    call("base", "push", new, "--line", "pooled")
    questions, suite = tmp_path / "inputs.jsonl", tmp_path / "suite.jsonl"
    questions.write_text("".join(f'{{"prompt": "pooled {i}"}}\n' for i in range(700)))
    suite.write_text("".join(f'{{"prompt": "and {i}", "completion": "two"}}\n' for i in range(600)))
    call("dataset", "push", questions, "pooled/inputs")
    call("suite", "push", suite, "pooled/sums", "--metric", "exact-match")
    gate = ("--suite", "pooled/sums", "--metric", "exact-match", "--margin", "0.05")
    assert call("policy", "set", "pooled", *gate, "--pool", "pooled/inputs")["policy"]["pool"] == "pooled/inputs"
    assert "pooled/inputs: 700 rows; without a flip, at least" in told("policy", "set", "pooled", *gate)
    refused = call("policy", "set", "pooled", "--suite", "pooled/sums", "--metric", "likelihood", code=1)
    assert refused["error"]["code"] == "pool-unusable"
    request = UpgradeRequest(line="pooled", to="pooled@r2", old="pooled@r1", namespaces=["pooled"])
    with registry.client() as client:
        planned = client.create_upgrade(request)  # never started, so nobody but us moves it
    early = call("upgrade", "disagreements", planned.id, "pooled/bot", code=1)
    assert early["error"]["code"] == "no-labels-wanted"
    rows = {"prompt": "pooled 1"}, {"prompt": "pooled 2"}
    said = [{input_id(row): Answered(item=input_id(row), input=row, answer=text) for row in rows} for text in "xy"]
    paper = to_paper(pool_questions(*said))
    digest = Digest.sha256(paper)
    registry.parts.store.put(blob_key(str(digest)), paper, digest)
    with registry.parts.database.write() as session:
        item = session.exec(select(CampaignItem).where(CampaignItem.campaign_id == planned.id)).one()
        version = item.facts["serving"]
        session.add(PoolPaper(item_id=item.id or 0, version=version, paper=str(digest), created_at=item.changed_at))
        asked = {"tier": "carry", "version": version, "n": 700, "differ": 2, "paper": str(digest)}
        item.facts = item.facts | {"pool": item.facts["pool"] | asked}
        item.state = "waiting"
        session.add(item)
    shown = told("upgrade", "status", planned.id)
    assert "pooled/bot:prod waits for labels: 2 of 700 differ." in shown
    file = tmp_path / "differ.jsonl"
    fetched = told("upgrade", "disagreements", planned.id, "pooled/bot", "-o", file)
    assert fetched.startswith("2 of 700 differ. Fill in 'right', then: loractl upgrade label")
    again = call("upgrade", "disagreements", planned.id, "pooled/bot", "-o", file, code=1)
    assert again["error"]["code"] == "path-unusable"
    assert told("upgrade", "disagreements", planned.id, "pooled/bot") == file.read_text()
    assert call("upgrade", "label", planned.id, "pooled/bot", file, code=1)["error"]["code"] == "labels-missing"
    file.write_text(file.read_text().replace("null", '"a"'))
    assert call("upgrade", "label", planned.id, "pooled/bot", file)["items"][0]["pool"]["labelled_by"] == "admin"
    assert "2 inputs of pooled/inputs" in told("upgrade", "ledger", planned.id)
    file.write_text(file.read_text().replace('"right": "a"', '"right": "b"'))
    assert call("upgrade", "label", planned.id, "pooled/bot", file, code=1)["error"]["code"] == "labels-contradict"
    assert call("policy", "set", "pooled", "--pool", "none")["policy"]["pool"] is None


def test_a_log_goes_on_past_its_first_page(
    registry: live.Live, call: Call, told: Callable[..., str], bases: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = tiny_adapter(tmp_path / "a", bases[0], seed=7)
    call("push", folder, "long/bot", "--base", bases[0], "--alias", "prod", "-m", "the first of all")
    with registry.parts.database.write() as session:
        first = session.exec(select(AliasMove).order_by(col(AliasMove.id).desc())).first()
        assert first is not None
        for generation in range(2, 152):
            session.add(AliasMove(**first.model_dump(exclude={"id", "generation"}), generation=generation))
    assert len(call("log", "long/bot")["log"]["entries"]) == 152
    assert "the first of all" in told("log", "long/bot")


def test_doctor_looks_here_and_there(call: Call) -> None:
    report = call("doctor")
    assert report["ok"]
    assert {"loractl", "disk", "login", "clock", "versions", "database"} <= {f["check"] for f in report["findings"]}


def test_doctor_finds_no_fault_in_somebody_who_is_no_admin(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    made = call("token", "create", "guest", "--scope", "read", "--namespace", "team")
    monkeypatch.setenv("LORACTL_TOKEN", made["token"])
    [left] = [finding for finding in call("doctor")["findings"] if finding["check"] == "its parts"]
    assert "needs the scope 'admin'" in left["detail"]


def test_doctor_exits_with_1_when_something_is_wrong(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORACTL_TOKEN", "lora_0123_" + "x" * 40)
    report = call("doctor", code=1)
    assert [finding["check"] for finding in report["findings"] if not finding["ok"]] == ["registry"]


def test_a_base_that_is_no_folder_and_no_reference_is_wrong_usage(call: Call, adapter: Path) -> None:
    assert call("push", adapter, "team/bot", "--base", "./nowhere", code=1)["error"]["code"] == "path-unusable"
    assert call("push", adapter, "team/bot", "--base", "No Base", code=2)["error"]["code"] == "bad-reference"
    assert call("push", adapter, "team/bot@v3", "--base", "x", code=2)["error"]["code"] == "bad-reference"


@pytest.mark.parametrize(
    "line", [("verify", "./nowhere"), ("export", "./nowhere", "--out", "x.gguf"),
             ("merge", "./nowhere", "--local", "--for", "BASE", "--out", "merged")]
)  # fmt: skip
def test_a_path_that_is_not_there_is_no_reference(
    call: Call, bases: tuple[Path, Path], tmp_path: Path, line: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused = call(*(bases[0] if word == "BASE" else word for word in line), code=1)["error"]
    assert (refused["code"], refused["facts"]["path"]) == ("path-unusable", "./nowhere")
    assert list(tmp_path.glob("*merged*")) == []


def test_an_adapter_is_no_base(call: Call, adapter: Path) -> None:
    refused = call("base", "push", adapter, "--line", "mistaken", code=1)["error"]
    assert refused["code"] == "not-a-base"
    assert "it holds an adapter" in refused["detail"]
    assert call("base", "list", "--line", "mistaken") == []


def test_a_line_is_taken_back_by_its_last_good_revision(call: Call, bases: tuple[Path, Path]) -> None:
    for folder in bases:
        call("base", "push", folder, "--line", "regretted", "--no-weights")
    first = call("base", "show", "regretted@r1")["digest"]
    back = call("base", "rollback", "regretted@r1")
    assert (back["digest"], back["revisions"][-1]) == (first, "regretted@r3")
    assert call("base", "show", first[:15])["digest"] == first
    assert call("base", "rollback", "regretted", code=2)["error"]["code"] == "bad-reference"


def test_what_is_looked_for_and_not_there_is_not_nothing(told: Callable[..., str]) -> None:
    assert "No adapter is like that" in told("list", "zzz")


def test_a_pickle_is_refused_with_how_to_convert_it(call: Call, bases: tuple[Path, Path], tmp_path: Path) -> None:
    write_json(tmp_path / "adapter" / "adapter_config.json", adapter_config(bases[0]))
    (tmp_path / "adapter" / "adapter_model.bin").write_bytes(b"\x80\x02")
    refused = call("push", tmp_path / "adapter", "team/bot", "--base", bases[0], code=1)["error"]
    assert refused["code"] == "pickle-refused"
    assert "safetensors" in refused["hint"]


def test_digest_needs_no_registry(call: Call, bases: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORACTL_URL")
    assert call("base", "digest", bases[0])["digest"] == str(base_of(bases[0]).digest)


def test_merge_here_runs_the_workers_merge_on_folders_and_shows_how_far_it_is(
    call: Call, bases: tuple[Path, Path], adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int, int]] = []
    monkeypatch.setattr(Bar, "__call__", lambda _, *now: seen.append(now))
    wanted = ("--dtype", "fp16", "--max-shard-size", "1.5MB")
    merged = call("merge", adapter, "--local", "--for", bases[0], "--out", tmp_path / "merged", *wanted)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "float16"
    assert merged["digest"] == str(base_of(tmp_path / "merged").digest) != str(base_of(bases[0]).digest)
    *_, (done, total) = [now[1:] for now in seen if now[0] == "merging"]
    assert done == total > 0
    assert sorted(path.name for path in tmp_path.iterdir() if "merg" in path.name) == ["merged"]
    call("merge", adapter, "--local", "--for", bases[0], "--out", tmp_path / "small", "--max-shard-size", "1", code=2)
    assert not list(tmp_path.glob(".*"))
    taken = call("merge", adapter, "--local", "--for", bases[0], "--out", tmp_path / "merged", code=1)
    assert taken["error"]["code"] == "path-unusable"


def test_merge_here_refuses_a_base_that_the_adapter_was_not_trained_on(
    call: Call, bases: tuple[Path, Path], tmp_path: Path
) -> None:
    own, other = (base_of(folder).digest for folder in bases)
    adapter = tiny_adapter(tmp_path / "bot", bases[0], seed=1, record_base=True)
    line = ("merge", adapter, "--local", "--for", bases[1], "--out", tmp_path / "merged")
    refused = call(*line, code=1)["error"]
    assert (refused["code"], refused["facts"]["recorded"], refused["facts"]["base"]) == (
        "trained-on-another", str(own), str(other)
    )  # fmt: skip
    assert not (tmp_path / "merged").exists()
    assert call(*line, "--trust-base")["base"] == str(other)


def test_a_folder_that_was_pulled_knows_its_base(call: Call, bases: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = tiny_adapter(tmp_path / "bot", bases[0], seed=31)
    call("base", "push", bases[1], "--line", "knowing", "--no-weights")
    call("push", adapter, "knowing/bot", "--base", bases[0])
    call("pull", "knowing/bot", "--for", bases[1], "--fit", "same-shape", "--out", tmp_path / "wanted")
    call("pull", "knowing/bot", "--out", tmp_path / "plain")
    line = ("merge", tmp_path / "plain", "--local", "--for", bases[1], "--out", tmp_path / "merged")
    refused = call(*line, code=1)["error"]
    assert (refused["code"], refused["facts"]["recorded"]) == ("trained-on-another", str(base_of(bases[0]).digest))
    (tmp_path / "plain" / "adapter_model.safetensors").unlink()
    shutil.copy(adapter / "adapter_model.safetensors", tmp_path / "plain")
    assert call(*line, code=1)["error"]["code"] == "trained-on-another"  # the same bytes
    shutil.copytree(tiny_adapter(tmp_path / "other", bases[0], seed=32), tmp_path / "plain", dirs_exist_ok=True)
    assert call(*line)["base"] == str(base_of(bases[1]).digest)  # nobody knows where these are from
    line = ("merge", tmp_path / "wanted", "--local", "--for", bases[1], "--out", tmp_path / "as-asked-for")
    assert call(*line)["base"] == str(base_of(bases[1]).digest)


def test_no_token_is_ever_printed(registry: live.Live, capsys: pytest.CaptureFixture[str]) -> None:
    for line in (["whoami"], ["doctor"], ["list"], ["show", "no/such", "--debug"], ["base", "list", "--debug"]):
        for extra in ([], ["--json"]):
            run([*line, *extra])
    said = "".join(capsys.readouterr())
    assert "Traceback" in said
    assert registry.token not in said
    assert registry.token.split("_", 2)[2] not in said


@pytest.mark.parametrize(
    ("text", "count"), [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("2GiB", 2 << 30), ("64k", 64_000), ("7", 7)]
)
def test_sizes_are_read_as_people_write_them(text: str, count: int) -> None:
    assert bytes_of(text) == count


@pytest.mark.parametrize("text", ["", "big", "-1GB", "5 GB more", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(click.UsageError, match="not a size such as 500MB"):
        bytes_of(text)
