"""What a command says: data on stdout (a table, or one JSON document), talk on stderr.

`command` makes a click command that takes ``--json`` and ``--debug``, shows its examples in its help, and
hands an `Output` to the function. Rich and plotext are imported when something is drawn, not before.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import cycle, pairwise
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID
    from rich.tree import Tree

SHOW_AFTER_S = 1.0
_BETWEEN = 3
"""Columns of a terminal between two of a table."""
_BLOCKS = "▁▂▃▄▅▆▇█"


class Command(click.Command):
    """A click command whose help ends with examples."""

    examples: Sequence[str] = ()

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        _ = ctx
        with formatter.section("Examples"):
            for example in self.examples:
                formatter.write(f"{'':>{formatter.current_indent}}{example}\n")


def command(
    group: click.Group | None, *examples: str, name: str | None = None
) -> Callable[[Callable[..., None]], Command]:
    """A command of ``group``: its function's first argument is an `Output`, its docstring is the help."""

    def make(function: Callable[..., None]) -> Command:
        def run(json_: bool, debug: bool, **options: Any) -> None:
            _ = debug  # cli.main looks at it
            function(Output(as_json=json_), **options)

        run.__doc__ = function.__doc__
        run.__click_params__ = getattr(function, "__click_params__", [])  # type: ignore[attr-defined]  # click's own mark
        decorate = click.command(name or function.__name__.replace("_", "-"), cls=Command)
        made = decorate(
            click.option("--json", "json_", is_flag=True, help="One JSON document on stdout, nothing else there.")(
                click.option("--debug", is_flag=True, help="Show the traceback of a failure.")(run)
            )
        )
        made.params.sort(key=lambda param: param.name in ("json_", "debug"))  # stable: last in the help
        made.examples = examples
        if group is not None:
            group.add_command(made)
        return made

    return make


class Output:
    """Where one command's data and talk go."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json

    def emit(self, document: Any, show: Callable[[], None]) -> None:
        """The command's one result: ``document`` as JSON, or whatever ``show`` prints for people."""
        if self.as_json:
            click.echo(json.dumps(plain(document), indent=2, ensure_ascii=False))
        else:
            show()

    def say(self, text: str) -> None:
        """Talk, on stderr."""
        click.echo(text, err=True)

    def progress(self, after: float = SHOW_AFTER_S) -> "Bar":
        """A progress bar on stderr, from ``after`` seconds on, where that is a terminal."""
        return Bar(after)

    @contextmanager
    def if_interrupted(self, text: str) -> Iterator[None]:
        """Say ``text`` when Ctrl-C ends what is inside."""
        try:
            yield
        except KeyboardInterrupt:
            self.say(f"\n{text}")
            raise


