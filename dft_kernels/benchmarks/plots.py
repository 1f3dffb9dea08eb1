"""Pictures of rows: time and memory over N, V and H, and the roofline."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .problems import LOSSES, RANDOM, Case
from .tables import Row, by_case

DIMENSIONS = ("n", "v", "h")
_SAME = {"n": "N", "v": "V", "h": "H"}
LOST = {"out of memory": "x", "timed out": "+"}  # marks of the first size that was not measured


def series(rows: Iterable[Row], dimension: str) -> list[tuple[str, list[Row]]]:
    """Rows that differ in `dimension` alone, three sizes at least: (what they share, rows in order)."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.status != "skipped":
            shape = row.case.shape._replace(**{dimension: 0})
            key = (row.machine, row.dtype, row.loss, row.part, shape, row.inputs, row.distance)
            groups.setdefault(key, []).append(row)
    found = []
    for (_, dtype, loss, part, shape, inputs, distance), group in groups.items():
        if len({getattr(row, dimension) for row in group}) >= 3:
            fixed = ", ".join(f"{_SAME[name]} {size}" for name, size in shape._asdict().items() if name != dimension)
            kind = "" if part == "both" else f", {part}"
            kind += f", KL {distance:g}" if distance else ""
            fixed += "" if inputs == RANDOM else f", {inputs}"
            found.append(
                (
                    f"{LOSSES[loss].title}{kind}: {fixed}, {dtype}",
                    sorted(group, key=lambda row: getattr(row, dimension)),
                )
            )
    return found


def _style(names: list[str]) -> dict[str, dict[str, Any]]:
    from matplotlib import colormaps

    colours = colormaps["tab20"].colors  # type: ignore[attr-defined]
    styles = {}
    for place, name in enumerate(names):
        ours = name.startswith("dft_kernels")
        styles[name] = {
            "color": colours[place % len(colours)],
            "linewidth": 2.6 if ours else 1.2,
            "marker": "o" if ours else ".",
            "zorder": 3 if ours else 2,
        }
    return styles


def _scaling(axes: Any, dimension: str, title: str, rows: list[Row], styles: dict[str, dict[str, Any]]) -> None:
    """Time left, memory right; a mark of `LOST` where an implementation ended."""
    time, memory = axes
    for name, style in styles.items():
        mine = [row for row in rows if row.implementation == name]
        for axis, value in ((time, lambda row: row.ms), (memory, lambda row: row.peak_bytes / 1e6)):
            points = [(getattr(row, dimension), value(row)) for row in mine if row.status == "ok"]
            points = [(x, y) for x, y in points if not math.isnan(y) and y > 0]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, **style)
                last, height = points[-1]
                for status, mark in LOST.items():
                    fell = [size for row in mine if row.status == status and (size := getattr(row, dimension)) > last]
                    if fell:
                        axis.plot([last, fell[0]], [height] * 2, ":", color=style["color"])
                        axis.plot(fell[0], height, mark, markersize=11, markeredgewidth=3, color=style["color"])
    floor = sorted({(getattr(row, dimension), row.floor_ms) for row in rows if row.status == "ok"})
    lowest = {x: min(y for other, y in floor if other == x) for x, _ in floor}
    if lowest:
        time.plot(*zip(*lowest.items(), strict=True), "k--", label="floor", linewidth=1.5)
    for axis, unit in ((time, "ms"), (memory, "peak MB")):
        axis.set(xscale="log", yscale="log", xlabel=_SAME[dimension], ylabel=unit)
        axis.grid(alpha=0.3)
    time.set_title(title, fontsize=9)
    memory.set_title("; ".join(f"{mark}: {status}" for status, mark in LOST.items()), fontsize=9)
    time.legend(fontsize=6)


def _roofline(axis: Any, rows: list[Row], styles: dict[str, dict[str, Any]]) -> None:
    """Useful FLOP/s over the FLOP of the floor per byte that must move."""
    measured = [row for row in rows if row.status == "ok" and not math.isnan(row.product_flops)]
    peak, bandwidth = max(row.product_flops for row in measured), max(row.copy_bytes for row in measured)

    def intensity(case: Case) -> float:
        return case.flops() / case.compulsory_bytes()

    places = [intensity(row.case) for row in measured]
    low, high = min(*places, 0.3 * peak / bandwidth), 3 * max(places)
    ridge = [low, peak / bandwidth, max(high, 3 * peak / bandwidth)]
    axis.plot(ridge, [min(peak, bandwidth * x) / 1e9 for x in ridge], "k-", label="product, copy: measured")
    for case, group in by_case(measured):
        fastest = min(row.floor_ms for row in group)
        axis.plot(intensity(case), case.flops() / fastest / 1e6, "k_", markersize=14)
    for name, style in styles.items():
        mine = [row for row in measured if row.implementation == name]
        axis.plot(
            [intensity(row.case) for row in mine],
            [row.case.flops() / row.ms / 1e6 for row in mine],
            linestyle="",
            label=name,
            **{**style, "markersize": 8 if name.startswith("dft_kernels") else 6},
        )
    axis.set(xscale="log", yscale="log", xlabel="FLOP of the floor / compulsory byte", ylabel="GFLOP/s of the floor")
    axis.set_title("roofline; – the floor", fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=6)


def draw(rows: list[Row], path: Path) -> None:
    """One PNG: a line of panels for each sweep there is, and the roofline of every machine and dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row.status != "skipped"]
    names = list(dict.fromkeys(row.implementation for row in rows))
    styles = _style(names)
    sweeps = [(dimension, *found) for dimension in DIMENSIONS for found in series(rows, dimension)]
    ok = [row for row in rows if row.status == "ok" and not math.isnan(row.product_flops)]
    roofs = list(dict.fromkeys((row.machine, row.dtype) for row in ok))
    if not sweeps and not roofs:
        raise ValueError("bench: a plot needs rows that were measured, got none. See the table for the reasons.")
    panels = len(sweeps) + len(roofs)
    figure, grid = pyplot.subplots(panels, 2, figsize=(12, 4.6 * panels), squeeze=False)
    for axes, (dimension, title, group) in zip(grid, sweeps, strict=False):
        _scaling(axes, dimension, title, group, styles)
    for axes, (machine, dtype) in zip(grid[len(sweeps) :], roofs, strict=True):
        group = [row for row in rows if (row.machine, row.dtype) == (machine, dtype)]
        _roofline(axes[0], [row for row in group if row.status == "ok"], styles)
        axes[1].axis("off")
        axes[1].text(0, 1, f"{machine}\n{dtype}", va="top", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
