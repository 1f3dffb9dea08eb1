"""dft-kernels doctor in environments that are broken on purpose: what it finds, and the line that mends it."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
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


def required_by_name(patch: Patch, folder: Path) -> None:
    patch.setattr(importlib.metadata, "requires", lambda name: [f"torch=={MINOR}.*", "numpy>=99"])


def metadata_of_another_torch(patch: Patch, folder: Path) -> None:
    patch.setattr(importlib.metadata, "requires", lambda name: ["torch==2.10.*", "numpy>=1.26"])


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


ROOT = Path(dft_kernels.__file__).parents[1]
CHECKOUT = f"pip install --no-build-isolation -e {ROOT}"


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
            "pip install 'transformers>=5.17' 'gguf>=0.10'",  # not the extra, which would build the kernels again
        ),
        (required_by_name, "fault", "required: numpy>=99 (there is", "pip install 'numpy>=99'"),
        (metadata_of_another_torch, "fault", f"requires torch==2.10.*, there is {torch.__version__}", CHECKOUT),
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
        ("import torch._C", "torch does not load: torch._C is not installed", "pip install --force-reinstall torch"),
        ("import a_name_of_ours", "torch does not load: a_name_of_ours is not", "pip install --force-reinstall torch"),
        (
            "raise OSError('libcudart.so.13: cannot open')",
            "load: libcudart.so.13: cannot",
            "pip install --force-reinstall torch",
        ),
    ],
    ids=["absent", "incomplete", "without_what_it_imports", "broken"],
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
    assert done.stdout.splitlines()[at + 1] == f"       > {mend}"
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith("usage: dft-kernels")
    if source is None:
        done = subprocess.run([*command, "info"], capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr.startswith("dft-kernels info: torch must be importable, got: ")
        assert done.stderr.count("\n") == 1


def test_pip_is_not_asked_for_the_torch_of_before(monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    """After an upgrade of torch metadata and stamp are of the one before: both are mended by the same line."""
    metadata_of_another_torch(monkeypatch, ROOT)
    torch_upgraded_after_the_build(monkeypatch, ROOT)
    assert cli.main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    faults = [after for line, after in itertools.pairwise(lines) if line.startswith("fault")]
    assert faults == [f"       > {CHECKOUT}"] * 2


def test_what_a_part_raises_is_a_fault_and_the_others_go_on() -> None:
    run = "from dft_kernels.commands.main import main; sys.exit(main(['doctor']))"
    code = f"import sys; sys.modules['numpy'] = None; {run}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Run pip" not in done.stderr
    lines = done.stdout.splitlines()
    at = [number for number, line in enumerate(lines) if line.startswith("fault") and "import of numpy halted" in line]
    assert {lines[number + 1] for number in at} == {"       > pip install --force-reinstall numpy"}
    said = ["required packages", "torch ", "temporary files: "]
    assert [text for text in said if any(line[7:].startswith(text) for line in lines)] == said
    assert re.match(r"\d+ faults?, \d+ notes?\.", lines[-1])


def test_a_part_that_fails_for_no_package_is_a_fault(monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> Iterator[doctor.Finding]:
        yield doctor.Finding("ok", "the first of two")
        raise ImportError("no name", name="a_module_of_no_package")

    broken.__name__ = "_gpus"
    monkeypatch.setattr(doctor, "_gpus", broken)
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "the first of two" in said
    assert "fault  gpus: ImportError: no name\n       > mend what is named above, then run this again" in said
    assert "temporary files: " in said


def test_an_older_torch_is_refused_by_name(monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    monkeypatch.delitem(vars(dft_kernels), "linear_cross_entropy", raising=False)
    with pytest.raises(
        ImportError, match=r"torch must be 2\.11 or newer, got 2\.9\.1\. Run pip install 'torch>=2\.11'"
    ):
        dft_kernels.linear_cross_entropy  # noqa: B018
    assert cli.main(["info"]) == 1
    assert capsys.readouterr().err.startswith("dft-kernels info: torch must be 2.11 or newer, got 2.9.1. Run pip")