class Bar:
    """``bar(what, done, total)`` draws; a total of 0 is not known."""

    def __init__(self, after: float = SHOW_AFTER_S) -> None:
        self._from = time.monotonic() + after
        self._terminal = sys.stderr.isatty()
        self._rich: RichProgress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rich is not None:
            self._rich.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` bytes of ``what``."""
        self._draw(what, done, total, f"{size(done)} of {size(total)}" if total else "")

    def count(self, what: str, done: int, total: int, note: str) -> None:
        """``done`` of ``total`` steps, with a note behind the bar."""
        self._draw(what, done, total, f"{done} of {total}  {note}" if total else note)

    def _draw(self, what: str, done: int, total: int, note: str) -> None:
        if not self._terminal or time.monotonic() < self._from:
            return
        if self._rich is None:
            self._rich = self._start()
        if what not in self._tasks:
            self._tasks[what] = self._rich.add_task(what, total=total or None, note=note)
        self._rich.update(self._tasks[what], completed=done, total=total or None, note=note)

    def _start(self) -> "RichProgress":
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        rich = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(), TimeRemainingColumn(),
            console=Console(stderr=True), transient=True,
        )  # fmt: skip
        rich.start()
        return rich


# ── values as text ───────────────────────────────────────────────────────────


def plain(value: Any) -> Any:
    """JSON values of models, mappings, sequences and times."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json", by_alias=True)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def size(count: float) -> str:
    """Bytes for people: ``1.5 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def ago(at: datetime | None, now: datetime | None = None) -> str:
    """``3 min ago``; the date when that is over a month ago."""
    if at is None:
        return ""
    seconds = ((now or datetime.now(UTC)) - at).total_seconds()
    for limit, unit, length in ((90, "s", 1), (5400, "min", 60), (129600, "h", 3600), (2592000, "d", 86400)):
        if abs(seconds) < limit:
            amount = f"{abs(seconds) / length:.0f} {unit}"
            return f"{amount} ago" if seconds >= 0 else f"in {amount}"
    return f"{at:%Y-%m-%d}"


def short(digest: str | None) -> str:
    """The algorithm and twelve digits of a digest; other text as it is."""
    algorithm, colon, digits = (digest or "").partition(":")
    return f"{algorithm}:{digits[:12]}" if colon and len(digits) == 64 else digest or ""


def number(value: float | None) -> str:
    """Four digits of a score."""
    return "" if value is None else f"{value:.4g}"


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """The course of ``values`` in one line of blocks: the mean of each of ``width`` stretches."""
    if not values:
        return ""
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    spread = (high - low) or 1.0
    return "".join(_BLOCKS[round((mean - low) / spread * (len(_BLOCKS) - 1))] for mean in means)


# ── drawings for people ──────────────────────────────────────────────────────


def table(headings: Sequence[str], rows: Iterable[Sequence[object]], *, empty: str = "Nothing there.") -> None:
    """A table on stdout; ``empty`` instead when there is no row.

    Columns with nothing in them are left out. Where the words of a row do not fit side by side, it is printed as lines
    of its own: an id that is broken in two can be copied by nobody.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    told = [["" if cell is None else str(cell) for cell in row] for row in rows]
    if not told:
        click.echo(empty)
        return
    kept = [i for i in range(len(headings)) if i == 0 or any(row[i] for row in told)]
    console = _console()
    room = console.width - _BETWEEN * (len(kept) - 1)
    widths = _widths([[headings[i], *(row[i] for row in told)] for i in kept], room)
    if widths is None:
        for i, row in enumerate(told):
            if i:
                click.echo()
            fields({headings[j] or "name": row[j] for j in kept})
        return
    drawn = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i, width in zip(kept, widths, strict=True):
        drawn.add_column(headings[i], width=width)
    for row in told:
        drawn.add_row(*(Text(row[i]) for i in kept))
    console.print(drawn)


def _widths(columns: Sequence[Sequence[str]], room: int) -> list[int] | None:
    """Of columns (their cells), each as wide as its longest word, and wider where that helps most; None: no room."""
    from rich.cells import cell_len

    widths = [max(1, *(cell_len(word) for cell in column for word in cell.split())) for column in columns]
    wanted = [max(1, *(cell_len(line) for cell in column for line in cell.splitlines())) for column in columns]
    room -= sum(widths)
    while room > 0 and widths != wanted:
        i = max(range(len(widths)), key=lambda i: wanted[i] / widths[i])
        widths[i], room = widths[i] + 1, room - 1
    return widths if room >= 0 else None


def fields(pairs: Mapping[str, object]) -> None:
    """``name  value`` lines; empty values are left out."""
    width = max(map(len, pairs), default=0)
    for name, value in pairs.items():
        if value not in (None, "", [], {}):
            click.echo(f"{name:<{width}}  {value}")


def tree(drawn: "Tree") -> None:
    """A rich tree on stdout."""
    _print(drawn)


def markdown(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""

    def text(cell: object) -> str:
        return ("" if cell is None else str(cell)).replace("|", "\\|").replace("\n", " ")

    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(map(text, line))} |" for line in lines)


def plot(curves: Mapping[str, Sequence[tuple[float, float]]], *, title: str, x: str) -> str:
    """Curves as text, for a terminal of 80 columns; each has its own mark, which the title explains."""
    import plotext

    figure = plotext.figure
    figure.clear.all()
    figure.theme("colorless")
    figure.plot_size(80, 16)
    figure.legend(False)  # it would lie over the beginning of the curves
    markers = dict(zip(curves, cycle("•×+o*#"), strict=False)) if len(curves) > 1 else {}
    for label, points in curves.items():
        xs, ys = zip(*points, strict=True)
        signal = figure.signal(list(xs), list(ys), marker=markers.get(label, "braille"))
        signal.lines()
        figure.draw(signal)
    figure.title("   ".join([title, *(f"{marker} {label}" for label, marker in markers.items())]))
    figure.label(x, axis=0)
    return "\n".join(line.rstrip() for line in str(plotext.uncolorize(str(figure.build()))).splitlines())


def _print(drawn: object) -> None:
    _console().print(drawn)


def _console() -> "Console":
    from rich.console import Console

    # A pipe has no width: nothing is cut there.
    return Console(width=None if sys.stdout.isatty() else 240, highlight=False)
