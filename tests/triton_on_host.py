"""The Triton kernels as Triton compiles them for sm_90, on the CPU (ptx_on_host): each case through the backend, within
the gate of the table.

Run as a program with the names of cases, without TRITON_INTERPRET; prints one JSON line a case and dtype: case, dtype,
what was wrong or null, and the kernels that it launched. Beside those of the table: active, scaled, columns.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
from typing import Any

import ptx_on_host
import torch
from cases import CASES, Case, compare, make
from ptx_on_host.translate import UnknownPtxError, entries_of
from triton_resources import OPTIONS, specialised, stand_in

import triton_ops.scaling
from dft_kernels import linear_distribution_loss, linear_distribution_statistics
from dft_kernels.testing import relative_error

MACHINE = ptx_on_host.machine()
LIBRARY = ctypes.CDLL(str(MACHINE))
LIBRARY.ptx_launch.restype = ctypes.c_char_p
NUMBERS = {"i32": ctypes.c_int32, "fp32": ctypes.c_float}
launched: set[str] = set()


def launch(
    kernel: Any, grid: tuple[int, ...], where: torch.Tensor, *arguments: Any, options: Any = OPTIONS, **more: Any
) -> None:
    """A stand-in for `launch.launch`."""
    if min(grid) == 0:
        return
    one = specialised(kernel, arguments, options, more)
    compiled = one.compiled(90)
    (entry,) = entries_of(compiled.asm["ptx"])
    path = MACHINE.parent / f"{kernel.__name__}-{hashlib.sha256(entry.source.encode()).hexdigest()[:16]}"
    if not path.with_suffix(".cpp").exists():
        path.with_suffix(".cpp").write_text(entry.source)
    held = []
    for kind, value in zip(one.signature.values(), arguments, strict=False):
        if kind.startswith("*"):
            held.append(ctypes.c_void_p(value.data_ptr()))
        elif kind != "constexpr":
            held.append(NUMBERS[kind](value))
    held += [ctypes.c_void_p()] * 2  # scratch memory, of which these kernels have none
    parameters = (ctypes.c_void_p * len(held))(*(ctypes.addressof(value) for value in held))
    sizes = [ctypes.c_uint(n) for n in (*grid, 1, 1)[:3]]
    threads, shared = ctypes.c_uint(32 * compiled.metadata.num_warps), ctypes.c_size_t(compiled.metadata.shared)
    said = LIBRARY.ptx_launch(str(path).encode(), *sizes, threads, shared, parameters)
    if said is not None:
        raise RuntimeError(said.decode())
    launched.add(kernel.__name__)


def both(case: Case, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """Its arguments for the oracle, and for the backend."""
    return make(case, torch.float64), make(case, dtype) | {"backend": "triton"}


def check(ours: torch.Tensor, exact: torch.Tensor, most: float) -> None:
    error = relative_error(ours, exact)
    assert error <= most, f"error {error:.2e}, allowed {most:.2e}"


def active(dtype: torch.dtype) -> None:
    """Gradients within a bound, a wide one and one that keeps all but everything."""
    for bound, rounding in ((0.01, 2e-3), (1e-5, 0.0 if dtype == torch.float32 else 4e-3)):
        exact, ours = both(CASES["cross_entropy"]._replace(shape=(70, 64, 2064)), dtype)
        linear_distribution_loss(**exact).backward()
        linear_distribution_loss(**ours, gradient_error=bound).backward()
        for name in ("hidden", "weight"):
            check(ours[name].grad, exact[name].grad, bound + rounding)


def scaled(dtype: torch.dtype) -> None:
    """A finished gradient times a factor, and times 1."""
    x = torch.randn(70, 100, dtype=torch.float64).to(dtype)
    ours = x.clone()
    for factor in (1.0, 3.0):
        triton_ops.scaling.scale(ours, torch.tensor([factor]))
    assert torch.equal(ours, 3.0 * x)


def columns(dtype: torch.dtype) -> None:
    """Mean probabilities by groups."""
    exact, ours = both(CASES["potential"], dtype)
    taken = ("hidden", "weight", "target", "group", "num_groups", "backend")
    means = [
        linear_distribution_statistics(**{name: x for name, x in arguments.items() if name in taken}).mean_probability
        for arguments in (exact, ours)
    ]
    check(means[1], means[0], 1e-5 if dtype == torch.float32 else 3e-2)


ADDED = {"active": active, "scaled": scaled, "columns": columns}


def main(names: list[str]) -> None:
    stand_in(launch)
    for name in names:
        for dtype in (torch.float32, torch.bfloat16):
            launched.clear()
            wrong = None
            try:
                if name in ADDED:
                    ADDED[name](dtype)
                else:
                    n, h, v = CASES[name].shape
                    shape = (
                        n,
                        h,
                        v if dtype == torch.float32 else 16 * -(-v // 16),
                    )  # by number, and 16 bytes at a time
                    compare(CASES[name]._replace(shape=shape), dtype, "triton")
            except (AssertionError, RuntimeError, UnknownPtxError) as error:
                wrong = str(error)
            line = {"case": name, "dtype": str(dtype), "wrong": wrong, "launched": sorted(launched)}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
