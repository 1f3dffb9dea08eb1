"""Forward and backward of the losses on a CPU: time over the floor and over the peers, and peak memory.

    python bench/cpu_loss.py --shape 4096,576,49152 --dtype bfloat16 --out bench/results/NAME.json

The floor is the bare products at full size, in the input dtype, into preallocated outputs: 3 for cross-entropy, 4
with a teacher head. Everything is interleaved round by round in one process; ratios are of one round, and what is
printed is their median. Memory is the peak resident size over that just before the call, in a fresh process, returned
gradients included. Peers that are not installed are left out and named.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from dft_kernels import TeacherHead, linear_cross_entropy, linear_distribution_loss

Call = Callable[[], torch.Tensor]


class Inputs:
    """Random hidden states and heads of a model and its teacher."""

    def __init__(self, n: int, h: int, v: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)

        def normal(rows: int, scale: float) -> torch.Tensor:
            return (torch.randn(rows, h) * scale).to(dtype)

        self.hidden, self.weight = normal(n, 0.5).requires_grad_(), normal(v, 0.05).requires_grad_()
        self.teacher = TeacherHead(normal(n, 0.5), normal(v, 0.05))
        self.target = torch.randint(0, v, (n,))


def implementations(x: Inputs) -> tuple[dict[str, tuple[int, Call]], dict[str, str]]:
    """Name -> (products of the floor, loss); and the peers that are missing, with the reason."""
    h, w, y, t = x.hidden, x.weight, x.target, x.teacher

    def ours(**options: Any) -> Call:
        return lambda: linear_distribution_loss(h, w, options.get("target"), t, **options["terms"])

    def eager_ce() -> torch.Tensor:
        return F.cross_entropy(F.linear(h, w).float(), y)

    def eager_kl() -> torch.Tensor:
        log_q = F.linear(h, w).float().log_softmax(-1)
        log_p = F.linear(t.hidden, t.weight).float().log_softmax(-1)
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    found: dict[str, tuple[int, Call]] = {
        "cross-entropy": (3, lambda: linear_cross_entropy(h, w, y)),
        "forward KL": (4, ours(terms={})),
        "reverse KL": (4, ours(terms={"divergence": "reverse_kl"})),
        "CE + KL": (4, ours(target=y, terms={"hard_weight": 0.5})),
        "JSD": (4, ours(terms={"divergence": "jensen_shannon"})),
        "eager cross-entropy": (3, eager_ce),
        "eager forward KL": (4, eager_kl),
        "torch F.linear_cross_entropy": (3, lambda: F.linear_cross_entropy(h, w, y)),
    }
    missing = {}
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        liger = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=False, chunk_size=256)
        found["Liger chunked JSD"] = (4, lambda: liger(h, w, t.hidden, t.weight, y))
    except ImportError as error:
        missing["Liger chunked JSD"] = str(error)
    try:
        from cut_cross_entropy import linear_cross_entropy as cce

        found["CCE torch_compile"] = (3, lambda: cce(h, w, y, impl="torch_compile"))
    except ImportError as error:
        missing["CCE torch_compile"] = str(error)
    return found, missing


class Floor:
    """The bare products of a training step's head."""

    def __init__(self, x: Inputs) -> None:
        self.x, (n, h), v = x, x.hidden.shape, x.weight.shape[0]
        dtype = x.hidden.dtype
        self.logits, self.target = torch.zeros(n, v, dtype=dtype), torch.zeros(n, v, dtype=dtype)
        self.dhidden, self.dweight = torch.zeros(n, h, dtype=dtype), torch.zeros(v, h, dtype=dtype)

    @torch.no_grad()
    def __call__(self, products: int) -> None:
        x = self.x
        torch.mm(x.hidden, x.weight.t(), out=self.logits)
        if products == 4:
            torch.mm(x.teacher.hidden, x.teacher.weight.t(), out=self.target)
        torch.mm(self.logits, x.weight, out=self.dhidden)
        torch.mm(self.logits.t(), x.hidden, out=self.dweight)


def seconds(call: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(shape: tuple[int, int, int], dtype: torch.dtype, repeats: int, only: list[str] | None) -> dict[str, Any]:
    """Medians over `repeats` rounds."""
    x = Inputs(*shape, dtype)
    found, missing = implementations(x)
    found = {name: value for name, value in found.items() if only is None or name in only}
    floor = Floor(x)

    def step(loss: Call) -> None:
        x.hidden.grad = x.weight.grad = None
        loss().backward()

    for name, (products, loss) in list(found.items()):  # warm up, compile
        floor(products)
        try:
            step(loss)
        except Exception as error:  # a peer's own failure on this machine is a result
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            del found[name]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    for _ in range(repeats):
        for name, (products, loss) in found.items():
            bare = seconds(lambda p=products: floor(p))
            times[name].append((bare, seconds(lambda call=loss: step(call))))
    rows = {
        name: {
            "floor_s": statistics.median(bare for bare, _ in pairs),
            "seconds": statistics.median(whole for _, whole in pairs),
            "over_floor": statistics.median(whole / bare for bare, whole in pairs),
            "over_floor_min": min(whole / bare for bare, whole in pairs),
            "over_floor_max": max(whole / bare for bare, whole in pairs),
        }
        for name, pairs in times.items()
    }
    return {"rows": rows, "missing": missing}


def resident() -> int:
    """Bytes resident now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_memory(shape: tuple[int, int, int], dtype: torch.dtype, name: str) -> int:
    """Peak resident size over that just before one forward and backward; run in a fresh process."""
    x = Inputs(*shape, dtype)
    _, loss = implementations(x)[0][name]
    small = Inputs(8, shape[1], 64, dtype)  # libraries' own first-call buffers are nobody's loss memory
    implementations(small)[0][name][1]().backward()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident()
    loss().backward()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024 - before


def commit() -> str:
    """The commit that is measured; "+" if the tree has changes."""
    done = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def processor() -> str:
    """The processor's name and number of cores in use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1024,576,49152", help="N,H,V")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="names of implementations")
    parser.add_argument("--memory", action="store_true", help="peak memory too, each in a fresh process")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    n, h, v = map(int, options.shape.split(","))
    dtype = getattr(torch, options.dtype)
    if options.peak_of:
        print(peak_memory((n, h, v), dtype, options.peak_of))
        return
    result = measure((n, h, v), dtype, options.repeats, options.only)
    if options.memory:
        for name, row in result["rows"].items():
            command = [sys.executable, __file__, "--shape", options.shape, "--dtype", options.dtype, "--peak-of", name]
            done = subprocess.run(command, capture_output=True, text=True)
            row["peak_bytes"] = int(done.stdout.split()[-1]) if done.returncode == 0 else None
    setting = {
        "shape": {"N": n, "H": h, "V": v}, "dtype": options.dtype, "repeats": options.repeats, "commit": commit(),
        "processor": processor(), "torch": torch.__version__,
    }  # fmt: skip
    print(json.dumps(setting))
    for name, row in result["rows"].items():
        memory = f"{row['peak_bytes'] / 1e6:8.0f} MB" if row.get("peak_bytes") is not None else ""
        spread = f"({row['over_floor_min']:.3f}..{row['over_floor_max']:.3f})"
        print(f"{name:30} {row['seconds']:7.3f} s   {row['over_floor']:.3f} x floor {spread:18} {memory}")
    for name, reason in result["missing"].items():
        print(f"{name:30} not measured: {reason}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({**setting, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
