"""An upgrade whose jobs a real worker does, across a change of shape: from the new base to the alias that moves."""

from pathlib import Path

from registry.core.policy import Gate, Margin, Policy
from registry.daemons import scheduler
from registry.schemas import CampaignItemInfo, UpgradeRequest, Wishes
from registry.transfer import push_base, push_dataset
from tests.factories import letters, tiny_llama
from tests.workers.test_jobs import TRAINING, House, house

TIERS = ("transport", "warm-start", "retrain")


def test_an_adapter_goes_on_serving_on_a_base_of_another_width(tmp_path: Path) -> None:
    (tmp_path / "registry").mkdir()
    with house(tmp_path, tiny_llama(tmp_path / "narrow")) as home:
        client = home.client
        letters(tmp_path)
        push_dataset(client, "dataset", tmp_path / "data.jsonl", "team/letters")
        push_dataset(client, "suite", tmp_path / "suite.jsonl", "team/letters-test", spec={"metrics": ["accuracy"]})
        changes = {
            "datasets": ["team/letters"], "rank": 4, "steps": 120, "batch_tokens": 256, "learning_rate": 5e-3,
            "checkpoint_every": 0,
        }  # fmt: skip
        home.submit(TRAINING | changes, adapter="team/bot", aliases=["prod"])
        with home.working():
            pass
        gate = Gate(suite="team/letters-test", metric="accuracy", margin=Margin(value=0.1))
        client.set_policy("team/bot", Policy(gates=(gate,), max_negative_flips=0.3, tiers=TIERS))
        push_base(client, tiny_llama(tmp_path / "wide", seed=1, width=48), Wishes(line="demo"))
        item = carried(home)
        assert item.state == "promoted", item
        old, new = (client.resolve("team/bot:prod", base=f"demo@r{number}") for number in (1, 2))
        assert new.version.ref == f"team/bot@{item.final}"
        assert old.version.ref == "team/bot@v1"
        assert new.version.base == client.base("demo@r2").digest
        assert new.version.evidence == "recorded"
        tried = list(item.verdicts)
        assert tried == list(TIERS[: len(tried)])  # in order, and none after the one that passed
        assert [item.verdicts[tier]["zone"] == "pass" for tier in tried] == [*([False] * (len(tried) - 1)), True]
        family = client.lineage("team/bot", item.final).nodes
        made = family[0].recipe
        assert made is not None and made["tier"] == tried[-1] != "transport"
        begun_at = client.version("team/bot", made["made"]["transport"])
        assert {node.ref for node in family} >= {"team/bot@v1", begun_at.ref}, "what it was carried from, and began at"


def carried(home: House) -> CampaignItemInfo:
    """The adapter's part in an upgrade of the line, when it is over."""
    asked = UpgradeRequest(line="demo", to="demo@r2", old="demo@r1", queue="cpu")
    campaign = home.client.start_upgrade(home.client.create_upgrade(asked).id)
    for _ in range(12):
        scheduler.step(home.registry.parts)
        with home.working():
            pass
        campaign = home.client.upgrade(campaign.id)
        if campaign.state == "finished":
            break
    assert campaign.state == "finished", campaign
    [item] = campaign.items
    return item
