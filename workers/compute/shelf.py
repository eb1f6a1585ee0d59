"""Thousands of adapters in host memory, and a bounded number of them on the device (Sheng et al., arXiv:2311.03285).

What the model computes with are the places of one bank. Whoever is asked for and has none takes that of the one whose
last turn is longest ago; its factors are written over the other's, and the base is never touched.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from .bank import Bank, Rows
from .lora import Adapter
from .model import Model


class Shelf:
    """Adapters by name, at most ``places`` of them on the model's device at a time.

    `NotRunnable` names what of an adapter does not fit the model.
    """

    def __init__(self, model: Model, adapters: Mapping[str, Adapter], places: int) -> None:
        self.adapters = dict(adapters)
        first = list(self.adapters)[:places]
        self._bank = Bank(model, [self.adapters[name] for name in first], room_for=self.adapters.values())
        self._places = {name: place for place, name in enumerate(first)}  # the one asked for longest ago comes first
        self.loaded = len(first)
        """How often an adapter was brought to the device."""

    @property
    def bytes(self) -> int:
        """Memory on the device of the factors of all places, in bytes."""
        return self._bank.theta_KP.nbytes

    @property
    def seated(self) -> frozenset[str]:
        """Whose factors are on the device."""
        return frozenset(self._places)

    def use(self, rows: Sequence[tuple[str | None, int]]) -> None:
        """Say whose the rows of the coming batches are, as in `Bank.assign`, and bring who is not on the device.

        ValueError when there are more of them than places.
        """
        names = [name for name, _ in rows if name is not None]
        asked = dict.fromkeys(names)
        if len(asked) > (places := len(self._bank.adapters)):
            raise ValueError(f"{len(asked)} adapters were asked for at once; there are {places} places")
        free = [name for name in self._places if name not in asked]
        for name in asked:
            place = self._places.pop(name, None)
            if place is None:
                place = self._places.pop(free.pop(0))
                self._bank.seat(place, self.adapters[name])
                self.loaded += 1
            self._places[name] = place
        whose: Rows = [(None if name is None else self._places[name], count) for name, count in rows]
        self._bank.assign(whose)

    def touches(self, module: nn.Module | None) -> bool:
        """Whether any adapter changes what this module answers."""
        return self._bank.touches(module)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The model answers as adapted inside the block, and as it was after it."""
        with self._bank.attached():
            yield
