"""Consoles and progress bars of all commands."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any


def console(width: int = 120, quiet: bool = False) -> Any:
    """Rich's, as wide as the terminal, or as `width` where there is none; quiet: one that prints nothing."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else width, quiet=quiet)


class Bar:
    """What a command has done: called with how much more that is."""

    def __init__(self, progress: Any, total: int | None, unit: str) -> None:
        self.progress, self.unit = progress, unit
        self.task = progress.add_task("", total=total, speed="", said="")

    def begin(self, total: int | None, done: int = 0) -> None:
        """Anew, with what was done before, which does not count as speed."""
        self.progress.reset(self.task, total=total, completed=done, speed="", said="")

    def say(self, text: str) -> None:
        """After everything else."""
        self.progress.update(self.task, said=text)

    def __call__(self, done: int) -> None:
        self.progress.advance(self.task, done)
        speed = self.progress.tasks[0].speed  # of the last half minute; None at first
        if speed:
            value, unit = (speed / 1e6, "MB") if self.unit == "bytes" else (speed, self.unit)
            self.progress.update(self.task, speed=f"{value:,.{0 if value >= 100 else 1}f} {unit}/s")


@contextmanager
def progress(name: str, total: int | None, unit: str, quiet: bool = False) -> Iterator[Bar]:
    """A bar on a terminal's stderr, gone at its end, with the speed and the time that is left. unit: of what is
    counted; "bytes" are shown as sizes."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    hidden = quiet or not sys.stderr.isatty()
    with Progress(
        TextColumn(name, markup=False),
        BarColumn(),
        *((DownloadColumn(),) if unit == "bytes" else (MofNCompleteColumn(), TextColumn(unit))),
        TextColumn("{task.fields[speed]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}", markup=False),
        console=Console(stderr=True),
        transient=True,
        disable=hidden,
        redirect_stdout=sys.stdout.isatty(),  # else what is printed to a file would be on the terminal
    ) as shown:
        yield Bar(shown, total, unit)


def plain(text: str, keep: str = "") -> str:
    """Text that nobody has checked, as a model's: what a terminal would act on is escaped, all but `keep`."""
    return "".join(one if one.isprintable() or one in keep else repr(one)[1:-1] for one in text)


def side_by_side(out: Any, title: str, texts: Sequence[tuple[str, str]], height: int | None = None) -> Any:
    """Named texts as the columns of a table; height: of it, in which there is room for their last lines alone."""
    from rich.table import Table
    from rich.text import Text

    heading = Text(plain(title))
    table = Table(title=heading, title_justify="left", expand=True)
    cells = []
    for name, text in texts:
        table.add_column(Text(name, overflow="fold"), ratio=1)
        cell = Text(plain(text, "\n"), overflow="fold")
        if height is not None:
            width = max(1, (out.width - 1) // len(texts) - 3)
            room = max(1, height - len(heading.wrap(out, out.width)) - 6)
            cell = Text("\n").join(cell.wrap(out, width)[-room:])
        cells.append(cell)
    table.add_row(*cells)
    return table


def show(out: Any, title: str, texts: Sequence[tuple[str, str]]) -> None:
    """Print named texts side by side, or where stdout is no terminal a line each."""
    if sys.stdout.isatty():
        out.print(side_by_side(out, title, texts))
    else:
        for name, text in [("prompt", title), *texts]:
            print(f"{name}: {plain(text)}", flush=True)


@contextmanager
def growing(out: Any, title: str, texts: Callable[[], Sequence[tuple[str, str]]]) -> Iterator[None]:
    """Show named texts at the end; on a terminal while they grow too, as many last lines as it has room for."""
    from rich.live import Live

    def shown() -> Any:
        return side_by_side(out, title, texts(), out.height)

    live = Live(get_renderable=shown, console=out, transient=True, refresh_per_second=8)
    with live if sys.stdout.isatty() else nullcontext():
        yield
    show(out, title, texts())
