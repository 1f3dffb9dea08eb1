"""The CUDA backend without a GPU: what its kernels compile to, their execution on the CPU, the build and its errors."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_on_host
import pytest
import torch
from cases import CASES, compare

import dft_kernels as dk
from dft_kernels import divergences
from dft_kernels.backends import BACKENDS, extension
from dft_kernels.backends.contract import Row, bits
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


class Watched:
    """The kernels, and the design that each launch takes."""

    def __init__(self, kernels: Any) -> None:
        self.kernels, self.taken = kernels, set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernels, name)

    def row_statistics(self, rows: Any, wanted: int, live: int) -> torch.Tensor:
        self.taken.add(self.kernels.chosen_design(rows, wanted | 1 << Row.LSE, live))
        return self.kernels.row_statistics(rows, wanted, live)

    def row_gradient(self, rows: Any, statistics: torch.Tensor, live: int, *more: Any) -> None:
        self.taken.add("gradient")
        self.kernels.row_gradient(rows, statistics, live, *more)

    def row_step(self, rows: Any, wanted: int, live: int, cotangents: Any, lse_slope: Any, out: Any) -> torch.Tensor:
        self.taken.add(self.kernels.chosen_design(rows, wanted, live, out))
        return self.kernels.row_step(rows, wanted, live, cotangents, lse_slope, out)


def taken_by(case: str) -> str:
    """What "automatic" is to take for a case, whose rows are aligned: one launch for all, or one for the statistics
    and the generic one for the gradient."""
    tensors, options, teacher = CASES[case].tensors, CASES[case].options, CASES[case].teacher
    name = getattr(options.get("divergence"), "name", options.get("divergence", "forward_kl"))
    sparse = teacher.startswith("topk") or teacher in ("renormalise", "ignore", "all")
    if CASES[case].shape[0] == 0 or case.endswith("none_left") or CASES[case].target == "all_ignored":
        return ""
    halves = "features" in tensors or sparse
    slow = "potential" in tensors or (teacher and not sparse and divergences.TABLE[name].id > 4)
    both = " lean" if sparse and slow else ""  # the log-sum-exp outside of the target's tokens has no potential
    return ("generic" if slow else "lean") + both + (" gradient" if halves else "")


@emulated
def test_what_each_case_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(extension.CUDA)
    monkeypatch.setattr(extension, "CUDA", watched)
    wrong = {}
    for case in CASES:
        watched.taken = set()
        n, h, v = CASES[case].shape
        compare(CASES[case]._replace(shape=(min(n, 5), h, 16 * -(-min(v, 128) // 16))), torch.bfloat16, "cuda")
        if watched.taken != set(taken_by(case).split()):
            wrong[case] = watched.taken
    assert wrong == {}, wrong


HARD = {Row.LOG_PROB, Row.MEAN_LOG_PROB, Row.ENTROPY, Row.LSE}
LEAN = [None, *list(divergences.TABLE)[:5]]


def steps(design: str, vocab: int, name: str | None, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], **how: Any):
    """Statistics and gradient of 5 rows, one without cotangents, one whose label is no column, one with masked columns
    (and NaN, with broken=True), by one launch. apart: how far the target's logits are from the model's."""
    kernels = extension.CUDA
    g = torch.Generator().manual_seed(vocab)
    wide = -(-vocab // 32) * 32
    base = 2 * torch.randn(5, wide, generator=g)
    base[3, : vocab // 2] = -torch.inf
    if how.get("broken"):
        base[4, 0] = torch.nan
    target = base + how.get("apart", 2.0) * torch.randn(5, wide, generator=g)
    label = torch.randint(vocab // 2, vocab, (5,), generator=g)
    label[1] = -100
    full = base.to(dtypes[0])
    if how.get("in_place"):
        narrow = full.view(dtypes[2])
        out = narrow[:, narrow.shape[1] - wide :][:, :vocab]
    else:
        full[:, vocab:] = torch.nan
        out = torch.full((5, wide), 7.0, dtype=dtypes[2])[:, :vocab]
    hard, soft = how.get("hard", HARD), {Row.DIVERGENCE} if name else set()
    wanted = hard | soft | how.get("metrics", set())
    cotangents = torch.randn(6, 5, generator=g)
    cotangents[:, 2] = 0
    rows = kernels.Rows(
        logits=full[:, :vocab],
        scale=how.get("scale", 1.0),
        cap=how.get("cap"),
        label=label,
        target=target.to(dtypes[1])[:, :vocab] if name else None,
        target_scale=how.get("scale", 1.0),
        target_cap=how.get("cap"),
        divergence=name or "forward_kl",
        parameter=0.3,
        temperature=how.get("T", 1.0),
        target_temperature=how.get("T", 1.0),
        design=design,
    )
    slope = torch.tensor([0.1, 0.2, 0.0, -0.3, 0.4]) if Row.LSE in hard else None
    numbers = bits(frozenset(wanted)), bits(frozenset(hard | soft))
    statistics = kernels.row_step(rows, *numbers, cotangents, slope, out)
    if not how.get("in_place"):
        beyond = out.as_strided((5, wide - vocab), (wide, 1), vocab)
        assert torch.equal(beyond, torch.full_like(beyond, 7.0))  # never written
    return statistics[: Row.LSE_LOW].clone(), out.float().clone()  # but for what rounding leaves


WIDE, HALF, NARROW = torch.float32, torch.float16, torch.bfloat16
METRICS = {Row.CORRECT, Row.AGREEMENT}


@emulated
@pytest.mark.parametrize(
    ("dtypes", "how"),
    [
        ((WIDE, NARROW, NARROW), {"in_place": True}),
        ((WIDE, WIDE, HALF), {"in_place": True, "T": 1.7, "scale": 0.8, "cap": 5.0, "metrics": METRICS}),
        ((NARROW, NARROW, NARROW), {"in_place": True, "hard": {Row.LOG_PROB}, "metrics": METRICS}),
        ((HALF, HALF, HALF), {"in_place": True, "hard": {Row.LOG_PROB}, "T": 2.0, "broken": True}),
        ((NARROW, WIDE, WIDE), {"hard": set(), "T": 2.0}),
        ((HALF, NARROW, WIDE), {"scale": -0.5, "broken": True}),
        ((WIDE, HALF, WIDE), {"hard": set(), "cap": 4.0}),
        ((WIDE, WIDE, WIDE), {"apart": 3e-4, "hard": {Row.LSE}}),
    ],
    ids=lambda x: None,
)
@pytest.mark.parametrize("name", LEAN)
def test_lean_and_generic_agree(name: str | None, dtypes: Any, how: dict[str, Any]) -> None:
    """Every number that the two write, for vocabularies of 1 to 8 blocks that end anywhere in a group."""
    if name is None:
        how = {**how, "hard": how.get("hard") or HARD, "metrics": how.get("metrics", set()) & {Row.CORRECT}}
    for vocab, blocks, reverse in ((1, 1, False), (2047, 1, True), (2050, 2, False), (4133, 4, True), (9004, 8, False)):
        extension.CUDA.reverse_threads(reverse)
        try:
            wanted, ours = (steps(design, vocab, name, dtypes, **how) for design in ("generic", "lean"))
        finally:
            extension.CUDA.reverse_threads(False)
        assert extension.CUDA.cluster_blocks() == blocks
        torch.testing.assert_close(ours[0], wanted[0], rtol=3e-5, atol=3e-6, equal_nan=True)
        rounding = {WIDE: 2e-5, HALF: 1e-3, NARROW: 8e-3}[dtypes[2]]
        torch.testing.assert_close(ours[1], wanted[1], rtol=rounding, atol=rounding / 100, equal_nan=True)


@emulated
@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize(
    ("name", "vocab", "blocks"),
    [(None, 5003, 4), (None, 17_000, 8), ("skew_kl", 5003, 4), ("jensen_shannon", 30_001, 16)],
)
def test_blocks_and_stages(name: str | None, vocab: int, blocks: int, stages: int) -> None:
    """Clusters of up to 16 blocks, one row at a time in shared memory or three, 64 columns a thread where that many
    are needed."""
    exact = steps("generic", vocab, name, (WIDE, WIDE, WIDE))
    part = -(-vocab // blocks // 8) * 8
    extension.CUDA.limit_arena(4096 + stages * part * (8 if name else 4) + 100)
    try:
        ours = steps("lean", vocab, name, (WIDE, WIDE, WIDE))
    finally:
        extension.CUDA.limit_arena(0)
    assert extension.CUDA.cluster_blocks() == blocks
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-5, atol=3e-6, equal_nan=True)


@emulated
@pytest.mark.usefixtures("designs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(divergences.TABLE)[:5])
def test_lean_against_the_oracle(name: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 7240, generator=g).to(dtype).requires_grad_()
    teacher, target = torch.randn(5, 7240, generator=g).bfloat16(), torch.tensor([0, 7239, 7, -100, 3000])
    arguments = {"divergence": name, "hard_weight": 0.5, "temperature": 1.3}
    loss, metrics = dk.distribution_loss(
        logits, target, teacher, backend="lean", return_metrics=True, compact=False, **arguments
    )
    exact = dk.testing.dense_loss(logits, None, target, teacher, **arguments)
    tolerance = {torch.float32: 3e-7, torch.bfloat16: 2e-3, torch.float16: 3e-4}[dtype]
    assert dk.testing.relative_error(loss, exact) < 1e-6
    wanted, ours = torch.autograd.grad(exact, logits)[0], torch.autograd.grad(loss, logits)[0]
    assert dk.testing.relative_error(ours, wanted) < tolerance
    valid = target != -100
    assert torch.equal(metrics.correct, (logits.argmax(-1) == target) & valid)
    assert torch.equal(metrics.teacher_agreement, (logits.argmax(-1) == teacher.argmax(-1)) & valid)


@emulated
@pytest.mark.usefixtures("designs")
@pytest.mark.parametrize("name", list(divergences.TABLE)[:5])
def test_lean_near_agreement(name: str) -> None:
    """A divergence of about 1e-7 keeps its digits."""
    g = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(5, 5000, generator=g)).requires_grad_()
    teacher = logits.detach() + 4e-4 * torch.randn(5, 5000, generator=g)
    loss = dk.distribution_loss(logits, None, teacher, backend="lean", divergence=name)
    exact = dk.testing.dense_loss(logits, None, None, teacher, divergence=name)
    assert 1e-9 < exact < 1e-6
    assert dk.testing.relative_error(loss, exact) < 4e-3
    wanted, ours = torch.autograd.grad(exact, logits)[0], torch.autograd.grad(loss, logits)[0]
    assert dk.testing.relative_error(ours, wanted) < 4e-3


@emulated
@pytest.mark.usefixtures("designs")
def test_statistics_alone() -> None:
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(7, 8, generator=g), torch.randn(5003, 8, generator=g)
    for teacher, name in ((None, "forward_kl"), *((dk.TeacherHead(hidden + 0.1, weight), name) for name in LEAN[1:])):
        ours, exact = (
            dk.linear_distribution_statistics(hidden, weight, None, teacher, backend=backend, divergence=name)
            for backend in ("lean", "reference")
        )
        torch.testing.assert_close(ours.entropy, exact.entropy)
        torch.testing.assert_close(ours.lse, exact.lse)
        if teacher is not None:
            torch.testing.assert_close(ours.divergence, exact.divergence)


@emulated
@pytest.mark.usefixtures("designs")
def test_rows_that_the_lean_kernels_do_not_take() -> None:
    with pytest.raises(RuntimeError, match="these rows do not fit the lean design"):
        dk.distribution_loss(torch.randn(2, 101), torch.tensor([1, 2]), backend="lean")
    dk.distribution_loss(torch.randn(2, 101), torch.tensor([1, 2]), backend="cuda")  # takes the other design


PLANTED = {  # what is left out of lean.cuh: a wait or a barrier
    "stage": ("arrival_wait(&shared.full[stage], parity);", ""),
    "meeting": ("arrival_wait(&shared.met[turn], meetings / 2 & 1);", ""),
    "refill": ("    __syncthreads();\n    then();", "    then();\n    __syncthreads();"),
    "announced": ("size * sizeof(X)", "size * sizeof(X) + 8"),
    "unannounced": ("size * sizeof(X)", "size * sizeof(X) - 8"),
}


@emulated
@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(fault: str, tmp_path: Path) -> None:
    """One kernel by itself, with a fault: it says so, or its loss is wrong. Without one its loss is right."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    source = tmp_path / "csrc/cuda/lean.cuh"
    text, (right, wrong) = source.read_text(), PLANTED[fault]
    assert text.count(right) == 1
    source.write_text(text.replace(right, wrong))
    said = cuda_on_host.alone(tmp_path / "csrc", tmp_path)
    assert said.returncode != 0, said.stdout


