"""What a recipe is run on: folders by role, and what people call the data in them.

A dataset that was pushed as one file lies here under a name that nobody gave it. Who reads it through `Inputs` is
refused in the words of who pushed it: ``'team/reviews@v3', line 17``; without such words by the names of the files.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from registry.core.errors import BadConfig
from registry.core.suites import SUITE_FILE

from .answers import read_inputs
from .data import Row, called, read_rows
from .evaluate import Suite

_DATASET = "dataset."


class Inputs(dict[str, Path]):
    """Folders by the roles of `registry.core.recipes.inputs_of`."""

    def __init__(self, folders: Mapping[str, Path], data: Mapping[str, str] | None = None) -> None:
        """``data``: role -> what people call the dataset or suite."""
        super().__init__(folders)
        self._data = dict(data or {})

    def rows(self) -> list[Row]:
        """The rows of all datasets, in the order of their roles."""
        roles = sorted((role for role in self if role.startswith(_DATASET)), key=lambda role: int(role[len(_DATASET):]))
        return [row for role in roles for row in read_rows(self[role], self._data.get(role, ""))]

    def unlabelled(self, role: str = "inputs") -> list[Row]:
        """The rows of one dataset, of which only the prompts are read."""
        return read_inputs(self[role], self._data.get(role, ""))

    def suite(self) -> Suite:
        """The suite."""
        return Suite.read(self["suite"], self._data.get("suite", ""))

    @contextmanager
    def naming(self) -> Iterator[None]:
        """What is wrong with a suite's settings, which may show late, is said of the suite."""
        try:
            yield
        except BadConfig as error:
            said, data = str(error.facts.get("path")), self._data.get("suite", "")
            if not data or not said.startswith(SUITE_FILE):
                raise
            raise BadConfig(**error.facts | {"path": called(said, data)}) from error
