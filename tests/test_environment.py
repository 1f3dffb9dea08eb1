"""The installed package: report, build stamp, a machine without a compiler."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dft_kernels
from dft_kernels import info
from dft_kernels.backends import extension, sources
from dft_kernels.commands import main as cli

ROOT = Path(dft_kernels.__file__).parent.parent


def test_info_as_json_and_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["torch"] == torch.__version__
    assert report["backends"]["reference"]["cpu"] == "available"
    assert report["default_memory_budget"]["cpu"] > 0
    assert report["extension"]["loaded"] == (report["extension"]["reason"] is None)
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"torch:{'':36} {torch.__version__}"[:40] in text
    assert "backends.reference.cpu:" in text


def test_each_backend_is_checked_against_float64(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = {name: one for name, one in info.BACKENDS.items() if "cpu" not in one.emulated and name != "cuda"}
    monkeypatch.setattr(info, "BACKENDS", real)  # of which none takes minutes here
    assert cli.main(["info", "--check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, backend in info.BACKENDS.items():
        here = backend.unavailable(torch.device("cpu"), torch.float32) is None
        assert len([line for line in lines if line.startswith(f"ok     {name:10} cpu ")]) == (6 if here else 0)
    assert "reference" in lines[-1].removeprefix("right: ").split(", ")
    monkeypatch.setattr(info, "BACKENDS", {"reference": info.BACKENDS["reference"]})
    loss = info.linear_distribution_loss
    monkeypatch.setattr(info, "linear_distribution_loss", lambda *args, **more: loss(*args, **more) * 1.01)
    assert cli.main(["info", "--check"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "WRONG: reference; 6 failed"

    def broken(*args: object, **more: object) -> None:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(info, "linear_distribution_loss", broken)
    assert cli.main(["info", "--check"]) == 1
    assert "WRONG  reference  cpu     float32   cross_entropy    no kernel image\n" in capsys.readouterr().out


def test_the_extension_is_built_and_says_of_what() -> None:
    """`make test` has just built it: a machine where this fails has no compiler, and its info says so."""
    assert extension.MODULE is not None, extension.REASON
    assert torch.__version__.startswith(extension.MODULE.build_info()["torch"].split("+")[0])


def test_versions_that_do_not_go_together_are_named() -> None:
    assert info.conflicts({"triton": "3.9.0", "numpy": "2.5.0"}) == []
    assert info.conflicts({"triton": "3.6.0", "numpy": "2.3.5"}) == []
    assert info.conflicts({"triton": None, "numpy": None}) == []
    (said,) = info.conflicts({"triton": "3.6.1", "numpy": "2.4.0"})
    assert "triton 3.6.1 with numpy 2.4.0" in said
    assert "pip install 'numpy<2.4'" in said


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inform"]) == 2
    known = "bench, capture, demo, doctor, evaluate, gap, info, play, report, sample, store, target, train"
    assert f"COMMAND must be one of {known}, got 'inform'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stamp", "text"),
    [
        (None, "never built"),
        ({"built": False, "reason": "no g++."}, r"could not be built: no g\+\+\. \w"),
        ({"built": True, "torch": "1.0", "cuda": None}, r"built for torch 1\.0, this is torch"),
    ],
)
@pytest.mark.parametrize("checkout", [True, False])
def test_a_stamp_that_does_not_fit_says_what_to_do(
    stamp: dict[str, object] | None, text: str, checkout: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extension, "STAMP", tmp_path / "a folder" / "dft_kernels" / "_build.json")
    (tmp_path / "a folder").mkdir()
    minor = ".".join(torch.__version__.split(".")[:2])
    remedy = f"Install the wheel for torch {minor}, or in a checkout run: pip install --no-build-isolation ."
    if checkout:
        (tmp_path / "a folder" / "setup.py").touch()
        remedy = f"Rebuild with: pip install --no-build-isolation -e '{tmp_path}/a folder'"
    reason = extension.mismatch(stamp)
    assert reason is not None
    assert re.search(text, reason)
    assert reason.endswith(f". {remedy}")


def test_a_build_is_bound_to_the_minor_version_of_torch_and_cuda_kernels_to_the_major_one_of_cuda(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(extension, "digest", lambda root, name: None)  # as beside a wheel
    stamp = {"built": True, "torch": "2.13.0+cu130", "cuda": "13.0", "nvcc": "13.0"}
    for running, cuda, fits, cuda_fits in (
        ("2.13.1+cpu", None, True, True),  # loads, and says that there is no GPU
        ("2.13.0+cu132", "13.2", True, True),
        ("2.13.0+cu128", "12.8", True, False),
        ("2.130.0", "13.0", False, False),
        ("2.14.0", "13.0", False, False),
    ):
        monkeypatch.setattr(torch, "__version__", running)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert (extension.mismatch(stamp) is None) == fits, running
        assert (extension.mismatch_cuda(stamp) is None) == cuda_fits, running
    assert "DFT_KERNELS_CUDA=1 pip install" in str(extension.mismatch_cuda(None))


@pytest.mark.parametrize("name", ["_C", "_cuda"])
def test_kernels_of_other_sources_are_not_loaded(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after `git pull` in a checkout that is built."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "setup.py").touch()
    monkeypatch.setattr(extension, "STAMP", tmp_path / "dft_kernels" / "_build.json")
    own, other = {"_C": ("cpu/scores.h", "cuda/gpu.h"), "_cuda": ("cuda/gpu.h", "cpu/scores.h")}[name]
    stamp = {"built": True, "torch": torch.__version__, "sources": sources.digest(ROOT, name)}

    def reason() -> str | None:
        return extension.mismatch(stamp) if name == "_C" else extension.mismatch_cuda(stamp)

    assert reason() is None
    (tmp_path / "csrc" / f"{other}.orig").touch()
    (tmp_path / "csrc" / other).write_text("// of the other extension")
    assert reason() is None
    stamp |= {"sources": None}
    assert "built of other sources" in str(reason()), "a stamp of before there were digests"
    stamp |= {"sources": sources.digest(ROOT, name)}
    with (tmp_path / "csrc" / own).open("a") as file:
        file.write("\n")
    variables = "" if name == "_C" else "DFT_KERNELS_CUDA=1 "
    said = f"built of other sources than those in {tmp_path}/csrc. Rebuild with: {variables}pip install"
    assert said in str(reason())
    shutil.rmtree(tmp_path / "csrc")
    assert reason() is None, "a wheel has no sources"


def test_kernels_of_another_python_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "STAMP", tmp_path / "_build.json")
    (tmp_path / "_nothing.cpython-399-x86_64-linux-gnu.so").touch()
    module, reason = extension._imported("_nothing", None)
    assert module is None
    assert "does not load into this Python (there is _nothing.cpython-399-x86_64-linux-gnu.so)" in str(reason)


def test_a_stale_stamp_warns_and_the_package_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "read_stamp", lambda: {"built": True, "torch": "1.0", "cuda": None})
    with pytest.warns(RuntimeWarning, match=r"built for torch 1\.0"):
        module, reason = extension.load()
    assert module is None
    assert reason is not None


def build_without_a_compiler(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc", dirs_exist_ok=True)
    shutil.copytree(
        ROOT / "dft_kernels",
        tmp_path / "dft_kernels",
        ignore=shutil.ignore_patterns("*.so", "_build.json"),
        dirs_exist_ok=True,
    )
    environment = {**os.environ, "CXX": "/nonexistent/c++", "CC": "/nonexistent/cc", **variables}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)


def test_without_a_compiler_the_build_succeeds_and_leaves_the_reason(tmp_path: Path) -> None:
    done = build_without_a_compiler(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "was not built: there is no C++ compiler /nonexistent/c++. Install one" in done.stdout
    assert "nvcc -" not in done.stdout
    code = "import dft_kernels.info as i; r = i.collect(); print(r['extension']['reason']); print(r['backends'])"
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "could not be built" in ran.stdout
    assert "'reference': {'cpu': 'available'}" in ran.stdout


def test_a_compiler_that_fails_is_named_and_not_its_whole_command(tmp_path: Path) -> None:
    done = build_without_a_compiler(tmp_path, CXX="false", CC="false", DFT_KERNELS_CUDA="0")
    assert done.returncode == 0, done.stderr
    reason = json.loads((tmp_path / "dft_kernels" / "_build.json").read_text())["reason"]
    assert reason == "false failed: pip install -v, or setup.py build_ext, shows its message."


def test_without_a_compiler_a_build_that_demands_the_extension_fails(tmp_path: Path) -> None:
    done = build_without_a_compiler(tmp_path, DFT_KERNELS_CPU="1")
    assert done.returncode != 0
    assert "dft_kernels: DFT_KERNELS_CPU=1, but " in done.stderr


def test_a_part_that_is_left_out_keeps_what_is_there(tmp_path: Path) -> None:
    """The stamp of CPU kernels that fit the running torch and the sources, and of no others."""
    stamp = tmp_path / "dft_kernels" / "_build.json"
    here, now = torch.__version__, sources.digest(ROOT, "_C")
    for torch_version, made_of, kept in ((here, now, True), ("1.0", now, False), (here, "0" * 16, False)):
        (tmp_path / "dft_kernels").mkdir(exist_ok=True)
        before = {"torch": torch_version, "cuda": torch.version.cuda, "sources": made_of, "built": True, "reason": None}
        stamp.write_text(json.dumps(before))
        done = build_without_a_compiler(tmp_path, DFT_KERNELS_CPU="0", DFT_KERNELS_CUDA="0")
        assert done.returncode == 0, done.stderr
        written = json.loads(stamp.read_text())
        assert written["built"] is kept
        assert written["torch"] == torch.__version__
        assert written["sources"] == now
        assert written["cuda_kernels"]["sources"] == sources.digest(ROOT, "_cuda")
        assert written["cuda_kernels"]["reason"] == "DFT_KERNELS_CUDA=0 at the build"
