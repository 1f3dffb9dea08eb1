"""The compiled extensions: whether `dft_kernels._C` (CPU) and `dft_kernels._cuda` exist and match the running
torch and, in a checkout, its csrc, and if not, why.

Each is bound to a minor version of torch, 2.13.0 and 2.13.1 alike, and to one of Python. torch's stable ABI would lift
both, and does not reach all that they take. `_C`: `at::native::cpublas::brgemm` (bf16 products with fp32 results),
`at::get_cpu_capability`, pybind11 classes that live through a call (`CpuStep`, `Chunk`). `_cuda`: pybind11's tensors
and classes, and the current stream by `c10::impl::VirtualGuardImpl`; its kernels include nothing of torch. `_C` runs
with torch's CPU and CUDA builds; `_cuda` with those of its CUDA's major version, and loads without a GPU.
"""

from __future__ import annotations

import importlib
import json
import math
import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .sources import digest

STAMP = Path(__file__).parent.with_name("_build.json")
_LARGE = 1 << 17  # bytes that malloc would map anew, and its pages be faulted in, in every call


def rebuild(variables: str = "") -> str:
    """How this installation gets extensions for the running torch: a checkout is built again, a wheel replaced."""
    source = STAMP.parents[1]
    build = f"{variables} pip install --no-build-isolation".strip()
    if (source / "setup.py").is_file():
        return f"Rebuild with: {build} -e {shlex.quote(str(source))}"
    if variables:
        return f"In a checkout run: {build} ."
    return f"Install the wheel for torch {_minor(torch.__version__)}, or in a checkout run: {build} ."


def _minor(version: object) -> str:
    """2.13 of 2.13.0+cpu."""
    return ".".join(str(version).split(".")[:2])


def _major(version: object) -> str:
    return str(version).split(".")[0]


def read_stamp(path: Path = STAMP) -> dict[str, Any] | None:
    """What setup.py wrote about its build: torch, cuda, sources, built, reason. None where it never ran."""
    try:
        stamp = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return stamp if isinstance(stamp, dict) else None


def mismatch(stamp: dict[str, Any] | None, what: str = "the C++ extension was", name: str = "_C") -> str | None:
    """Why an extension with this stamp must not be loaded into the running torch, or beside these sources; None if it
    may be."""
    variables = "" if name == "_C" else "DFT_KERNELS_CUDA=1"
    if stamp is None:
        return f"{what} never built. {rebuild(variables)}"
    if not stamp.get("built"):
        return f"the C++ extension could not be built: {str(stamp.get('reason')).rstrip('.')}. {rebuild()}"
    built, running = stamp.get("torch"), torch.__version__
    if _minor(built) != _minor(running):
        return f"{what} built for torch {built}, this is torch {running}. {rebuild(variables)}"
    if (now := digest(STAMP.parents[1], name)) is not None and stamp.get("sources") != now:
        return f"{what} built of other sources than those in {STAMP.parents[1] / 'csrc'}. {rebuild(variables)}"
    return None


def mismatch_cuda(stamp: dict[str, Any] | None) -> str | None:
    """The same of the CUDA kernels, which a torch of another CUDA would run beside its own runtime."""
    if stamp is not None and not stamp.get("built"):
        return f"the CUDA kernels were not built: {stamp.get('reason')}"
    ours, theirs = (stamp or {}).get("nvcc"), torch.version.cuda
    if ours is not None and theirs is not None and _major(ours) != _major(theirs):
        return (
            f"the CUDA kernels were built by CUDA {ours}, this is torch {torch.__version__} of CUDA {theirs}. "
            f"{rebuild('DFT_KERNELS_CUDA=1')}"
        )
    return mismatch(stamp, "the CUDA kernels were", "_cuda")


