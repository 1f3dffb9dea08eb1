"""Builds of the CUDA extension, beside the one that is installed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
FILES, FOLDERS = ("setup.py", "pyproject.toml", "README.md", "LICENSE"), ("csrc", "dft_kernels")
CUTLASS = ROOT / "build" / "cutlass" / "cutlass_library" / "source"  # where make puts it


def copy(folder: Path) -> None:
    """What the extension is made of."""
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored, dirs_exist_ok=True)


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The extension, in place in a copy of what it is made of."""
    copy(folder)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    merged = {**os.environ, "DFT_KERNELS_CUDA": "1", **environment}
    return subprocess.run(command, cwd=folder, env=merged, capture_output=True, text=True)


@contextlib.contextmanager
def made_once(folder: Path, *inputs: Path) -> Iterator[tuple[Path, bool]]:
    """The folder's own for the files of these inputs, torch and nvcc as they are, and whether it is still to be filled:
    of the processes of one test run the first does, while the others wait."""
    digest = hashlib.sha256(torch.__version__.encode())
    if shutil.which("nvcc") is not None:
        digest.update(subprocess.run(["nvcc", "--version"], capture_output=True, check=True).stdout)
    for path in inputs:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    folder = folder / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder, not (folder / "made").exists()
        (folder / "made").touch()


def imported(name: str, path: Path) -> Any:
    """An extension module that is no part of the package."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiled_for(architectures: str) -> tuple[Path, str]:
    """The folder of the extension for these, on CUTLASS, with the PTX of its kernels in the folder ptx, and what its
    build said."""
    assert CUTLASS.is_dir()
    inputs = (ROOT / "csrc", ROOT / "setup.py", ROOT / "pyproject.toml", CUTLASS / "include" / "cutlass" / "version.h")
    with made_once(ROOT / "build" / "compiled" / architectures.replace(" ", "_"), *inputs) as (folder, empty):
        ptx, said = folder / "ptx", folder / "said"
        if empty:
            ptx.mkdir(exist_ok=True)
            done = build(
                folder, TORCH_CUDA_ARCH_LIST=architectures, DFT_KERNELS_CPU="0", DFT_KERNELS_CUTLASS=str(CUTLASS),
                NVCC_APPEND_FLAGS=f"-Xptxas -v,-Werror -Werror all-warnings --keep --keep-dir {ptx}",
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-3000:]
            for file in ptx.iterdir():
                if file.suffix != ".ptx":  # what one of nvcc's programs hands the next, by the 100 MB
                    file.unlink()
            said.write_text(done.stdout)
        else:
            copy(folder)  # the package may be another
    return folder, said.read_text()
