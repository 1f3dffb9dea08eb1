"""How a call is cut: rows of a chunk, kept dlogits, what it costs in memory."""

from __future__ import annotations

import pytest
import torch
from cases import PRESENT

import dft_kernels as dk
from dft_kernels.backends import BACKENDS
from dft_kernels.backends.contract import Row
from dft_kernels.loss.build import build
from dft_kernels.loss.functional import LINEAR_DISTRIBUTION_LOSS
from dft_kernels.loss.planning import Plan, plan
from dft_kernels.loss.problem import loss_terms
from dft_kernels.testing import record_allocations, relative_error

GPU = 1536 << 20  # the default budget there
CE, KL = False, True


def planned(n: int, h: int, v: int, taught: bool, dtype: torch.dtype = torch.bfloat16, **options: object) -> Plan:
    """Of a call of a row backend, whose tensors take no memory."""
    hidden, weight = torch.empty((), dtype=dtype).expand(n, h), torch.empty((), dtype=dtype).expand(v, h)
    given = {"memory_budget": GPU, "backend": "reference"} | options
    if given.get("chunk_size"):
        given.pop("memory_budget")
    teacher = dk.TeacherHead(hidden, weight) if taught else None
    target = torch.zeros((), dtype=torch.int64).expand(n)
    problem = build(LINEAR_DISTRIBUTION_LOSS, hidden, weight, target, teacher, given)
    problem = problem._replace(need_hidden=True, need_weight=True)
    return plan(problem, BACKENDS[str(given["backend"])], n, problem.terms(loss_terms(problem)))


@pytest.mark.parametrize(
    ("shape", "taught", "options", "expected"),
    [
        # chunks of a multiple of 1024 rows; dlogits kept where they take no more than an accumulator of dweight
        ((8192, 4096, 128256), CE, {}, Plan(1024, 8192)),
        ((8192, 4096, 128256), KL, {}, Plan(1024, 8192)),
        ((8192, 4096, 151936), CE, {}, Plan(1024, 8192)),
        ((16384, 4096, 128256), CE, {}, Plan(3072)),
        ((131072, 4096, 128256), KL, {}, Plan(1024)),
        # or where they fit the budget beside a chunk
        ((8192, 576, 49152), CE, {}, Plan(4096, 8192)),
        ((8192, 576, 49152), KL, {}, Plan(2048, 8192)),
        ((65536, 576, 49152), CE, {}, Plan(4096)),
        # one chunk
        ((4096, 576, 49152), CE, {}, Plan(4096)),
        ((2048, 4096, 128256), CE, {}, Plan(2048)),
        ((1, 4096, 128256), CE, {}, Plan(1)),
        # narrow logits are where their dlogits are kept
        ((8192, 4096, 128256), CE, {"logits_dtype": torch.bfloat16}, Plan(8192)),
        ((8192, 4096, 128256), KL, {"logits_dtype": torch.bfloat16}, Plan(1024, 8192)),
        # fp16 has not the range for what is kept
        ((8192, 4096, 128256), CE, {"dtype": torch.float16}, Plan(3072)),
        ((8192, 4096, 128256), CE, {"chunk_size": 1000}, Plan(1000, 8192)),
        ((8192, 4096, 128256), CE, {"memory_budget": 100 << 20}, Plan(128, 8192)),
    ],
)
def test_plan(shape, taught, options, expected):
    assert planned(*shape, taught, **options) == expected


@pytest.mark.skipif("native" not in PRESENT, reason="the extension was not built")
@pytest.mark.parametrize("taught", [CE, KL])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_on_a_cpu(dtype, taught):
    """The same budget holds twice the rows."""
    shape, budget = (4096, 64, 49152), (8 if taught else 4) * 128 * 49152
    native = {"dtype": dtype, "memory_budget": budget, "backend": "native"}
    assert planned(*shape, taught, **native) == Plan(128)
    assert planned(*shape, taught, **native, logits_dtype=dtype) == Plan(256)


@pytest.mark.parametrize("kept", [True, False])
def test_the_budget_is_kept(kept):
    """Scratch within the budget; beside it the gradients, and an accumulator of dweight or what is kept instead. In
    fp32: a CPU has no products of narrow operands with an fp32 result, and converts them."""
    n, h, v = 192, 256 if kept else 16, 512
    hidden, weight = (torch.randn(*shape).requires_grad_() for shape in ((n, h), (v, h)))
    options = {"backend": "cuda", "memory_budget": 64 * v * 4}
    assert (planned(n, h, v, CE, torch.float32, **options).kept > 0) == kept
    with record_allocations() as seen:
        loss = dk.linear_cross_entropy(hidden, weight, torch.randint(0, v, (n,)), **options)
    rows = 4 * (64 * (len(Row) + 6) + 8 * n) + 32 * n  # statistics, cotangents, row quantities, labels
    gradients, instead = 4 * (n * h + v * h), 4 * (n * v + n * h) if kept else 0
    assert seen.peak < options["memory_budget"] + gradients + instead + rows
    assert instead <= 4 * (v * h + n * h)
    assert torch.isfinite(loss)


@pytest.mark.parametrize("backend", PRESENT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_or_added_chunk_by_chunk(backend, dtype, monkeypatch):
    """The same gradients, with ignored rows and a low-rank pair."""
    torch.manual_seed(0)
    n, h, v, r = 50, 40, 30, 3
    tensors = [torch.randn(*shape).to(dtype).requires_grad_() for shape in ((n, h), (v, h), (v,), (n, r), (v, r))]
    hidden, weight, bias, down, up = tensors
    target = torch.randint(0, v, (n,))
    target[::7] = -100

    def gradients(chunk_size):
        loss = dk.linear_distribution_loss(
            hidden, weight, target, bias=bias, low_rank=(down, up), chunk_size=chunk_size, backend=backend
        )
        return torch.autograd.grad(loss, tensors)

    whole, kept = gradients(n), gradients(7)
    monkeypatch.setattr(BACKENDS[backend], "keeps", False)
    added = gradients(7)
    eps = torch.finfo(dtype).eps
    for one, two, three in zip(whole, kept, added, strict=True):
        assert one.dtype == two.dtype == three.dtype == dtype
        assert relative_error(two, one) < 8 * eps
        assert relative_error(three, one) < 8 * eps
