"""dft-kernels doctor in environments that are broken on purpose: what it finds, and the line that mends it."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import dft_kernels
from dft_kernels import doctor
from dft_kernels.backends import extension
from dft_kernels.commands import main as cli

Patch = pytest.MonkeyPatch
MINOR = ".".join(torch.__version__.split(".")[:2])


def old_torch(patch: Patch, folder: Path) -> None:
    patch.setattr(torch, "__version__", "2.9.1+cpu")


def torch_upgraded_after_the_build(patch: Patch, folder: Path) -> None:
    patch.setattr(extension, "REASON", extension.mismatch({"built": True, "torch": "2.10.0", "cuda": None}))


def a_wheel_for_another_torch(patch: Patch, folder: Path) -> None:
    patch.setattr(extension, "STAMP", folder / "site-packages" / "dft_kernels" / "_build.json")
    torch_upgraded_after_the_build(patch, folder)


def no_compiler(patch: Patch, folder: Path) -> None:
    stamp = {"built": False, "reason": "there is no C++ compiler c++. Install one (apt-get install g++), or set CXX."}
    patch.setattr(extension, "read_stamp", lambda: stamp)
    patch.setattr(extension, "REASON", extension.mismatch(stamp))
    (folder / "apt-get").touch(0o755)
    patch.setenv("PATH", str(folder))
    patch.delenv("CXX", raising=False)


def no_cuda_kernels(patch: Patch, nvcc: str | None, folder: Path) -> None:
    patch.setattr(torch.version, "cuda", "13.0")
    patch.setattr(extension, "CUDA", None)
    patch.setenv("CUDA_HOME", str(folder))
    if nvcc is not None:
        (folder / "bin").mkdir()
        (folder / "bin" / "nvcc").write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {nvcc}, V{nvcc}.1'\n")
        (folder / "bin" / "nvcc").chmod(0o755)


def nvcc_of_another_major(patch: Patch, folder: Path) -> None:
    no_cuda_kernels(patch, "12.6", folder)


def no_nvcc(patch: Patch, folder: Path) -> None:
    no_cuda_kernels(patch, None, folder)


def nvcc_that_fits(patch: Patch, folder: Path) -> None:
    no_cuda_kernels(patch, "13.2", folder)


def a_gpu_and_torch_without_cuda(patch: Patch, folder: Path) -> None:
    patch.setattr(doctor, "_has_nvidia", lambda: True)
    patch.setattr(torch.cuda, "is_available", lambda: False)
    patch.setattr(torch.version, "cuda", None)


def a_gpu_out_of_reach(patch: Patch, folder: Path) -> None:
    a_gpu_and_torch_without_cuda(patch, folder)
    no_cuda_kernels(patch, "13.0", folder)


def missing_extra(patch: Patch, folder: Path) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "gguf":
            raise importlib.metadata.PackageNotFoundError(name)
        return "5.0.0" if name == "transformers" else real(name)

    patch.setattr(importlib.metadata, "version", version)


def not_installed(patch: Patch, folder: Path) -> None:
    def requires(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    patch.setattr(importlib.metadata, "requires", requires)


def no_home(patch: Patch, folder: Path) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    patch.setattr(Path, "home", home)
    patch.delenv("XDG_CACHE_HOME", raising=False)


def no_space(patch: Patch, folder: Path) -> None:
    usage = namedtuple("usage", "free")
    patch.setattr(shutil, "disk_usage", lambda path: usage(12_000_000))


def read_only(patch: Patch, folder: Path) -> None:
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    patch.setattr(os, "access", lambda path, mode: not str(path).startswith(str(folder)))


CHECKOUT = f"pip install --no-build-isolation -e {Path(dft_kernels.__file__).parents[1]}"


@pytest.mark.parametrize(
    ("broken", "state", "said", "mend"),
    [
        (old_torch, "fault", "torch 2.9.1+cpu is older than 2.11", "pip install 'torch>=2.11'"),
        (
            torch_upgraded_after_the_build,
            "fault",
            f"built for torch 2.10.0, this is torch {torch.__version__}",
            CHECKOUT,
        ),
        (a_wheel_for_another_torch, "fault", "built for torch 2.10.0", f"install the wheel for torch {MINOR}, or in a"),
        (no_compiler, "fault", "there is no C++ compiler c++", f"apt-get install g++; then {CHECKOUT}"),
        (nvcc_of_another_major, "note", "bin/nvcc is of CUDA 12.6, torch of 13.0", "install the toolkit of CUDA 13"),
        (no_nvcc, "note", "cannot be built here: there is no nvcc", "install the toolkit of CUDA 13 and set CUDA_HOME"),
        (nvcc_that_fits, "note", "bin/nvcc of CUDA 13.2, which builds them", f"DFT_KERNELS_CUDA=1 {CHECKOUT}"),
        (a_gpu_and_torch_without_cuda, "fault", f"and torch {torch.__version__} has no CUDA", "a CUDA build of torch"),
        (a_gpu_out_of_reach, "fault", "torch does not reach: torch.cuda.is_available() is False", "nvidia-smi"),
        (
            missing_extra,
            "note",
            "without transformers>=5.17 (there is 5.0.0), gguf",
            "pip install 'dft-kernels[finetune]'",
        ),
        (not_installed, "note", "on the path and not installed", CHECKOUT),
        (no_home, "fault", "the home folder must be known", "export XDG_CACHE_HOME="),
        (no_space, "note", "temporary files: ", "export TMPDIR="),
        (read_only, "note", "cannot be written to", "export XDG_CACHE_HOME="),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_broken_is_named_with_what_mends_it(
    broken: Callable[[Patch, Path], None],
    state: str,
    said: str,
    mend: str,
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken(monkeypatch, tmp_path)
    code = cli.main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    (at,) = [number for number, line in enumerate(lines) if line.startswith(state) and said in line]
    assert lines[at + 1].startswith("       > ")
    assert mend in lines[at + 1]
    assert code == any(line.startswith("fault") for line in lines)


def test_nothing_is_wrong_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0, capsys.readouterr().out
    assert "0 faults" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("source", "said", "mend"),
    [
        (None, "torch does not load: torch is not installed", "pip install torch"),
        ("import nothing_of_torchs", "torch does not load: nothing_of_torchs is not", "pip install nothing_of_torchs"),
        ("raise OSError('libcudart.so.13: cannot open')", "load: libcudart.so.13: cannot", "--force-reinstall torch"),
    ],
    ids=["absent", "incomplete", "broken"],
)
def test_without_torch_it_runs_and_other_commands_say_so(
    source: str | None, said: str, mend: str, tmp_path: Path
) -> None:
    prepare = "sys.modules['torch'] = None; " if source is None else f"sys.path.insert(0, {str(tmp_path)!r}); "
    (tmp_path / "torch.py").write_text(source or "")
    run = "from dft_kernels.commands.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", f"import sys; {prepare}{run}"]
    done = subprocess.run([*command, "doctor"], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    (at,) = [number for number, line in enumerate(done.stdout.splitlines()) if said in line]
    assert mend in done.stdout.splitlines()[at + 1]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith("usage: dft-kernels")
    if source is None:
        done = subprocess.run([*command, "info"], capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr.startswith("dft-kernels info: torch must be importable, got: ")
        assert done.stderr.count("\n") == 1


def test_an_older_torch_is_refused_by_name(monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    monkeypatch.delitem(vars(dft_kernels), "linear_cross_entropy", raising=False)
    with pytest.raises(
        ImportError, match=r"torch must be 2\.11 or newer, got 2\.9\.1\. Run pip install 'torch>=2\.11'"
    ):
        dft_kernels.linear_cross_entropy  # noqa: B018
    assert cli.main(["info"]) == 1
    assert capsys.readouterr().err.startswith("dft-kernels info: torch must be 2.11 or newer, got 2.9.1. Run pip")
