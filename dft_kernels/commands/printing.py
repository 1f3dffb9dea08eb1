"""Consoles and progress bars of all commands."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def console(width: int = 120, quiet: bool = False) -> Any:
    """Rich's, as wide as the terminal, or as `width` where there is none; quiet: one that prints nothing."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else width, quiet=quiet)


@contextmanager
def progress(name: str, total: int | None, unit: str = "", quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal's stderr, gone at its end; yields what advances it. unit: "bytes" shows sizes."""
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

    count = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn(name, markup=False), BarColumn(), count, TextColumn(unit if unit != "bytes" else ""))
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    hidden = quiet or not sys.stderr.isatty()
    with Progress(*columns, *times, console=Console(stderr=True), transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.advance(task, done)