@emulated
def test_the_planted_faults_are_the_only_ones(tmp_path: Path) -> None:
    said = cuda_on_host.alone(ROOT / "csrc", tmp_path)
    assert said.returncode == 0, said.stdout


@emulated
def test_arithmetic_against_double(tmp_path: Path) -> None:
    """The functions of arithmetic.h over their range, with exact 2^x, log2 x and 1/x."""
    program = tmp_path / "arithmetic.cpp"
    program.write_text(
        """
#include "cuda/arithmetic.h"
#include <cstdio>
using M = dft::cuda::Math<float>;
int main() {
  double worst[3] = {};
  for (int i = -400000; i <= 400000; i++) {
    const float size = std::exp(std::fabs(i) * 7e-5f - 24), x = i < 0 ? -size : size < 2 ? size : 0;
    const double exact[3] = {std::expm1(double(x)), x > -1 ? std::log1p(double(x)) : 0, std::tanh(double(x))};
    const float ours[3] = {M::expm1(x), x > -1 ? M::log1p(x) : 0, M::tanh(x)};
    for (int k = 0; k < 3; k++)
      if (std::fabs(exact[k]) > 1e-37 && std::fabs(exact[k]) < 1e37)
        worst[k] = std::fmax(worst[k], std::fabs(ours[k] / exact[k] - 1) * (1 << 24));
  }
  std::printf("%f %f %f", worst[0], worst[1], worst[2]);
  return !(M::expm1(0) == 0 && M::log1p(0) == 0 && M::tanh(0) == 0 && M::log1p(-1) == -INFINITY &&
           M::expm1(-INFINITY) == -1 && M::tanh(INFINITY) == 1 && M::tanh(-INFINITY) == -1 && std::isnan(M::tanh(NAN)));
}
"""
    )
    subprocess.run(["g++", "-std=c++20", "-O2", f"-I{ROOT}/csrc", program, "-o", tmp_path / "a"], check=True)
    ran = subprocess.run([tmp_path / "a"], capture_output=True, text=True)
    assert ran.returncode == 0

    assert all(error < limit for error, limit in zip(map(float, ran.stdout.split()), (4, 4, 5), strict=True))


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
        kernels.row_gradient(rows, torch.zeros(14, 3), 8, torch.zeros(6, 3), None, torch.empty(3, 4))
    with pytest.raises(RuntimeError, match=r"cotangents must be \[6, R\]"):
        kernels.row_gradient(rows, torch.zeros(14, 3), 8, torch.zeros(6, 2), None, torch.empty(3, 5))
    with pytest.raises(RuntimeError, match="divergence must be one of its table, got kl"):
        kernels.row_statistics(kernels.Rows(logits=torch.randn(3, 5), divergence="kl"), 8, 0)


