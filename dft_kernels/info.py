"""The environment report that `dft-kernels info` prints."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from . import __version__
from .backends import BACKENDS, extension
from .loss.planning import SCRATCH_BYTES

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


def collect() -> dict[str, Any]:
    """Everything a bug report needs, as plain JSON types."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    devices = [torch.device("cpu")] + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
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
