"""A shelf answers as every adapter alone does, with few places; nothing stays of who was there before."""

import pytest
import torch

from registry.core.errors import NotRunnable
from tests.workers import factories
from workers.compute.bank import Bank, attached
from workers.compute.lora import Adapter, Patch
from workers.compute.shelf import Shelf

IDS = torch.randint(3, 259, (6, 9), generator=torch.Generator().manual_seed(1))


def many(model: object, count: int = 7) -> dict[str, Adapter]:
    """Of several ranks and targets; every third with DoRA, one with a whole module."""
    found = {}
    for i in range(count):
        targets = (("q_proj",), ("all-linear",), ("v_proj", "up_proj"))[i % 3]
        adapter = factories.random_adapter(model, seed=i, rank=2 + i % 4, targets=targets)
        if i % 3 == 2:
            lengths = {
                name: Patch(patch.a_RI, patch.b_OR, patch.scale, magnitude_O=torch.rand(len(patch.b_OR)) + 0.5)
                for name, patch in adapter.patches.items()
            }
            adapter = Adapter(lengths, adapter.config)
        found[str(i)] = adapter
    found["whole"] = Adapter(found["0"].patches, found["0"].config, {"lm_head.weight": torch.randn(259, 32)})
    return found


def test_whoever_is_asked_for_answers_as_alone_in_two_places() -> None:
    model = factories.llama(tied=False)
    adapters = many(model)
    shelf = Shelf(model, adapters, places=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    chance = torch.Generator().manual_seed(4)
    names = list(adapters)
    for _ in range(20):
        one, two = (names[i] for i in torch.randperm(len(names), generator=chance)[:2].tolist())
        with torch.no_grad(), shelf.attached():
            shelf.use([(one, 2), (None, 2), (two, 2)])
            found = model(input_ids=IDS).logits
        expected = [model(input_ids=IDS[2:4]).logits]
        for name, rows in ((one, IDS[:2]), (two, IDS[4:])):
            with torch.no_grad(), attached(model, adapters[name]):
                expected.insert(0 if name == one else 2, model(input_ids=rows).logits)
        torch.testing.assert_close(found, torch.cat(expected), atol=2e-5, rtol=1e-5)
        assert shelf.seated >= {one, two}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_device_holds_places_and_not_adapters() -> None:
    model = factories.llama()
    adapters = {str(i): factories.random_adapter(model, seed=i) for i in range(40)}
    shelf = Shelf(model, adapters, places=4)
    assert shelf.bytes == Bank(model, list(adapters.values())[:4]).theta_KP.nbytes
    assert len(shelf.seated) == 4


def test_who_was_asked_for_longest_ago_goes_first() -> None:
    model = factories.llama()
    shelf = Shelf(model, {name: factories.random_adapter(model, seed=i) for i, name in enumerate("abcd")}, places=3)
    shelf.use([("a", 1)])
    shelf.use([("d", 1)])
    assert shelf.seated == {"c", "a", "d"}
    shelf.use([("a", 1), ("d", 1)])
    shelf.use([("b", 1)])
    assert shelf.seated == {"a", "d", "b"}
    assert shelf.loaded == 5


def test_more_at_once_than_places_are_an_error_and_change_nothing() -> None:
    model = factories.llama()
    shelf = Shelf(model, {name: factories.random_adapter(model) for name in "abc"}, places=2)
    with pytest.raises(ValueError, match="3 adapters were asked for at once; there are 2 places"):
        shelf.use([("a", 1), ("b", 1), ("c", 1)])
    assert shelf.seated == {"a", "b"}


def test_a_bank_has_room_for_those_it_was_told_of() -> None:
    model = factories.llama()
    small, large = (factories.random_adapter(model, rank=rank) for rank in (2, 8))
    with pytest.raises(NotRunnable, match=r"no room for it at 'model.layers.0.self_attn.q_proj'"):
        Bank(model, [small]).seat(0, large)
    bank = Bank(model, [small], room_for=[large])
    bank.seat(0, large)
    with bank.attached():
        found = factories.logits(model)
    with attached(model, large):
        torch.testing.assert_close(found, factories.logits(model))
