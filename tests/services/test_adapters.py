"""What is compatible with these weights, and which version belongs to them; history, lineage and policies."""

from pathlib import Path

import pytest
from sqlmodel import col, select, update

from registry.core.errors import (
    AdapterNotFound,
    AliasNotFound,
    BadReference,
    BadRequest,
    BaseNotFound,
    DatasetNotFound,
    GateImpossible,
    NoCompatibleVersion,
    PolicyNotFound,
    ScopeMissing,
    VersionNotFound,
)
from registry.core.fit import FitClass
from registry.core.names import Reference
from registry.core.policy import Evidence, Gate, Margin, Policy
from registry.db.models import Base, Version
from registry.schemas import ClaimRequest, JobRequest, Output, Provenance
from registry.services import adapters, bases, jobs, policies
from registry.services.adapters import Filter
from registry.services.references import find_adapter, find_version
from registry.services.tokens import Caller
from tests.upgrade import GATE, POLICY, WORKER, Upgrade
from tests.world import ADMIN, World, caller

ANY_SHAPE = (FitClass.EXACT, FitClass.SAME_SHAPE)


@pytest.fixture
def here(embedded: World, tmp_path: Path) -> Upgrade:
    made = Upgrade(embedded, tmp_path)
    made.serve()
    embedded.push_base(made.v2, line="demo")
    return made


def resolved(here: Upgrade, ref: str, base: str | None, **more: object) -> str:
    with here.world.database.read() as session:
        on = bases.find(session, base) if base else None
        found = adapters.resolve(session, ADMIN, Reference.parse(ref), on, **more)  # type: ignore[arg-type]
        return f"v{found.version.number} {found.fit.fit} {found.assumed}"


def test_each_base_has_its_own_version_behind_an_alias(here: Upgrade) -> None:
    assert resolved(here, "team/bot:prod", "demo@r1") == "v1 exact False"
    here.serve(seed=5, base=here.v2)
    assert resolved(here, "team/bot:prod", "demo@r1") == "v1 exact False"
    assert resolved(here, "team/bot:prod", "demo@r2") == "v2 exact False"
    assert resolved(here, "team/bot:prod", None) == "v2 exact True"
    assert resolved(here, "team/bot@v1", None) == "v1 exact True"


def test_what_tables_show_of_a_digest_names_what_it_is_the_beginning_of(here: Upgrade) -> None:
    here.push("team/bot", seed=8)
    with here.world.database.read() as session:
        first, second = (bases.find(session, f"demo@r{number}").digest for number in (1, 2))
        assert bases.find(session, first[:15]).digest == first
        with pytest.raises(BaseNotFound):
            bases.find(session, "b3:" + "0" * 12)
    with here.world.database.write() as session:  # as somebody might make them
        session.exec(update(Base).where(col(Base.digest) == second).values(digest=first[:15] + "0" * 52))
    with here.world.database.read() as session, pytest.raises(BadReference, match="several begin so"):
        bases.find(session, first[:15])
    digests = here.world.all(select(Version.digest).order_by(col(Version.number)))
    assert resolved(here, f"team/bot@{digests[0][:15]}", None) == "v1 exact True"
    with pytest.raises(VersionNotFound):
        resolved(here, "team/bot@sha256:00000000", None)
    with here.world.database.write() as session:
        session.exec(update(Version).where(col(Version.number) == 2).values(digest=digests[0][:15] + "0" * 56))
    with pytest.raises(BadReference, match="several begin so"):
        resolved(here, f"team/bot@{digests[0][:15]}", None)


def test_what_does_not_belong_is_refused_with_the_nearest_and_given_only_by_name(here: Upgrade) -> None:
    with pytest.raises(NoCompatibleVersion, match=r"Nearest: v1 on demo@r1 is same-shape") as refused:
        resolved(here, "team/bot:prod", "demo@r2")
    assert refused.value.candidates[0]["version"] == 1
    assert resolved(here, "team/bot:prod", "demo@r2", classes=ANY_SHAPE) == "v1 same-shape False"
    with pytest.raises(BadRequest, match="engine 'none' is unknown"):
        resolved(here, "team/bot:prod", "demo@r1", engine="none")


