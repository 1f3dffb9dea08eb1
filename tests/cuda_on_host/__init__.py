"""The CUDA kernels on the CPU: csrc/cuda and its binding, compiled for the host under a stand-in for
CUDA's threads (cuda_on_host.h), as the backend "cuda" of this test run."""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from cuda_build import ROOT, imported, made_once
from torch.utils import cpp_extension

HERE = Path(__file__).parent
CUDA = ROOT / "csrc" / "cuda"
SOURCES = [HERE / "control.cpp", HERE / "exponentials.cpp", *sorted(CUDA.glob("*.cu")), *sorted(CUDA.glob("*.cpp"))]
NAME = "_cuda_on_host"


def build() -> Path:
    """The module, compiled once for each state of its sources."""
    with made_once(ROOT / "build" / "cuda_on_host", ROOT / "csrc" / "common", CUDA, HERE) as (folder, empty):
        module = folder / f"{NAME}.so"
        if empty:
            _compile(folder, module)
    return module


def _compile(folder: Path, module: Path) -> None:
    paths = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    # longjmp from fibre to fibre is what fortified libraries refuse
    flags = ["-std=c++20", "-O2", "-fPIC", "-U_FORTIFY_SOURCE", f"-DTORCH_EXTENSION_NAME={NAME}", "-DDFT_CUDA_ON_HOST"]
    flags += [f"-I{ROOT / 'csrc'}", f"-I{HERE}", *(f"-isystem{path}" for path in paths)]
    objects = [folder / f"{source.name}.o" for source in SOURCES]
    compilers = [
        subprocess.Popen(["g++", *flags, "-x", "c++", "-c", source, "-o", made], stderr=subprocess.PIPE, text=True)
        for source, made in zip(SOURCES, objects, strict=True)
    ]
    for compiler in compilers:
        _, said = compiler.communicate()
        assert compiler.returncode == 0, said
    libraries = [
        f"-L{cpp_extension.library_paths()[0]}",
        *(f"-l{name}" for name in ("c10", "torch_cpu", "torch_python")),
    ]
    subprocess.run(["g++", "-shared", "-o", module, *objects, *libraries], check=True)


def alone(csrc: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Compile one lean kernel of these sources by itself, and run it over a few rows: whether it finds their losses."""
    program = folder / "alone"
    flags = ["-std=c++20", "-O1", "-U_FORTIFY_SOURCE", "-DDFT_CUDA_ON_HOST", f"-I{csrc}", f"-I{HERE}"]
    subprocess.run(["g++", *flags, "-x", "c++", HERE / "alone.cpp", "-o", program], check=True)
    return subprocess.run([program], capture_output=True, text=True)


def load() -> Any:
    return imported(NAME, build())


def install() -> None:
    """Make it the backend "cuda" on CPU tensors."""
    from dft_kernels.backends import extension
    from dft_kernels.backends.cuda import CudaBackend

    real = CudaBackend.unavailable
    extension.CUDA = load()
    CudaBackend.emulated = ("cpu",)
    CudaBackend.unavailable = lambda self, device, dtype: None if device.type == "cpu" else real(self, device, dtype)
