"""What a worker of `dft-kernels bench` may meet: in a file that imports little, since every worker imports it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dft_kernels.benchmarks import measure
from dft_kernels.benchmarks.implementations import EAGER, Implementation, Unavailable
from dft_kernels.benchmarks.inputs import Inputs
from dft_kernels.benchmarks.problems import LOSSES, Case, Shape

SMALL = Case(Shape(24, 16, 96), "float32", "forward_kl", "both", "cpu")


def _fake(action: Callable[[Inputs], Any], name: str, compiled: bool = False) -> Implementation:
    def prepare(case: Case) -> Callable[[Inputs], Tensor]:
        def call(x: Inputs) -> Tensor:
            # not in the small call before memory is measured
            more = action(x) if len(x.hidden) == SMALL.shape.n else None
            return EAGER.prepare(case)(x) + (0.0 if more is None else more)

        return call

    return Implementation(name, "torch", tuple(LOSSES), prepare, compiled)


BLOCK = 192 << 20


def _allocate(x: Inputs) -> None:
    torch.ones(BLOCK, dtype=torch.int8)


def _wrong(x: Inputs) -> Tensor:
    return x.hidden.sum()


def _too_much(x: Inputs) -> None:
    torch.ones(1 << 36, dtype=torch.int8)


def _raise(x: Inputs) -> None:
    raise RuntimeError("this machine\nis not for me")


def _die(x: Inputs) -> None:
    print("so long", flush=True)
    os._exit(3)


def _hang(x: Inputs) -> None:
    time.sleep(600)


def _unavailable(case: Case) -> Any:
    raise Unavailable("only on Sundays")


def _not_installed(case: Case) -> Any:
    raise ImportError("No module named 'peer'")


def crowd() -> dict[str, Implementation]:
    """What a worker may meet. At module level, so that a worker can import it."""
    made = [
        EAGER,
        _fake(_allocate, "allocates"),
        _fake(_too_much, "wants 64 GB"),
        _fake(_raise, "raises"),
        _fake(_wrong, "is another loss"),
        _fake(_die, "dies"),
        Implementation("unavailable", "none", tuple(LOSSES), _unavailable),
        Implementation("not installed", "none", tuple(LOSSES), _not_installed),
    ]
    return {each.name: each for each in made}


def _dies_in_float64(case: Case) -> Callable[[Inputs], Tensor]:
    """Prepared so that the oracle after it ends the process."""

    def die(*_: Any) -> None:
        os._exit(4)

    measure.Exact = die  # type: ignore[assignment,misc]  # in the worker alone
    return EAGER.prepare(case)


def slow_crowd() -> dict[str, Implementation]:
    return {"hangs": _fake(_hang, "hangs"), EAGER.name: EAGER}


def unlucky_crowd() -> dict[str, Implementation]:
    return {EAGER.name: Implementation(EAGER.name, "torch", tuple(LOSSES), _dies_in_float64)}
