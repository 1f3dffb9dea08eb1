"""grad_output: applied to saved gradients in place, once, and not at all where it is 1."""

from __future__ import annotations

import pytest
import torch
from cases import PRESENT

import dft_kernels as dk
from dft_kernels.testing import dense_loss, record_allocations, relative_error

N, H, V = 40, 16, 600
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def problem(dtype: torch.dtype, ignored: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in ((N, H), (V, H)))
    target = torch.randint(0, V, (N,), generator=generator)
    target[:ignored] = -100
    return hidden, weight, target


def exact(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, factor: float) -> tuple[torch.Tensor, ...]:
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    return torch.autograd.grad(factor * dense_loss(*wide, target), wide)


@pytest.mark.parametrize("backend", PRESENT)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_size", [N, 7])
def test_any_factor(backend, dtype, chunk_size):
    hidden, weight, target = problem(dtype)
    for factor in (1.0, 3.7, 0.0, -2.0, 1 / 3):
        loss = dk.linear_cross_entropy(hidden, weight, target, backend=backend, chunk_size=chunk_size)
        found = torch.autograd.grad(factor * loss, (hidden, weight))
        for gradient, right in zip(found, exact(hidden, weight, target, factor), strict=True):
            assert gradient.dtype == dtype
            allowed = max(3 * torch.finfo(dtype).eps, 2e-6)
            assert not gradient.any() if factor == 0 else relative_error(gradient, right) < allowed


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_retained_graph_is_scaled_anew(dtype):
    hidden, weight, target = problem(dtype)
    loss = dk.linear_cross_entropy(hidden, weight, target)
    for factor in (2.5, 0.0, 1.0, 3.0):  # 0 in between: nothing may be lost
        found = torch.autograd.grad(factor * loss, (hidden, weight), retain_graph=True)
        for gradient, right in zip(found, exact(hidden, weight, target, factor), strict=True):
            assert relative_error(gradient, right) < 3 * torch.finfo(dtype).eps or factor == 0
            assert factor != 0 or not gradient.any()
            gradient.fill_(7.0)  # whose memory is the caller's
    (3.0 * loss).backward()
    assert relative_error(weight.grad, exact(hidden, weight, target, 3.0)[1]) < 3 * torch.finfo(dtype).eps
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_two_losses_of_one_head_add_up():
    hidden, weight, target = problem(torch.float32)
    losses = [dk.linear_cross_entropy(hidden, weight, target) for _ in range(2)]
    (losses[0] + 2.0 * losses[1]).backward()
    assert relative_error(weight.grad, exact(hidden, weight, target, 3.0)[1]) < 1e-6
    assert relative_error(hidden.grad, exact(hidden, weight, target, 3.0)[0]) < 1e-6


@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_backward_takes_no_memory(factor):
    """The saved gradients become those of the leaves; a CPU multiplies them by blocks, in 2 MB."""
    weight = torch.randn(120_000, H).bfloat16().requires_grad_()
    loss = factor * dk.linear_cross_entropy(torch.randn(2, H).bfloat16(), weight, torch.tensor([0, 1]))
    with record_allocations() as seen:
        loss.backward()
    assert weight.grad is not None
    assert seen.peak < (1000 if factor == 1 else (2 << 20) + 1000) < weight.numel() * weight.element_size()


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel(backend, dtype):
    """In place, in fp32, rounded once; a factor of 1 writes nothing, NaN and infinity pass through."""
    chosen = dk.backends.BACKENDS[backend]
    for count in (1, 4095, 4097, 10_000):
        x = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)
        for factor in (1.0, 0.3, 0.0, torch.inf, torch.nan):
            by = torch.tensor([factor])
            out = x.clone()
            chosen.scale_(out, by)
            right = (x.float() * by).to(dtype)
            if backend == "triton" and factor == 0.3 and dtype == torch.bfloat16:  # its interpreter cuts digits off
                torch.testing.assert_close(out, right, rtol=torch.finfo(dtype).eps, atol=0.0)
            else:
                assert torch.equal(out.nan_to_num(7.0), right.nan_to_num(7.0))
    matrix = torch.randn(33, 70).to(dtype)
    out = matrix.clone()
    chosen.scale_(out, torch.tensor([2.0]))
    assert torch.equal(out, matrix * 2)