def test_what_is_not_there_is_named_with_the_nearest(here: Upgrade) -> None:
    with pytest.raises(AdapterNotFound, match="Did you mean 'team/bot'"):
        resolved(here, "team/bott", "demo@r1")
    with pytest.raises(AliasNotFound, match="Did you mean 'prod'"):
        resolved(here, "team/bot:prodd", "demo@r1")


def test_the_compatible_are_found_by_class_alias_evidence_and_namespace(here: Upgrade) -> None:
    here.push("other/bot", seed=3)
    both = ["team/bot", "other/bot"]
    asked: list[tuple[str, Filter, list[str]]] = [
        ("demo@r1", Filter(), both),
        ("demo@r2", Filter(), []),
        ("demo@r2", Filter(classes=ANY_SHAPE), both),
        ("demo@r2", Filter(classes=(FitClass.INCOMPATIBLE,)), []),
        ("demo@r1", Filter(alias="prod"), ["team/bot"]),
        ("demo@r1", Filter(namespace="other"), ["other/bot"]),
        ("demo@r1", Filter(evidence=Evidence.RECORDED, max_rank=4, engine="vllm"), both),
        ("demo@r1", Filter(max_rank=3), []),
    ]
    with here.world.database.read() as session:
        for base, wanted, expected in asked:
            on = bases.find(session, base)
            found = adapters.compatible(session, ADMIN, on, wanted, after=0, limit=9)
            assert [f"{adapter.namespace}/{adapter.name}" for _, adapter, _ in found] == expected, wanted
            stranger = caller("stranger", none=["read"])
            assert adapters.compatible(session, stranger, on, wanted, after=0, limit=9) == []


def test_a_lineage_begins_at_the_version_asked_for_and_hides_what_is_not_the_callers(here: Upgrade) -> None:
    digest = here.push("zoo/bot")
    with here.world.database.read() as session:
        version = find_version(session, find_adapter(session, ADMIN, Reference.parse("zoo/bot").series),
                               Reference.parse("zoo/bot"))  # fmt: skip
        seen = adapters.lineage(session, ADMIN, version)
        hidden = adapters.lineage(session, caller("zoo", zoo=["read"]), version)
    assert [(node.ref, node.kind) for node in seen.nodes] == [("zoo/bot@v1", "adapter"), ("team/data@v1", "dataset")]
    assert [(node.ref, node.kind) for node in hidden.nodes] == [("zoo/bot@v1", "adapter"), (None, "unknown")]
    assert seen.edges == [(digest, here.data, "dataset")]


def test_the_log_tells_versions_and_moves_newest_first(here: Upgrade) -> None:
    here.world.later(seconds=5)
    here.serve(seed=9)
    with here.world.database.read() as session:
        adapter = find_adapter(session, ADMIN, Reference.parse("team/bot").series)
        told, _ = adapters.history(session, adapter, limit=3)
    assert {entry.event for entry in told} == {"version", "alias"}
    assert any("v1 → v2" in entry.detail for entry in told), [entry.detail for entry in told]
    assert [entry.at for entry in told] == sorted((entry.at for entry in told), reverse=True)


# ── policies ─────────────────────────────────────────────────────────────────


def test_an_adapters_policy_goes_before_its_namespaces(here: Upgrade) -> None:
    with here.world.database.read() as session, pytest.raises(PolicyNotFound):
        policies.show(session, ADMIN, "team", "bot")
    here.policy(POLICY)
    here.policy(POLICY.model_copy(update={"action": "ask"}), name="bot")
    here.policy(POLICY.model_copy(update={"action": "ask"}), name="bot")
    with here.world.database.read() as session:
        assert policies.show(session, ADMIN, "team", "bot").revision == 2
        assert policies.show(session, ADMIN, "team", "x").revision == 1
        assert policies.effective(session, "team", "bot").action == "ask"
        assert policies.effective(session, "nowhere", "x") == Policy()


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"gates": (Gate(suite="team/suit", metric="accuracy", margin=Margin(value=0.2)),)}, DatasetNotFound),
        ({"gates": (GATE.model_copy(update={"margin": Margin(value=0.01)}),)}, GateImpossible),
        ({"guard": GATE.model_copy(update={"margin": Margin(value=0.2, of_gain=True)})}, BadRequest),
        ({"recipe": "{"}, BadRequest), ({"recipe": '{"kind": "merge"}'}, BadRequest),
    ],
)  # fmt: skip
def test_a_policy_that_can_never_work_is_refused(
    here: Upgrade, changes: dict[str, object], refusal: type[Exception]
) -> None:
    with pytest.raises(refusal):
        here.policy(POLICY.model_copy(update=changes))