@compiles
@pytest.mark.kept(where=lambda architecture: architecture == "90a")  # that with clusters; another is built below
@pytest.mark.parametrize("architecture", ["75", "80", "90a", "100"])
def test_kernels_compile_alone_without_warnings_and_spills(architecture: str, tmp_path: Path) -> None:
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        command = (
            f"nvcc -std=c++17 --expt-relaxed-constexpr --extended-lambda -Icsrc -gencode=arch=compute_{architecture}"
        )
        command += f",code=sm_{architecture} -Xptxas -v,-Werror -Werror all-warnings -c {source} -o {tmp_path}/kernel.o"
        done = subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        entries = done.stderr.count("Compiling entry function")
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
        assert len(frames) == entries
        assert entries >= (4 if source.stem == "columns" else len(divergences.TABLE) + 1)
        assert set(frames) == {("0", "0", "0")}
        assert max(map(int, re.findall(r"Used (\d+) registers", done.stderr))) <= 168


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    ignored = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    for name in ("csrc", "dft_kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    merged = {**os.environ, "DFT_KERNELS_CUDA": "1", **environment}
    return subprocess.run(command, cwd=folder, env=merged, capture_output=True, text=True)


@compiles
def test_the_extension_builds_links_and_loads(tmp_path: Path) -> None:
    """The CUDA kernels alone, on any machine with nvcc, GPU or not, CUDA in torch or not."""
    done = build(tmp_path, TORCH_CUDA_ARCH_LIST="8.0+PTX", DFT_KERNELS_CPU="0")
    assert done.returncode == 0, done.stderr[-3000:]
    code = (
        "from dft_kernels.backends import BACKENDS, extension as e; import torch\n"
        "print(e.CUDA.DIVERGENCES, e.read_stamp()['cuda_kernels']['architectures'])\n"
        "print(BACKENDS['cuda'].unavailable(torch.device('cpu'), torch.float32))\n"
        "print(e.MODULE, e.REASON)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert f"{list(divergences.TABLE)} ['8.0+PTX']" in ran.stdout
    assert "its kernels run on NVIDIA GPUs, not on cpu" in ran.stdout
    assert "None the C++ extension could not be built (DFT_KERNELS_CPU=0 at the build)" in ran.stdout


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
        "compiled for 8.0, 9.0a, 10.0+PTX, this one has capability 7.5. Rebuild with: TORCH_CUDA_ARCH_LIST=7.5"
        in reason
    )
    assert extension.not_compiled_for((9, 0), {"architectures": ["9.0a"]}) is None
    assert extension.not_compiled_for((9, 1), {"architectures": ["9.0a"]}) is not None
