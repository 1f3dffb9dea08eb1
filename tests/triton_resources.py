"""Compile every specialisation of the Triton kernels that the table of cases launches, for a GPU that is not here.

Run as a program with the architecture (80, 90, 100), without TRITON_INTERPRET; prints one JSON line a specialisation:
kernel, constants, registers, spilled and stack bytes, shared memory, instructions that are products or asynchronous
copies. The plain `ptxas` of the Triton package does not take the PTX of every target, `ptxas-blackwell` does.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from cases import CASES, Case, make
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import dft_kernels.backends.active
import triton_ops.active
import triton_ops.columns
import triton_ops.launch
import triton_ops.rows
import triton_ops.scaling
from dft_kernels import linear_distribution_loss, linear_distribution_statistics
from dft_kernels.backends.triton import TritonBackend
from triton_ops.launch import OPTIONS

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
}
NOT_SPECIALISED = ("statistics_stride", "cotangents_stride")
PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas-blackwell"


class Specialised(NamedTuple):
    """What Triton compiles for a launch. options: of the launch."""

    kernel: Any
    signature: dict[str, str]
    fixed: dict[str, Any]
    hints: dict[tuple[int], Any]
    options: Any

    def compiled(self, architecture: int) -> Any:
        source = ASTSource(self.kernel, self.signature, self.fixed, self.hints)
        return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(self.options))

    @property
    def shown(self) -> dict[str, Any]:
        return {name: getattr(value, "__name__", value) for name, value in self.fixed.items()}


def specialised(kernel: Any, arguments: tuple[Any, ...], options: Any, more: dict[str, Any]) -> Specialised:
    """As Triton does it."""
    signature, fixed, hints = {}, dict(more), {}
    for place, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        aligned = False
        free = isinstance(value, int) and name in NOT_SPECIALISED
        if value is None or (isinstance(value, int) and value == 1 and not free):
            signature[name], fixed[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], aligned = POINTERS[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, int):
            signature[name], aligned = "i32", value % 16 == 0 and not free
        else:
            signature[name] = "fp32"
        if aligned:
            hints[(place,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(more, "constexpr")
    return Specialised(kernel, signature, fixed, hints, options)


def record(into: dict[str, Specialised]) -> Any:
    """A stand-in for `launch.launch` that keeps what Triton would have compiled."""

    def launch(
        kernel: Any, grid: tuple[int, ...], where: torch.Tensor, *arguments: Any, options: Any = OPTIONS, **more: Any
    ) -> None:
        one = specialised(kernel, arguments, options, more)
        into.setdefault(json.dumps([kernel.__name__, one.signature, one.shown, sorted(map(str, one.hints))]), one)

    return launch


def tile(left: torch.Tensor, gathers: bool) -> dict[str, Any]:
    """`launch.product_tile` of a GPU with the memory for the large one."""
    return {**triton_ops.launch.product_tile(left, gathers), "WIDE": False}


def stand_in(launch: Any) -> None:
    """This one in the place of Triton's launches, and the backend as on a GPU with much memory."""
    for module in (triton_ops.rows, triton_ops.columns, triton_ops.active, triton_ops.scaling):
        module.launch = launch
    triton_ops.active.product_tile, dft_kernels.backends.active.PREPARES = tile, 0
    triton_ops.launch.roomy = lambda left: left.element_size() == 2
    TritonBackend.unavailable = lambda self, device, dtype: None


def specialisations() -> list[Specialised]:
    """What the table of cases launches, in shapes as models have them: V divisible by 16, and not."""
    found: dict[str, Specialised] = {}
    stand_in(record(found))
    for case in CASES.values():
        for vocab in (8192, 8193):
            for dtype in (torch.bfloat16, torch.float32) if vocab % 16 == 0 else (torch.bfloat16,):
                shaped: Case = case._replace(shape=(min(4, case.shape[0]), 16, vocab))
                arguments = make(shaped, dtype) | {"backend": "triton"}
                linear_distribution_loss(**arguments).sum().backward()
                if case.name == "cross_entropy":
                    linear_distribution_loss(**arguments, gradient_error=0.01).backward()
                if case.name == "everything":
                    linear_distribution_loss(**arguments, return_metrics=True)[0].backward()
                    taken = ("hidden", "weight", "target", "teacher", "divergence", "group", "num_groups")
                    taken = {name: arguments[name] for name in taken}
                    s = linear_distribution_statistics(**taken, features=torch.ones(vocab, 2), backend="triton")
                    (s.entropy.sum() + s.divergence.sum() + s.features.sum() + s.mean_probability[0, 0]).backward()
    return list(found.values())


def resources(job: tuple[Specialised, int]) -> str:
    one, architecture = job
    compiled = one.compiled(architecture)
    name = f"sm_{architecture}a" if architecture >= 90 else f"sm_{architecture}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(compiled.asm["ptx"])
        command = [PTXAS, "-v", f"-arch={name}", source, "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    used = re.search(r"Used (\d+) registers", report)
    assert frame is not None
    assert used is not None
    result = {
        "kernel": one.kernel.__name__,
        "architecture": name,
        "registers": int(used[1]),
        "spilled": sum(map(int, frame.groups())),
        "shared": compiled.metadata.shared,
        "products": len(re.findall(r"(?:wgmma|tcgen05)\.mma|mma\.sync", compiled.asm["ptx"])),
        "copies": compiled.asm["ptx"].count("cp.async.cg"),
        "constants": {k: v for k, v in one.shown.items() if not str(k).startswith("_")},
        "types": one.signature,
        "even": (list(one.signature).index("logits_reach" if "logits_reach" in one.signature else "V"),) in one.hints,
        "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", compiled.asm["ptx"])),
    }
    return json.dumps(result)


if __name__ == "__main__":
    jobs = [(one, int(sys.argv[1])) for one in specialisations()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for line in pool.map(resources, jobs):
            print(line)
