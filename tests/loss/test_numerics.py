"""What the losses promise of numbers and memory: masked and extreme logits, near agreement, NaN, fp16, no [N, V]."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comparisons import close

import dft_kernels as dk
from dft_kernels.backends import extension
from dft_kernels.testing import dense_loss, record_allocations, textbook_divergence

pytestmark = pytest.mark.usefixtures("backend")


def test_no_rows_over_no_items_is_zero() -> None:
    """As when no batch of an accumulated step has a label."""
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)
    loss = dk.linear_cross_entropy(hidden, weight, torch.full((4,), -100), num_items=torch.tensor(0))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_fp16_gradients_do_not_flush():
    hidden = torch.randn(40, 4).half().requires_grad_()
    weight = torch.randn(9, 4).half().requires_grad_()
    target = torch.randint(0, 9, (40,))
    loss = dk.linear_cross_entropy(hidden, weight, target, num_items=4e6)
    small = torch.autograd.grad(loss, (hidden, weight), torch.tensor(65536.0))
    exact = dense_loss(hidden, weight, target, num_items=4e6 / 65536.0)
    close(small, [g.half() for g in torch.autograd.grad(exact, (hidden, weight))], 4e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("masked", ["model", "both"])
@pytest.mark.parametrize("name", dk.divergences.TABLE)
def test_masked_vocabulary(name, masked, dtype):
    """-inf logits: gradients are finite, the loss is the textbook one, +inf exactly where q = 0 < p makes it so."""
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(6, 11, generator=g, dtype=dtype)
    teacher = torch.randn(6, 11, generator=g, dtype=dtype)
    logits[:, 3] = -torch.inf
    if masked == "both":
        teacher[:, 3] = -torch.inf
    infinite = masked == "model" and name == "forward_kl"
    logits.requires_grad_()
    loss = dk.distribution_loss(logits, None, teacher, divergence=name)
    if infinite:
        assert loss == torch.inf
        return
    keep = [v for v in range(11) if v != 3] if masked == "both" else list(range(11))
    log_p, log_q = teacher.log_softmax(-1)[:, keep], logits.log_softmax(-1)[:, keep]
    exact = textbook_divergence(log_p, log_q.detach(), name).mean()
    if masked == "model":  # the closed forms where q_3 = 0
        assert torch.isfinite(loss)
    else:
        close([loss], [exact], 1e-9 if dtype == torch.float64 else 2e-6)
    (grad,) = torch.autograd.grad(loss, logits)
    assert torch.isfinite(grad).all()
    assert (grad[:, 3] == 0).all()


def test_extreme_logits_and_zero_weights():
    logits = torch.tensor([[3e4, -3e4, 0.0], [1e-30, 0.0, -1e-30], [88.0, 89.0, 90.0]], requires_grad=True)
    target = torch.tensor([1, 0, 2])
    loss = dk.distribution_loss(logits, target)
    exact = F.cross_entropy(logits, target)
    close([loss, *torch.autograd.grad(loss, logits)], [exact, *torch.autograd.grad(exact, logits)])
    broken = torch.tensor([[torch.nan, 0.0, 0.0], [1.0, 2.0, 3.0]], requires_grad=True)
    weighted = dk.distribution_loss(broken, torch.tensor([0, 1]), row_weight=torch.tensor([0.0, 2.0]))
    (grad,) = torch.autograd.grad(weighted, broken)
    assert torch.isfinite(weighted)
    assert (grad[0] == 0).all()
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("size", [1e-3, 1e-2])
@pytest.mark.parametrize("name", dk.divergences.TABLE)
def test_near_agreement(name, size):
    """Where teacher and model nearly agree the loss is a sum of small non-negative addends, not a difference."""
    g = torch.Generator().manual_seed(5)
    logits = torch.randn(16, 4096, generator=g) * 3
    teacher = logits + size * torch.randn(16, 4096, generator=g)
    loss = dk.distribution_loss(logits, None, teacher, divergence=name, reduction="none")
    exact = dense_loss(logits, None, None, teacher, divergence=name, reduction="none")
    assert float(((loss - exact) / exact).abs().max()) < 4e-3
    assert (loss >= 0).all()


def test_memory_no_tensor_of_rows_by_vocabulary(backend):
    n, h, v, chunk = (48, 4, 4096, 2) if backend in ("triton", "cuda") else (2048, 16, 4096, 64)  # or emulated
    hidden = torch.randn(n, h).bfloat16().requires_grad_()
    weight = torch.randn(v, h).bfloat16().requires_grad_()
    teacher = dk.TeacherHead(torch.randn(n, h).bfloat16(), torch.randn(v, h).bfloat16())
    target = torch.randint(0, v, (n,))
    dk.release_scratch()
    pool = extension.MODULE.pool_bytes if extension.MODULE is not None else int
    held = pool()  # what the recorder does not see: scratch kept between calls
    for reduction in ("mean", "none"):
        with record_allocations() as seen:
            dk.linear_distribution_loss(
                hidden, weight, target, teacher, hard_weight=0.1, chunk_size=chunk, reduction=reduction
            ).sum().backward()
        hidden.grad = weight.grad = None
        assert seen.largest < 1.6 * n * v  # bytes: [N, V] has 2 n v in 16 bits; a product's own scratch is 256 kB
        assert seen.peak + pool() - held < 6 * n * v  # bytes
        assert pool() - held < 4 * 4 * chunk * v + 4 * v * h + (12 << 20)  # whole pages of 2 MB
    with record_allocations() as seen, torch.no_grad():
        dk.linear_distribution_loss(hidden, weight, target, teacher, chunk_size=chunk)
    assert seen.largest < n * v
    with record_allocations() as eager:
        dense_loss(hidden, weight, target, teacher, hard_weight=0.1, compute_dtype=None).backward()
    assert eager.largest >= 4 * n * v  # the recorder sees what it is for


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon", "total_variation"])
def test_nan_is_never_silent(divergence: str, backend: str) -> None:
    """A guard of 0 log 0 takes NaN for 0; a teacher or a model that is broken must not look like a loss."""
    hidden, weight, logits = torch.randn(6, 5), torch.randn(40, 5), torch.randn(6, 40)
    logits[2, 7] = torch.nan
    rows = dk.linear_distribution_loss(
        hidden, weight, teacher=logits, divergence=divergence, reduction="none", backend=backend
    )
    assert rows.isnan().tolist() == [False, False, True, False, False, False]
    hidden[4, 1] = torch.nan
    leaf = hidden.requires_grad_()
    loss = dk.linear_distribution_loss(leaf, weight, teacher=logits, divergence=divergence, backend=backend)
    assert loss.isnan()
