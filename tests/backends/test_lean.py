"""The lean CUDA kernels executed on the CPU: against the generic ones, the oracle, and with faults planted."""

from __future__ import annotations

import shutil
import subprocess
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
emulated = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run on")


@pytest.fixture
def designs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("generic", "lean"):
        monkeypatch.setitem(BACKENDS, name, CudaBackend(name))


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


ANNOUNCED = "arrival_expect(full, uint32_t(columns * (size + target_size)));"
PLANTED = {  # what is wrong in lean.cuh: a wait, a barrier or an arrival
    "stage": ("arrival_wait(&shared.full[stage], parity);", ""),
    "meeting": ("arrival_wait(&shared.met[turn], meetings / 2 & 1);", ""),
    "refill": ("    __syncthreads();\n    then();", "    then();\n    __syncthreads();"),
    "twice": (ANNOUNCED, f"{ANNOUNCED} {ANNOUNCED}"),
    "announced": ("plan.blocks * sizeof(X)", "plan.blocks * sizeof(X) + 8"),
    "unannounced": ("plan.blocks * sizeof(X)", "plan.blocks * sizeof(X) - 8"),
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
    assert said.returncode == 1, said  # no signal: what goes wrong in a thread reaches the caller
    assert ("more often in a phase" in said.stdout) == (fault in ("stage", "meeting", "twice"))


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