def test_taking_the_last_gate_from_an_alias_needs_admin(here: Upgrade) -> None:
    here.policy(POLICY)
    promoter, admin = caller("p", team=["read", "promote"]), caller("a", team=["admin"])
    wanting = Policy(evidence=Evidence.RECORDED)

    def put(who: Caller, name: str, policy: Policy) -> None:
        with here.world.database.write() as session:
            policies.put(session, who, "team", name, policy, here.world.now)

    put(promoter, "", POLICY.model_copy(update={"max_negative_flips": 0.2}))
    for name in ("", "bot"):  # an adapter's own policy goes before its namespace's
        for policy in (Policy(), POLICY.model_copy(update={"aliases": ("canary",)}), wanting):
            with pytest.raises(ScopeMissing):
                put(promoter, name, policy)
    put(admin, "bot", wanting)
    with pytest.raises(ScopeMissing):
        put(promoter, "bot", Policy())
    put(promoter, "bot", POLICY.model_copy(update={"evidence": Evidence.RECORDED}))


def test_setting_a_policy_needs_promote_and_the_suite_must_be_readable(here: Upgrade) -> None:
    with here.world.database.write() as session:
        with pytest.raises(ScopeMissing):
            policies.put(session, caller("a", team=["publish"]), "team", "", POLICY, here.world.now)
        with pytest.raises(DatasetNotFound):
            policies.put(session, caller("b", other=["promote"]), "other", "", POLICY, here.world.now)


def provenance(here: Upgrade, version: str) -> Provenance:
    with here.world.database.read() as session:
        adapter = find_adapter(session, ADMIN, Reference.parse("team/bot").series)
        row = find_version(session, adapter, Reference.parse(f"team/bot@{version}"))
        told = adapters.lineage(session, ADMIN, row)
    [found] = [node.provenance for node in told.nodes if node.digest == told.root]
    assert found is not None
    return found


def test_what_a_person_pushed_says_so_and_nothing_is_made_up(here: Upgrade) -> None:
    here.world.grant(ADMIN)
    found = provenance(here, "v1")
    assert (found.by, found.job, found.worker, found.recipe, found.device, found.versions) == (
        "admin", None, None, None, None, {},
    )  # fmt: skip
    assert found.datasets == [here.data]
    assert found.recorded == {}


def test_what_a_worker_made_says_by_which_job_recipe_worker_and_code(here: Upgrade) -> None:
    recipe = {"kind": "finetune", "base": "demo@r1", "datasets": ["team/data"], "steps": 2}
    ada = here.world.grant(caller("ada", team=["run", "publish", "read"]))
    with here.world.database.write() as session:
        asked = JobRequest(recipe=recipe, output=Output(adapter="team/bot"), queue="cpu")
        made, _ = jobs.submit(session, ada, asked, here.world.now)
    with here.world.database.write() as session:
        request = ClaimRequest(queue="cpu", worker="gpu-7")
        job = jobs.claim(session, WORKER, request, here.world.settings.lease_s, here.world.now, "loractl/9.9")
    assert job is not None and job.id == made.id
    done = here.results(job)
    done.result |= {"device": "H100", "versions": {"torch": "2.13.0"}}
    with here.world.database.write() as session:
        jobs.finish(session, here.world.store, WORKER, job.id, done, here.world.now)
    found = provenance(here, "v2")
    assert (found.by, found.job, found.kind, found.worker, found.attempt) == ("ada", job.id, "finetune", "gpu-7", 1)
    assert (found.recipe, found.device) == (job.recipe_digest, "H100")
    assert found.versions == {"loractl": "9.9", "torch": "2.13.0"}
