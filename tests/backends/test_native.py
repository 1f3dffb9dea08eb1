"""The CPU kernels: their functions to the ulp, every instruction set, threads, and the scratch that they keep."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dft_kernels as dk
from dft_kernels.backends import extension
from dft_kernels.divergences import TABLE
from dft_kernels.testing import relative_error

pytestmark = pytest.mark.skipif(extension.MODULE is None, reason=str(extension.REASON))
NATIVE = extension.MODULE
TESTS = Path(__file__).parent


def spread(low: float, high: float) -> torch.Tensor:
    """Numbers of both signs and of every size between low and high."""
    size = torch.logspace(-12, 2.2, 1 << 15)
    return torch.cat([torch.linspace(low, high, 1 << 16), size, -size]).clamp(low, high)


@pytest.mark.parametrize(
    ("function", "exact", "low", "high", "ulps"),
    [
        (0, torch.exp, -86.0, 87.9, 2.0),
        (1, torch.expm1, -100.0, 87.0, 3.0),
        (2, torch.log1p, -1 + 2**-24, 0.0, 3.0),
        (3, torch.tanh, -30.0, 30.0, 4.0),
        (4, torch.exp, -86.0, 88.7, 4.0),
    ],
)
def test_functions_are_good_to_a_few_ulp(function, exact, low, high, ulps):
    x = spread(low, high)
    want = exact(x.double())
    got = NATIVE.evaluate(function, x).double()
    unit = torch.finfo(torch.float32).eps * torch.exp2(torch.floor(torch.log2(want.abs().clamp(min=1e-37))))
    assert float(((got - want) / unit).abs().max()) <= ulps
    assert relative_error(NATIVE.evaluate(function, x.double()), want) < 1e-15


def test_functions_at_the_edges():
    inf, nan = torch.inf, torch.nan

    def at(function, *values):
        return NATIVE.evaluate(function, torch.tensor([*values, *[0.0] * (32 - len(values))]))[: len(values)].tolist()

    assert at(0, -inf, 0.0, -200.0) == [0.0, 1.0, 0.0]
    assert at(4, -inf, inf, 0.0, 100.0, -200.0) == [0.0, inf, 1.0, inf, 0.0]
    assert at(1, -inf, 0.0, -1e-20) == [-1.0, 0.0, pytest.approx(-1e-20)]
    assert at(2, -1.0, 0.0, -1e-20) == [pytest.approx(-88.0, abs=0.1), 0.0, pytest.approx(-1e-20)]
    assert at(3, -inf, 0.0, inf) == [-1.0, 0.0, 1.0]
    for function in range(5):
        (value,) = at(function, nan)
        assert value != value


@pytest.mark.parametrize("vocab", [1, 7, 1003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_next_token_distributions(dtype, vocab):
    """By the formulas, in float64; tests/generation/test_steps.py has what the steps make of them."""
    scores = 3 * torch.randn(4, vocab, generator=torch.Generator().manual_seed(1), dtype=dtype)
    scores[1, 1::2] = -torch.inf
    shift, z = torch.linspace(-1, 1, vocab, dtype=dtype), scores.double()

    def entropy(logs):
        return -(logs.exp() * logs.nan_to_num(neginf=0.0)).sum(1, keepdim=True)

    def of(name, *given):
        out = torch.empty_like(scores)
        getattr(NATIVE, name)(scores, *given, out)
        return out.double()

    def close(found, want):
        assert torch.equal(found == -torch.inf, want == -torch.inf)
        torch.testing.assert_close(found.exp(), want.exp(), rtol=2e-5, atol=1e-7)

    close(of("shifted_scores", shift), (z + shift).log_softmax(1))
    plain = entropy(z.log_softmax(1))
    close(
        of("scores_by_entropy", 0.3, -0.5, -3.0),
        (z / (0.3 - 0.5 / plain.clamp_min(1e-6)).clamp_min(-3).exp()).log_softmax(1),
    )
    sigma = torch.stack([row[row > -torch.inf].std(correction=0) for row in z])[:, None]
    kept = z >= z.amax(1, keepdim=True) - 1.5 * sigma
    close(of("scores_within", 1.5), z.masked_fill(~kept, -torch.inf).log_softmax(1))
    made = of("scores_at_entropy", 0.8, -3.0, 0.0, 8, 2e-5)
    torch.testing.assert_close(entropy(made), 0.8 * plain, rtol=1e-5, atol=3e-5)
    if vocab > 1:  # a temperature of the row's: log q is linear in z
        cold = (made[0, 0] - made[0, 1]) / (z[0, 0] - z[0, 1])
        close(made[:1], (z[:1] * cold).log_softmax(1))


def gradients(dtype=torch.bfloat16, **options):
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(150, 34, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(1000, 34, generator=g).to(dtype).requires_grad_()
    teacher = dk.TeacherHead(torch.randn(150, 18, generator=g).to(dtype), torch.randn(1000, 18, generator=g).to(dtype))
    target = torch.randint(0, 1000, (150,), generator=g)
    options = {"hard_weight": 0.3, "divergence": "jensen_shannon", "chunk_size": 70, "backend": "native", **options}
    loss = dk.linear_distribution_loss(hidden, weight, target, teacher, **options)
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_threads_change_nothing_but_rounding(dtype):
    before = torch.get_num_threads()
    try:
        results = {}
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results[count] = gradients(dtype)
            assert all(torch.equal(a, b) for a, b in zip(results[count], gradients(dtype), strict=True))
    finally:
        torch.set_num_threads(before)
    for count in (2, 3):
        for a, b in zip(results[count], results[1], strict=True):
            assert relative_error(a, b) <= 2 * torch.finfo(dtype).eps


def test_calls_on_several_threads_do_not_share_scratch():
    want, found = gradients(), []
    threads = [threading.Thread(target=lambda: found.append([gradients() for _ in range(5)])) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    for many in found:
        for one in many:
            assert all(relative_error(a, b) < 1e-2 for a, b in zip(one, want, strict=True))


def test_scratch_is_kept_and_released():
    dk.release_scratch()
    start = NATIVE.pool_bytes()
    hidden, weight = torch.randn(256, 8), torch.randn(9000, 8)
    target = torch.randint(0, 9000, (256,))
    loss = dk.linear_cross_entropy(hidden, weight, target, backend="native")
    kept = NATIVE.pool_bytes() - start
    assert 4 * 256 * 9000 <= kept <= 4 * 256 * 9000 + (2 << 20)
    again = dk.linear_cross_entropy(hidden, weight, target, backend="native")
    assert NATIVE.pool_bytes() - start == kept  # taken again, not added to
    assert dk.release_scratch() == kept
    assert NATIVE.pool_bytes() == start
    assert torch.equal(loss, again)


@pytest.mark.parametrize("megabytes", [4, 24])
def test_memory_budget_is_kept(megabytes):
    dk.release_scratch()
    start = NATIVE.pool_bytes()
    hidden, weight = torch.randn(512, 8), torch.randn(20000, 8)
    teacher = dk.TeacherHead(torch.randn(512, 8), torch.randn(20000, 8))
    options = {"backend": "native", "memory_budget": megabytes << 20}
    dk.linear_distribution_loss(hidden, weight, None, teacher, **options)
    kept = NATIVE.pool_bytes() - start
    pages = 2 * (2 << 20)  # either buffer is rounded up to large pages, and to 32 rows
    assert max(megabytes << 20, 2 * 32 * 4 * 20000) / 2 < kept <= max(megabytes << 20, 2 * 32 * 4 * 20000) + pages
    dk.release_scratch()


@pytest.mark.parametrize("teacher", ["none", "head", "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_logits_take_half_the_scratch(dtype, teacher):
    """But for a teacher's logits in fp32, which are kept as they are."""
    rows, vocab = 256, 40000
    hidden, weight = torch.randn(rows, 8).to(dtype), torch.randn(vocab, 8).to(dtype)
    target, given, theirs = torch.randint(0, vocab, (rows,)), None, 0
    if teacher == "head":
        given, theirs = dk.TeacherHead(hidden, weight), 2
    elif teacher != "none":
        given = torch.randn(rows, vocab).to(getattr(torch, teacher))
        theirs = given.dtype.itemsize
    for logits_dtype, each in ((None, 4 + 4 * (given is not None)), (dtype, 2 + theirs)):
        dk.release_scratch()
        start = NATIVE.pool_bytes()
        dk.linear_distribution_loss(hidden, weight, target, given, backend="native", logits_dtype=logits_dtype)
        kept = NATIVE.pool_bytes() - start
        page = 2 << 20  # whole ones: the logits; where narrow, a tile of 64 x 256 a thread, and a block of 2048 x 256
        more = 1 if logits_dtype is None else 2 + -(-4 * 64 * 256 * torch.get_num_threads() // page)
        assert each * rows * vocab <= kept <= each * rows * vocab + 2 * more * page
    dk.release_scratch()


NARROW = {
    "cross_entropy": {"target": True, "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 9.0, "logit_scale": 0.7},
    "forward_kl": {"teacher": "head", "target": True, "hard_weight": 0.3},
    "jensen_shannon": {"teacher": "capped", "divergence": "jensen_shannon", "softcap": 7.0, "temperature": 1.5},
    "reverse_kl": {"teacher": "logits", "divergence": "reverse_kl", "target": True},
    "top_k": {"teacher": "top_k", "target": True, "softcap": 6.0},
    "features": {"features": True, "softcap": 5.0},
    "columns": {"target": True, "columns": True},
    "low_rank": {"teacher": "head", "low_rank": True},
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", NARROW)
def test_narrow_logits_are_what_they_round_to(case, dtype, threads):
    """Held in 16 bits they give the bits that the same numbers give as logits, which are held in fp32: operands are
    multiples of 1 / 32, whose sums of products are exact, so that a logit is rounded once. Gradients: to rounding."""
    g, n, h, v, r = torch.Generator().manual_seed(6), 41, 24, 2100, 3  # a block that ATen multiplies, and a part of one

    def random(*shape: int) -> torch.Tensor:
        return (32 * torch.randn(*shape, generator=g)).round().clamp(-96, 96) / 32

    hidden, weight, bias, down, up = random(n, h), random(v, h), random(v), random(n, r), random(v, r)
    theirs, their_weight = random(n, 10), random(v, 10)
    options = dict(NARROW[case])
    if options.pop("target", False):
        options["target"] = torch.randint(0, v, (n,), generator=g)
    if options.pop("features", False):
        options |= {"features": random(v, 3) * (torch.arange(v) % 7 == 0)[:, None], "feature_weight": random(n, 3)}
    if options.pop("columns", False):
        group = torch.randint(0, 2, (n,), generator=g)
        options |= {"potential": random(2, v), "group": group, "num_groups": 2, "entropy_weight": random(n)}
        options["return_metrics"] = True
    adapted, kind = options.pop("low_rank", False), options.pop("teacher", None)
    logits = (hidden @ weight.T + (down @ up.T if adapted else 0) + bias).to(dtype)
    teacher_logits = (theirs @ their_weight.T).to(dtype)
    given = made = None
    if kind == "top_k":
        found = teacher_logits.float().log_softmax(-1).topk(5)
        given = made = dk.TopK(found.indices, found.values)
    elif kind == "logits":
        given = made = teacher_logits
    elif kind is not None:
        form = {"softcap": 5.0, "logit_scale": 0.6} if kind == "capped" else {}
        made = dk.TeacherHead(theirs.to(dtype), their_weight.to(dtype), **form)
        given = teacher_logits.float()
        if form:
            given = torch.tanh(given * 0.6 / 5.0) * 5.0

    def results(found: object) -> list[torch.Tensor]:
        loss, metrics = found if isinstance(found, tuple) else (found, None)
        more = [] if metrics is None else [x for x in vars(metrics).values() if isinstance(x, torch.Tensor)]
        return [loss, *more]

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        options |= {"reduction": "none", "backend": "native"}
        wide = logits.float().requires_grad_()
        want = results(dk.distribution_loss(wide, teacher=given, **options))
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)]
        pair = {"low_rank": (down.to(dtype), up.to(dtype))} if adapted else {}
        options |= {"bias": leaves[2], "logits_dtype": dtype, **pair}
        got = results(dk.linear_distribution_loss(*leaves[:2], teacher=made, **options))
        (slope,) = torch.autograd.grad(want[0].sum(), wide)
        gradients = torch.autograd.grad(got[0].sum(), leaves)
    finally:
        torch.set_num_threads(before)
    for ours, theirs in zip(got, want, strict=True):
        if kind == "capped":  # whose tanh is not ATen's
            assert relative_error(ours, theirs) < 1e-5
        else:
            assert torch.equal(ours, theirs)
    for ours, exact in zip(gradients, (slope @ weight, slope.T @ hidden, slope.sum(0)), strict=True):
        assert relative_error(ours, exact) < 2 * torch.finfo(dtype).eps


def test_gradients_outlive_the_release_of_scratch():
    weight = torch.randn(40000, 16).bfloat16().requires_grad_()
    hidden, target = torch.randn(64, 16).bfloat16(), torch.randint(0, 40000, (64,))
    dk.linear_cross_entropy(hidden, weight, target, backend="native").backward()
    before = weight.grad.clone()
    dk.release_scratch()
    dk.linear_cross_entropy(hidden + 1, weight.detach(), target, backend="native")
    assert torch.equal(weight.grad, before)


@pytest.mark.parametrize("teacher_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_logits_of_any_dtype(dtype, teacher_dtype):
    g = torch.Generator().manual_seed(4)
    logits = (4 * torch.randn(37, 203, generator=g, dtype=torch.float64)).to(dtype).requires_grad_()
    teacher = (4 * torch.randn(37, 203, generator=g, dtype=torch.float64)).to(teacher_dtype)
    both = []
    for backend in ("native", "reference"):
        loss = dk.distribution_loss(logits, None, teacher, divergence="reverse_kl", chunk_size=33, backend=backend)
        both.append([loss.detach(), *torch.autograd.grad(loss, logits)])
    for ours, theirs in zip(*both, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, theirs) <= max(1e-6, torch.finfo(dtype).eps) if dtype != torch.float64 else 1e-12


def test_every_half_survives_the_way_through():
    """exp and the products aside: a row's gradient of sum q * G at G = one-hot shows the logits' own rounding."""
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    halves = halves[torch.isfinite(halves)][None]  # [1, 63488], all finite values, subnormals included
    lse = dk.linear_distribution_statistics(
        torch.ones(1, 1).half(), halves.t().contiguous(), row_weight=None, backend="native"
    ).lse
    assert float(lse) == pytest.approx(float(halves.double().logsumexp(-1)), rel=1e-6)
    small = halves[:, halves[0].abs() < 1.0].clone()
    found = dk.distribution_loss(small, torch.tensor([5]), backend="native")
    assert float(found) == pytest.approx(float(-small.double().log_softmax(-1)[0, 5]), rel=1e-6)


SETTINGS = {  # what a process is told to use less of than this processor has
    "baseline": {"ATEN_CPU_CAPABILITY": "default"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "no_bf16_products": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "all_of_it": {},
}
other_processors = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="one instruction set on this processor"
)


def run_under(setting: str, threads: int, selection: str, *files: str) -> None:
    """The selected tests of these files, all passing, in a process with a setting and so many threads."""
    environment = {**os.environ, **SETTINGS[setting]}
    code = (
        "from dft_kernels.backends import extension as e; print(e.MODULE.instruction_set(), e.MODULE.multiplies_bf16())"
    )
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    chosen, multiplies = ran.stdout.split()
    if "ONEDNN_MAX_CPU_ISA" in SETTINGS[setting]:
        assert multiplies == "False"
    if "ATEN_CPU_CAPABILITY" in SETTINGS[setting]:
        assert chosen in (setting, "baseline")  # a processor without AVX2 has only the latter
    # set inside the process: torch takes no more threads than cores from OMP_NUM_THREADS
    code = f"import sys, pytest, torch; torch.set_num_threads({threads}); sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "-q", "-x", *files, "-k", f"({selection}) and not other_processors"]
    ran = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:]


def less() -> list[str]:
    """The settings that leave this processor less than it has."""
    if NATIVE is None:
        return []
    chosen = NATIVE.instruction_set()
    there = {"baseline": chosen != "baseline", "avx2": chosen == "avx512", "no_bf16_products": NATIVE.multiplies_bf16()}
    return [name for name, is_less in there.items() if is_less]


@other_processors
@pytest.mark.parametrize("setting", less())
def test_other_processors(setting: str) -> None:
    """The case table through the CPU kernels on every instruction set that a processor may lack."""
    selection = "test_case and native and (float32 or bfloat16) or functions or narrow_logits or next_token"
    run_under(setting, 2, selection, "test_contract.py", "test_native.py")


@pytest.mark.full
@other_processors
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("setting", SETTINGS)
def test_other_processors_in_full(setting: str, threads: int) -> None:
    """Every instruction set with every number of threads: all backends (the interpreted one does not depend on either),
    every test that judges results."""
    files = ("test_contract.py", "test_native.py", "test_edges.py", "test_gate.py")
    run_under(setting, threads, "not triton", *files)


def test_a_divergence_that_was_not_built_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of the table alone, without the C++ pair: an error, and no read behind the kernels' own table."""
    hidden, weight = torch.randn(4, 8), torch.randn(16, 8)
    row = replace(TABLE["forward_kl"], id=len(TABLE))
    monkeypatch.setitem(TABLE, "forward_kl", row)
    with pytest.raises(
        RuntimeError, match=r"divergence must be one of the 8 that the CPU kernels were built with, got id 8"
    ):
        dk.linear_distribution_loss(hidden, weight, teacher=dk.TeacherLogits(torch.randn(4, 16)), backend="native")
