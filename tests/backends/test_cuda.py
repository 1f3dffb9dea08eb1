"""The CUDA backend without a GPU: what its kernels compile to, their execution on the CPU, the build and its errors."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import setuptools
import torch
from cases import CASES, compare
from cuda_build import build, compiled_for

import dft_kernels as dk
from dft_kernels import divergences
from dft_kernels.backends import BACKENDS, extension
from dft_kernels.backends.contract import Row
from dft_kernels.backends.cuda import CudaBackend

ROOT = Path(__file__).parent.parent.parent
NVCC = shutil.which("nvcc")
emulated = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run on")
compiles = pytest.mark.skipif(NVCC is None, reason="no nvcc")


@emulated
def test_names_are_the_tables() -> None:
    assert [divergences.TABLE[name].id for name in extension.CUDA.DIVERGENCES] == list(range(len(divergences.TABLE)))
    assert len(Row) == extension.CUDA.STATISTICS
    names = re.search(r"enum Row \{(.*?)\}", (ROOT / "csrc/common/element.h").read_text(), re.S)
    assert names is not None
    listed = [name.strip().removeprefix("k").lower() for name in names[1].split(",") if name.strip()]
    assert listed[:-1] == [row.name.replace("_", "").lower() for row in Row]


@pytest.fixture
def reversed_threads() -> Iterator[None]:
    extension.CUDA.reverse_threads(True)
    yield
    extension.CUDA.reverse_threads(False)


@pytest.fixture
def designs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("generic", "lean"):
        monkeypatch.setitem(BACKENDS, name, CudaBackend(name))


@emulated
@pytest.mark.usefixtures("reversed_threads", "designs")
@pytest.mark.parametrize("design", ["generic", "cuda"])
@pytest.mark.parametrize("case", CASES)
def test_the_order_of_threads_changes_nothing(case: str, design: str) -> None:
    """The generic kernels, and what "automatic" takes for rows that are aligned."""
    aligned = CASES[case]._replace(shape=(*CASES[case].shape[:2], 16 * -(-CASES[case].shape[2] // 16)))
    compare(aligned if design == "cuda" else CASES[case], torch.bfloat16, design)


@emulated
def test_a_divergent_barrier_is_found() -> None:
    assert "wait at different barriers" in extension.CUDA.run_divergent_barrier()


@emulated
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_on_and_off_16_bytes(dtype: torch.dtype, shift: int) -> None:
    """The wide loads and stores and the others, for a vocabulary that ends inside a group."""
    g = torch.Generator().manual_seed(0)
    wide = [torch.randn(3, 2064, generator=g).to(dtype) for _ in range(2)]
    logits, teacher = (x[:, shift : shift + 2053].requires_grad_(i == 0) for i, x in enumerate(wide))
    target = torch.tensor([0, 2052, 7])
    arguments = {"divergence": "reverse_kl", "hard_weight": 0.5}
    loss = dk.distribution_loss(logits, target, teacher, backend="cuda", **arguments)
    exact = dk.testing.dense_loss(logits, None, target, teacher, **arguments)
    for ours, want in zip(
        (loss, *torch.autograd.grad(loss, logits)), (exact, *torch.autograd.grad(exact, logits)), strict=True
    ):
        assert dk.testing.relative_error(ours, want) < (4e-3 if dtype == torch.bfloat16 and ours.ndim else 1e-3)


@emulated
def test_offsets_are_64_bit() -> None:
    """Two rows 2^31 numbers apart, of which only the pages that are touched exist."""
    kernels, apart, vocab = extension.CUDA, 2**31, 700
    logits = torch.empty(apart + vocab, dtype=torch.bfloat16).as_strided((2, vocab), (apart, 1))
    out = torch.empty(apart + vocab, dtype=torch.bfloat16).as_strided((2, vocab), (apart, 1))
    logits.copy_(torch.randn(2, vocab))
    cotangents = torch.zeros(6, 2)
    cotangents[Row.LSE] = 1.0  # whose gradient is q
    rows = kernels.Rows(logits=logits)
    statistics = kernels.row_step(rows, 1 << Row.LSE, 1 << Row.LSE, cotangents, None, out)
    exact = logits.float().softmax(-1)
    torch.testing.assert_close(out.float(), exact, rtol=8e-3, atol=0)
    torch.testing.assert_close(kernels.probabilities(rows, statistics), exact)
    columns = torch.zeros(1, vocab)
    kernels.accumulate_columns(rows, statistics, None, columns)
    torch.testing.assert_close(columns[0], exact.sum(0))


@emulated
def test_the_binding_checks_what_it_is_given() -> None:
    kernels = extension.CUDA
    rows = kernels.Rows(logits=torch.randn(3, 5))
    with pytest.raises(RuntimeError, match="label must be given"):
        kernels.row_statistics(rows, 1 << Row.LOG_PROB, 0)
    with pytest.raises(RuntimeError, match="target must be given"):
        kernels.row_statistics(rows, 1 << Row.DIVERGENCE, 0)
    with pytest.raises(RuntimeError, match=r"out must be \[R, V\] like logits \[3, 5\], got \[3, 4\]"):
        kernels.row_gradient(rows, torch.zeros(len(Row), 3), 8, torch.zeros(6, 3), None, torch.empty(3, 4))
    with pytest.raises(RuntimeError, match=r"cotangents must be \[6, R\]"):
        kernels.row_gradient(rows, torch.zeros(len(Row), 3), 8, torch.zeros(6, 2), None, torch.empty(3, 5))
    with pytest.raises(RuntimeError, match="divergence must be one of its table, got kl"):
        kernels.row_statistics(kernels.Rows(logits=torch.randn(3, 5), divergence="kl"), 8, 0)


LEAN = {"lean": 0, "lean_entropy": 2, "lean_kl": 2, "lean_jensen_shannon": 1, "lean_skew": 2}
ENTRIES = {
    **LEAN,
    "columns": 4,
    "exponentials": 0,  # without CUTLASS
    "labels": 3,
    "scaling": 2,
}  # kernels of a source; of rows.cu one for each divergence


@compiles
@pytest.mark.kept(where=lambda architectures: architectures == "9.0a")  # that with clusters, and on CUTLASS
@pytest.mark.parametrize("architectures", ["9.0a", "8.0+PTX", "7.5 10.0"])
def test_the_extension_builds_without_warnings_and_spills_links_and_loads(architectures: str) -> None:
    """The CUDA kernels alone, on any machine with nvcc, GPU or not, CUDA in torch or not."""
    folder, output = compiled_for(architectures)
    names = architectures.split()
    said = dict(
        re.findall(r"^dft_kernels: nvcc of csrc/cuda/(\w+)\.cu said\n((?:(?!dft_kernels: ).*\n)*)", output, re.M)
    )
    assert len(said) == len(list((ROOT / "csrc" / "cuda").glob("*.cu")))
    for source, lines in said.items():
        entries = lines.count("Compiling entry function")
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", lines)
        assert frames == [("0", "0", "0")] * entries, source
        assert entries >= len(names) * ENTRIES.get(source, len(divergences.TABLE) + 1), source
        registers = [int(used) for used in re.findall(r"Used (\d+) registers", lines)]
        assert all(used <= 168 for used in registers), source
        if source == "exponentials":
            assert registers == [168] * 2 * ("9.0a" in names)  # all that there are, and no more
    code = (
        "from dft_kernels.backends import BACKENDS, extension as e; import torch\n"
        "print(e.CUDA.DIVERGENCES, e.read_stamp()['cuda_kernels']['architectures'])\n"
        "print(BACKENDS['cuda'].unavailable(torch.device('cpu'), torch.float32))\n"
        "print(e.MODULE, e.REASON)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert f"{list(divergences.TABLE)} {names}" in ran.stdout
    assert "its kernels run on NVIDIA GPUs, not on cpu" in ran.stdout
    assert "None the C++ extension could not be built: DFT_KERNELS_CPU=0 at the build. " in ran.stdout


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("environment", "nvcc", "text"),
    [
        ({"CUDA_HOME": "/nowhere"}, None, "there is no nvcc in CUDA_HOME=/nowhere. Install the CUDA toolkit"),
        ({}, "echo nothing", "says nothing of a release. Set CUDA_HOME"),
        ({}, "echo release 11.8", r"nvcc must be 12.0 or newer, .* is 11.8. Install one, or set CUDA_HOME"),
        (
            {"TORCH_CUDA_ARCH_LIST": "Hopper"},
            'case $1 in --version) echo release 13.0;; *) echo compute_80;; esac',
            r"entries like 8.0, 9.0a or 10.0\+PTX, got 'Hopper'",
        ),
        (
            {"TORCH_CUDA_ARCH_LIST": "8.0;7.0"},
            'case $1 in --version) echo release 13.0;; *) echo compute_80;; esac',
            r"GPUs from 7.5 on that nvcc compiles for \(8.0\), got 7.0. Take it out",
        ),
        (
            {},
            'case $1 in --version) echo release 13.0;; --list*) echo compute_80;; --dryrun) exit 0;; '
            '*) echo "host_config.h: error: unsupported GNU version! gcc versions later than 12" >&2; exit 1;; esac',
            r"nvcc failed: .*unsupported GNU version.*Set NVCC_PREPEND_FLAGS",
        ),
    ],
    ids=["no_nvcc", "no_version", "old_nvcc", "arch_form", "arch_old", "host_compiler"],
)  # fmt: skip
def test_what_stops_the_build_says_what_to_do(
    environment: dict[str, str], nvcc: str | None, text: str, tmp_path: Path
) -> None:
    if torch.version.cuda is not None and nvcc is not None:
        nvcc = nvcc.replace("13.0", torch.version.cuda)
    if nvcc is not None:
        home = tmp_path / "toolkit"
        script(home / "bin" / "nvcc", nvcc)
        (home / "lib64").mkdir()
        (home / "lib64" / "libcudart_static.a").touch()
        environment = {"CUDA_HOME": str(home), **environment}
    folder = tmp_path / "source"
    folder.mkdir()
    done = build(folder, **environment)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(rf"^dft_kernels: DFT_KERNELS_CUDA=1, but .*{text}", last), done.stderr


@pytest.mark.parametrize("variable", ["DFT_KERNELS_CPU", "DFT_KERNELS_CUDA"])
def test_a_choice_that_is_none_stops_the_build(variable: str, tmp_path: Path) -> None:
    done = build(tmp_path, **{variable: "yes"})
    assert done.returncode != 0
    assert f"dft_kernels: {variable} must be 0, 1 or unset, got 'yes'. Correct it." in done.stderr


def test_a_toolkit_that_is_not_torchs_stops_the_build(tmp_path: Path) -> None:
    script(tmp_path / "toolkit" / "bin" / "nvcc", "echo release 12.4")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import torch.version\ntorch.version.cuda = '13.0'\n")
    (tmp_path / "source").mkdir()
    places = {"CUDA_HOME": str(tmp_path / "toolkit"), "PYTHONPATH": str(tmp_path / "site")}
    done = build(tmp_path / "source", **places)
    assert done.returncode != 0
    text = r"nvcc must be of torch's CUDA 13.0, .*nvcc is 12.4. Install that toolkit and set CUDA_HOME to it"
    assert re.search(text, done.stderr), done.stderr


def test_gpus_that_the_kernels_were_not_compiled_for() -> None:
    stamp = {"architectures": ["8.0", "9.0a", "10.0+PTX"]}
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)):
        assert extension.not_compiled_for(capability, stamp) is None
    reason = extension.not_compiled_for((7, 5), stamp)
    assert reason is not None
    assert (
        "compiled for 8.0, 9.0a, 10.0+PTX, this one has capability 7.5. Rebuild with: DFT_KERNELS_CUDA=1 "
        "TORCH_CUDA_ARCH_LIST=7.5 pip install --no-build-isolation -e "
    ) in reason
    assert extension.not_compiled_for((9, 0), {"architectures": ["9.0a"]}) is None
    assert extension.not_compiled_for((9, 1), {"architectures": ["9.0a"]}) is not None


def inputs(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What names a kept object, of an Nvcc of setup.py."""
    monkeypatch.setattr(setuptools, "setup", lambda **given: None)
    monkeypatch.setattr(sys, "argv", ["setup.py", "build_ext"])
    return list(runpy.run_path(str(ROOT / "setup.py"))["Nvcc"]().inputs)