def load() -> tuple[Any, str | None]:
    """The CPU's extension module and None, or None and the reason. A stamp that does not fit is also warned about."""
    stamp = read_stamp()
    module, reason = _imported("_C", mismatch(stamp))
    if reason is not None and stamp is not None and stamp.get("built"):
        warnings.warn(f"dft_kernels: {reason}", RuntimeWarning, stacklevel=2)
    return module, reason


def load_cuda() -> tuple[Any, str | None]:
    """The same for the CUDA kernels. They are a separate extension, so that a failed build of one leaves the other."""
    return _imported("_cuda", mismatch_cuda((read_stamp() or {}).get("cuda_kernels")))


def _imported(name: str, reason: str | None) -> tuple[Any, str | None]:
    if reason is not None:
        return None, reason
    try:
        return importlib.import_module(f"dft_kernels.{name}"), None
    except ImportError as error:
        others = ", ".join(sorted(path.name for path in STAMP.parent.glob(f"{name}.*")))
        why = f"there is {others}" if isinstance(error, ModuleNotFoundError) and others else str(error)
        return None, f"the extension {name} does not load into this Python ({why}). {rebuild()}"


def not_compiled_for(capability: tuple[int, int], stamp: dict[str, Any] | None = None) -> str | None:
    """Why the CUDA kernels do not run on a GPU of this capability, None if they do: machine code runs on its own and
    higher minor versions of its major one (with an "a" on its own alone), PTX on all that are as new as it."""
    built = (stamp if stamp is not None else (read_stamp() or {}).get("cuda_kernels") or {}).get("architectures", [])
    for name in built:
        digits, ptx = name.removesuffix("+PTX"), name.endswith("+PTX")
        exact = digits.endswith("a")
        version = tuple(int(part) for part in digits.rstrip("a").split("."))
        if version == capability or (not exact and version[0] == capability[0] and version <= capability):
            return None
        if ptx and not exact and version <= capability:
            return None
    wanted = ".".join(map(str, capability))
    return (
        f"the CUDA kernels were compiled for {', '.join(built) or 'no GPU'}, this one has capability {wanted}. "
        f"{rebuild(f'DFT_KERNELS_CUDA=1 TORCH_CUDA_ARCH_LIST={wanted}')}"
    )


MODULE, REASON = load()
CUDA, CUDA_REASON = load_cuda()


def scratch(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor for a large result. On a CPU its memory returns to a pool when the tensor is freed, and
    stays there until `release_scratch`: page faults of fresh memory cost as much as a sweep over it."""
    if MODULE is None or device.type != "cpu" or math.prod(shape) * dtype.itemsize < _LARGE:
        return torch.empty(shape, dtype=dtype, device=device)
    return MODULE.pooled(list(shape), dtype)


def repeats(ids: Tensor, vocab: int) -> Tensor:
    """Which rows of ids [N, k] contain one of 0..vocab-1 twice: [N] bool."""
    if MODULE is not None and ids.device.type == "cpu":
        found: Tensor = MODULE.repeats(ids, vocab)
        return found
    ordered = ids.sort(-1).values
    return (ordered[:, 1:] == ordered[:, :-1]).any(-1)


def all_labels(target: Tensor | None, vocab: int, ignored: int) -> bool:
    """Whether target [N] is known to hold ids of 0..vocab-1 alone and never `ignored`: in one pass on a CPU, where its
    values are at hand; False also where nobody looked."""
    if MODULE is None or target is None or target.device.type != "cpu":
        return False
    known: bool = MODULE.all_labels(target, vocab, ignored)
    return known


def release_scratch() -> int:
    """Give the scratch that the CPU kernels keep between calls back to the system; returns its bytes.

    Kept are the logits of a chunk (4 bytes each, 8 with a teacher; half that if `logits_dtype` asks for it), dweight's
    fp32 accumulator [V, H] once its graph is gone, and the gradients that backward returned once nobody refers to them;
    what a tensor holds is left alone.
    """
    return 0 if MODULE is None else MODULE.release_pool()
