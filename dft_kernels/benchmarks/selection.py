"""Which cases are measured, and of which implementations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..backends import BACKENDS
from .implementations import NARROW, OURS, Call
from .inputs import Inputs
from .peers import everyone
from .problems import DISTANCES, PRESETS, RANDOM, REAL, Case, Preset, Shape, sweep

SWEPT = ("cross_entropy", "forward_kl")  # the losses of a sweep, and of a real model's inputs, where none is named
REAL_ROWS = 512  # of a real model's inputs, where no shape is named


def cases(
    device: str,
    preset: str | None = None,
    shapes: Sequence[Shape] | None = None,
    sweeps: Sequence[str] = (),
    dtypes: Sequence[str] | None = None,
    losses: Sequence[str] | None = None,
    parts: Sequence[str] = ("both",),
    inputs: str = RANDOM,
) -> dict[Case, bool]:
    """The cases of a preset, or of these instead, in order, and whether their errors are measured: not in a sweep,
    nor in edges, which are about time and memory, since float64 at its largest sizes takes long and shows nothing new.

    inputs: of a real model there is a case for each distance of a teacher."""
    known = PRESETS[preset or "quick"]
    if inputs != RANDOM and preset is None:
        known = Preset("", (Shape(REAL_ROWS, *REAL[inputs]),), SWEPT)
    bases, kinds = list(shapes or known.shapes), dtypes or known.dtypes
    found = {
        Case(shape, dtype, loss, part, device, inputs, distance): known.errors or bool(shapes)
        for shape in bases
        for dtype in kinds
        for loss in losses or known.losses
        for distance in (DISTANCES if inputs != RANDOM and loss != "cross_entropy" else (0.0,))
        for part in parts
    }
    for dimension in sweeps or (() if shapes else known.sweeps):
        for shape in sweep(dimension, bases[0]):
            for loss in losses or SWEPT:
                found.setdefault(Case(shape, kinds[0], loss, parts[0], device), False)
    return found


def names(
    loss: str | None = None, backends: Sequence[str] | None = None, peers: Sequence[str] | None = None
) -> list[str]:
    """Implementations that have a loss, ours first: of these backends, and of these beginnings of names; None: all."""
    table = everyone()
    begins = None if peers is None else tuple(peers)
    left = [OURS + name for name in (BACKENDS if backends is None else backends)]
    left += [name for name in (NARROW,) if backends is None and name in table]
    left += [name for name, each in table.items() if not each.ours and (begins is None or name.startswith(begins))]
    return [name for name in left if loss is None or loss in table[name].losses]


def check_peer(begin: str) -> None:
    """ValueError where no other implementation's name begins so."""
    others = [name for name, each in everyone().items() if not each.ours]
    if not any(name.startswith(begin) for name in others):
        raise ValueError(
            f"bench: peer must begin names of implementations, got {begin!r}. They are: {', '.join(others)}."
        )


def prepared(name: str, case: Case) -> Call | str:
    """An implementation ready to call, or why it does not run here."""
    try:
        return everyone()[name].prepare(case)
    except Exception as reason:  # an import may raise anything
        return str(reason)


def trace(case: Case, names: Sequence[str], path: Path, file: Path | None = None) -> str:
    """Write a profile of one forward and backward, for chrome://tracing, of the first of `names` that runs here; its
    name."""
    ready = ((name, prepared(name, case)) for name in names)
    name, call = next(((name, call) for name, call in ready if callable(call)), ("", None))
    if call is None:
        raise ValueError(f"bench: trace must have an implementation of {case} that runs here, got none. See --list.")
    x = Inputs.make(case, 0, file)
    call(x).backward()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if case.device == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=kinds, record_shapes=True, acc_events=True) as profile:
        call(x).backward()
        if case.device == "cuda":
            torch.cuda.synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    profile.export_chrome_trace(str(path))
    return name