def test_an_object_is_kept_for_the_host_compiler_that_it_was_made_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = torch.version.cuda or "13.0"
    first, second = (tmp_path / "hosts of ours" / name for name in ("g++-12", "g++"))
    nvcc = f"""case $1 in
    --version) echo release {version} ;;
    --list-gpu-arch) echo compute_80 ;;
    --dryrun) echo "#\\$ TOP=/nowhere"
              echo "#\\$ \\"${{NVCC_CCBIN%/*}}\\"/${{NVCC_CCBIN##*/}} -DX=1 -E -x c++ -D__CUDACC__" ;;
    esac"""
    script(tmp_path / "a toolkit" / "bin" / "nvcc", nvcc)
    for path in (first, second):
        script(path, "echo 12.2.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "a toolkit"))
    monkeypatch.setenv("NVCC_CCBIN", str(first))
    made = inputs(monkeypatch)
    assert (str(first), "12.2.0\n") in made
    assert inputs(monkeypatch) == made
    script(first, "echo 12.3.0")
    upgraded = inputs(monkeypatch)
    assert upgraded != made
    monkeypatch.setenv("NVCC_CCBIN", str(second))
    assert inputs(monkeypatch) not in (made, upgraded)


@compiles
def test_the_host_compiler_is_the_one_that_nvcc_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("DFT_KERNELS_CUDA", "1")
    gcc = shutil.which("gcc")
    said = subprocess.run(["gcc", "--version"], capture_output=True, text=True, check=True).stdout
    assert ("gcc", said) in inputs(monkeypatch)
    monkeypatch.setenv("NVCC_PREPEND_FLAGS", f"-ccbin {gcc}")
    assert (gcc, said) in inputs(monkeypatch)


def test_a_folder_without_cutlass_stops_the_build(tmp_path: Path) -> None:
    version = torch.version.cuda or "13.0"
    home = tmp_path / "toolkit"
    script(home / "bin" / "nvcc", f"case $1 in --version) echo release {version};; *) echo compute_90;; esac")
    (tmp_path / "source").mkdir()
    places = {"CUDA_HOME": str(home), "DFT_KERNELS_CUTLASS": str(tmp_path)}
    done = build(tmp_path / "source", **places)
    assert done.returncode != 0
    said = f"dft_kernels: DFT_KERNELS_CUTLASS must be a folder of CUTLASS (include/cutlass/cutlass.h), got {tmp_path}. "
    assert said in done.stderr
