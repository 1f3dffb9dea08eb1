"""The environment report that `dft-kernels info` prints, and the self-test of an installation.

python -m dft_kernels.info --check
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import __version__
from .backends import BACKENDS, extension
from .loss.functional import linear_distribution_loss
from .loss.planning import SCRATCH_BYTES
from .teachers import TeacherHead
from .testing import allowance, conditions, dense_loss, relative_error

_PACKAGES = ("transformers", "triton", "accelerate", "peft", "safetensors", "numpy")


def conflicts(versions: dict[str, str | None]) -> list[str]:
    """Installed versions that do not work together, each with what to do."""
    triton, numpy = (_version(versions.get(name)) for name in ("triton", "numpy"))
    if triton[:2] == (3, 6) and numpy[:2] >= (2, 4):
        pair = f"triton {versions['triton']} with numpy {versions['numpy']}"
        return [f"{pair}: its interpreter (tests without a GPU) needs numpy before 2.4. pip install 'numpy<2.4'"]
    return []


def _version(text: str | None) -> tuple[int, ...]:
    return tuple(int(part) for part in (text or "0").split(".")[:2] if part.isdigit())


def _devices() -> list[torch.device]:
    return [torch.device("cpu")] + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]


def collect() -> dict[str, Any]:
    """Everything a bug report needs, as plain JSON types."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    devices = _devices()
    built = extension.MODULE is not None
    return {
        "dft_kernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(device) for device in devices[1:]],
        "packages": versions,
        "conflicts": conflicts(versions),
        "extension": {
            "loaded": built,
            "reason": extension.REASON,
            "stamp": extension.read_stamp(),
            "build": extension.MODULE.build_info() if built else None,
        },
        "instruction_sets": torch.ops.dft_kernels.instruction_sets()
        if built
        else [torch.backends.cpu.get_cpu_capability()],
        "backends": {
            name: {str(device): backend.unavailable(device, torch.bfloat16) or "available" for device in devices}
            for name, backend in BACKENDS.items()
        },
        "default_memory_budget": dict(SCRATCH_BYTES),
    }


def render(report: dict[str, Any]) -> str:
    """The report as text, one `name: value` a line."""
    lines = []

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            shown = ", ".join(map(str, value)) or "none" if isinstance(value, list) else value
            lines.append(f"{prefix + ':':42} {'none' if shown is None else shown}")

    walk("", report)
    return "\n".join(lines)


class Checked(NamedTuple):
    """The errors of a backend on a device, or why it does not run there."""

    backend: str
    device: str
    dtype: torch.dtype
    loss: str
    unavailable: str | None = None
    error: float = 0.0  # relative, in the 2-norm: the largest of the loss, dhidden and dweight, over what is allowed
    failure: str | None = None  # an exception instead of a result

    @property
    def passed(self) -> bool:
        """Whether there is nothing wrong."""
        return self.failure is None and self.error <= 1

    def __str__(self) -> str:
        head = f"{self.backend:10} {self.device:7}"
        if self.unavailable is not None:
            return f"       {head} not here: {self.unavailable}"
        said = self.failure or f"error {self.error:.2f} of what rounding allows"
        return f"{'ok' if self.passed else 'WRONG':6} {head} {str(self.dtype)[6:]:9} {self.loss:16} {said}"


def check() -> Iterator[Checked]:
    """Loss and gradients of every backend on every device, against the float64 oracle `testing.dense_loss`, within the
    error that `testing.allowance` derives. Small problems: seconds on a CPU."""
    for name, backend in BACKENDS.items():
        for device in _devices():
            why = backend.unavailable(device, torch.float32)
            if why is not None:
                yield Checked(name, str(device), torch.float32, "", why)
                continue
            for dtype in (torch.float32, torch.bfloat16):
                for loss in ("cross_entropy", "forward_kl", "jensen_shannon"):
                    yield _checked(name, device, dtype, loss)


def _checked(backend: str, device: torch.device, dtype: torch.dtype, loss: str) -> Checked:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    n, h, v = 70, 40, 515
    target = torch.randint(v, (n,), generator=generator).to(device)
    target[3] = -100
    given: dict[str, Any] = {"hidden": normal(n, h), "weight": normal(v, h) * h**-0.5, "target": target}
    if loss != "cross_entropy":
        given |= {"teacher": TeacherHead(normal(n, 24), normal(v, 24) / 4), "divergence": loss, "hard_weight": 0.1}

    def differentiated(function: Any, arguments: dict[str, Any], **options: Any) -> list[Tensor]:
        leaves = {key: arguments[key].detach().requires_grad_() for key in ("hidden", "weight")}
        value = function(**{**arguments, **leaves}, **options)
        return [value.detach(), *torch.autograd.grad(value, list(leaves.values()))]

    def exactly(arguments: dict[str, Any]) -> Sequence[Tensor]:
        wide = {key: arguments[key].double() for key in ("hidden", "weight")}
        return differentiated(dense_loss, {**arguments, **wide})

    try:
        ours = differentiated(linear_distribution_loss, given, backend=backend, chunk_size=32)
        exact = exactly(given)
        worst = 0.0
        for value, truth, condition, length in zip(
            ours, exact, conditions(exactly, given, exact), (n, v, n), strict=True
        ):
            gate = allowance(truth, value.dtype, condition, (h, v, length))
            ratio = relative_error(value, truth) / gate
            worst = max(worst, ratio if ratio == ratio else float("inf"))
    except Exception as error:  # whatever a broken installation raises is its result
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return Checked(backend, str(device), dtype, loss, failure=lines[0])
    return Checked(backend, str(device), dtype, loss, error=worst)


if __name__ == "__main__":
    from .commands.main import main

    sys.exit(main(["info", *sys.argv[1:]]))
