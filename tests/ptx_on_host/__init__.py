"""The CUDA extension as nvcc compiles it for sm_90a, on the CPU: its own objects, host code and all, linked with a
stand-in for CUDA's runtime (runtime.cpp), which runs the kernels' PTX, as C++ (translate.py), on the threads of
cuda_on_host. What ptxas makes of that PTX, and how fast it is, is for a GPU to show."""

from __future__ import annotations

import functools
import shlex
import subprocess
from pathlib import Path
from typing import Any

from cuda_build import ROOT, compiled_for, imported, made_once
from torch.utils import cpp_extension

from .translate import entries_of

HERE = Path(__file__).parent
MACHINE = HERE.parent / "cuda_on_host"
FLAGS = ["-std=c++20", "-fPIC", "-fwrapv", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-DDFT_CUDA_ON_HOST"]
FLAGS += [f"-I{path}" for path in (ROOT / "csrc", HERE, MACHINE)]


def machine() -> Path:
    """The library that runs a translated kernel, by ptx_launch; its C++ is compiled when it is first launched."""
    with made_once(ROOT / "build" / "ptx_on_host", HERE, MACHINE) as (folder, empty):
        if empty:
            compiler = shlex.join(["g++", "-O1", "-shared", *FLAGS])
            command = ["g++", "-O2", "-shared", *FLAGS, f'-DPTX_COMPILE="{compiler}"', HERE / "launch.cpp", "-ldl"]
            subprocess.run([*command, "-o", folder / "machine.so"], check=True)
    return folder / "machine.so"


def build() -> Path:
    """The extension module."""
    extension, _ = compiled_for("9.0a")
    with made_once(extension / "on_host", HERE, MACHINE) as (folder, empty):
        if empty:
            _fill(folder, extension)
    return folder / "_cuda.so"


def _fill(folder: Path, extension: Path) -> None:
    with (folder / "index").open("w") as index:
        for ptx in sorted((extension / "ptx").glob("*.ptx")):
            for i, entry in enumerate(entries_of(ptx.read_text())):
                source = folder / f"{ptx.stem}_{i}.cpp"
                source.write_text(entry.source)
                index.write(f"{entry.name} {source.with_suffix('')}\n")
    runtime, library = folder / "runtime.o", machine()
    hidden = "-fPIC,-fvisibility=hidden"  # from torch, which may have CUDA's own runtime in this process
    command = ["nvcc", "-std=c++17", "-Xcompiler", hidden, f'-DPTX_INDEX="{folder / "index"}"', "-c"]
    subprocess.run([*command, HERE / "runtime.cpp", "-o", runtime], check=True)
    libraries = [f"-L{cpp_extension.library_paths()[0]}", "-lc10", "-ltorch_cpu", "-ltorch_python"]
    objects = [*(extension / "build").rglob("*.o"), runtime, library, f"-Wl,-rpath,{library.parent}"]
    subprocess.run(["g++", "-shared", "-o", folder / "_cuda.so", *objects, *libraries], check=True)


@functools.cache
def load() -> Any:
    """What dft_kernels.backends.extension has as CUDA."""
    return imported("_cuda", build())
