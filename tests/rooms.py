"""The import-linter contract behind the drawing of the rooms: who may import whom, as a list of what is allowed.

The built-in contracts say what is forbidden; a drawing says what is allowed, and everything else is not. The two
tables live in pyproject.toml, one line a room (`room -> the rooms it may import`) and one line a library (`library ->
the rooms that may import it`). Only direct imports are looked at: what a room may reach follows from the arrows.
"""

from collections.abc import Iterable, Mapping
from typing import cast

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output

Arrows = Mapping[str, frozenset[str]]


def arrows(lines: Iterable[str]) -> Arrows:
    """Parse `left -> a, b` lines; a name with nothing behind its arrow points nowhere."""
    parsed: dict[str, frozenset[str]] = {}
    for line in lines:
        left, arrow, right = (part.strip() for part in line.partition("->"))
        if not left or not arrow or left in parsed:
            raise fields.ValidationError(f"Expected one 'name -> name, name' line a name, got '{line}'.")
        parsed[left] = frozenset(name for part in right.split(",") if (name := part.strip()))
    return parsed


def room_of(module: str, rooms: Iterable[str]) -> str | None:
    """The innermost room that holds a module, None for a module that no room holds."""
    holding = [room for room in rooms if module == room or module.startswith(room + ".")]
    return max(holding, key=len, default=None)


class ArrowsField(fields.Field[Arrows]):
    """A table of arrows, given as a list of lines."""

    def parse(self, raw_data: str | list[str]) -> Arrows:
        return arrows([raw_data] if isinstance(raw_data, str) else raw_data)


class Rooms(Contract):
    """Every module stands in a room and imports only what the room's arrows, and the libraries' owners, allow."""

    rooms = ArrowsField()
    libraries = ArrowsField()

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        """Compare every direct import with the two tables."""
        _ = verbose
        rooms = cast(Arrows, self.rooms)
        libraries = cast(Arrows, self.libraries)
        ours = {name for name in graph.modules if not graph.is_module_squashed(name)}
        roots = {name.split(".")[0] for name in ours}
        findings = []
        for importer in sorted(ours):
            room = room_of(importer, rooms)
            if room is None and importer not in roots:
                findings.append(f"{importer} stands in no room: add its line to [tool.importlinter] in pyproject.toml")
            for imported in sorted(graph.find_modules_directly_imported_by(importer)):
                if imported in ours:
                    other = room_of(imported, rooms)
                    allowed = room == other or room is None or other is None or other in rooms[room]
                else:
                    owners = libraries.get(imported.split(".")[0])
                    allowed = owners is None or room_of(importer, owners) is not None
                if not allowed:
                    lines = [
                        detail["line_number"]
                        for detail in graph.get_import_details(importer=importer, imported=imported)
                    ]
                    findings.append(f"{importer} -> {imported} (l. {', '.join(map(str, lines))})")
        return ContractCheck(kept=not findings, metadata={"findings": findings})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """Print each import that no arrow allows."""
        for finding in check.metadata["findings"]:
            output.print_error(f"- {finding}", bold=False)
        output.new_line()
