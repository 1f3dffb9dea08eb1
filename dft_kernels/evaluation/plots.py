"""Pictures of what a model was measured to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .gap import FORCED, OWN, Gap
from .held_out import HeldOut


def gaps(found: Sequence[Gap], title: str, file: Path) -> None:
    """Every statistic's distance in units of its floor, on a logarithmic axis."""
    shown = [gap for gap in found if 0 < gap.ratio < float("inf")]
    figure = _figure(8, 1.2 + 0.28 * len(shown))
    axes = figure.subplots()
    colours = {FORCED: "tab:gray", OWN: "tab:blue"}
    names = [f"{gap.statistic} ({gap.reading})" for gap in shown]
    axes.barh(names, [gap.ratio for gap in shown], color=[colours[gap.reading] for gap in shown])
    axes.axvline(1.0, color="black", linestyle=":", label="human against human")
    axes.set(xscale="log", xlabel="distance / what human writing of this size is off by", title=title)
    axes.invert_yaxis()
    axes.legend()
    _write(figure, file)


def curves(found: Mapping[str, Sequence[tuple[int, HeldOut]]], teacher: HeldOut, file: Path) -> None:
    """KL, perplexity and entropy on held-out text over the steps of several runs, and those of their teacher."""
    figure = _figure(12, 3.6)
    panels = {"kl": "KL(teacher || student), nats", "perplexity": "perplexity", "entropy": "entropy, nats"}
    for axes, (attribute, label) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for name, curve in found.items():
            axes.plot([step for step, _ in curve], [getattr(one, attribute) for _, one in curve], "o-", label=name)
        if attribute != "kl":
            axes.axhline(getattr(teacher, attribute), color="gray", ls=":", label="teacher")
        axes.set(xlabel="step", title=f"{label}, held-out text", yscale="linear" if attribute == "entropy" else "log")
        axes.legend()
    _write(figure, file)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="tight")


def _write(figure: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
