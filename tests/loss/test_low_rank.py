"""An adapter of the head: a pair (down, up) added into a chunk's logits, with its gradients."""

from __future__ import annotations

import pytest
import torch
from cases import PRESENT
from torch.nn.functional import linear

import dft_kernels as dk
from dft_kernels.testing import allowance, conditions, dense_loss, record_allocations, relative_error

N, H, V, R = 37, 24, 301, 6


def tensors(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"hidden": (N, H), "weight": (V, H), "a": (R, H), "up": (V, R)}
    return {
        name: (0.5 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("backend", PRESENT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_head_with_the_adapter_merged(backend: str, dtype: torch.dtype) -> None:
    """hidden (W + up A).T, with the gradients of all four."""
    labels = torch.arange(N) % V
    labels[::5] = -100
    given = tensors(dtype)
    down = linear(given["hidden"], given["a"])
    loss = dk.linear_distribution_loss(
        given["hidden"], given["weight"], labels, low_rank=(down, given["up"]), backend=backend, softcap=5.0
    )

    def merged(given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        wide = {name: value.detach().double().requires_grad_() for name, value in given.items()}
        loss = dense_loss(wide["hidden"], wide["weight"] + wide["up"] @ wide["a"], labels, softcap=5.0)
        return torch.autograd.grad(loss, list(wide.values()))

    exact = merged(given)
    found = torch.autograd.grad(loss, list(given.values()))
    for name, value, truth, condition in zip(given, found, exact, conditions(merged, given, exact), strict=True):
        # two roundings more, of `down` and of its gradient, each multiplied by what the model makes of `down`
        gate = allowance(truth, dtype, condition, (H, V, max(N, V)), narrow_roundings=3 + 2)
        assert relative_error(value, truth) <= gate, name


def test_a_frozen_head_costs_no_gradient_of_it() -> None:
    torch.manual_seed(0)
    hidden, up = torch.randn(64, 256).requires_grad_(), torch.zeros(8000, 4).requires_grad_()
    a, weight = torch.randn(4, 256).requires_grad_(), torch.randn(8000, 256)
    labels = torch.randint(0, 8000, (64,))
    with record_allocations() as seen:
        loss = dk.linear_distribution_loss(hidden, weight, labels, low_rank=(linear(hidden, a), up), chunk_size=16)
        loss.backward()
    assert seen.peak < weight.nbytes / 2
    assert float(up.grad.norm()) > 0
    assert a.grad is not None
    assert float(a.grad.norm()) == 0.0  # LoRA's start: up is zero


def test_statistics() -> None:
    given = tensors()
    features = torch.randn(V, 3, dtype=torch.float64)
    labels = torch.arange(N) % V
    found = dk.linear_distribution_statistics(
        given["hidden"], given["weight"], labels, low_rank=(linear(given["hidden"], given["a"]), given["up"]),
        features=features,
    )  # fmt: skip
    scalar = found.log_prob.sum() + found.entropy.square().sum() + found.features.sin().sum()
    scalar = scalar + (found.mean_probability * torch.arange(V)).sum()
    ours = torch.autograd.grad(scalar, list(given.values()))
    log_q = linear(given["hidden"], given["weight"] + given["up"] @ given["a"]).log_softmax(-1)
    q = log_q.exp()
    scalar = log_q.gather(1, labels[:, None]).sum() + (q * log_q).sum(-1).square().sum() + (q @ features).sin().sum()
    scalar = scalar + (q.mean(0) * torch.arange(V)).sum()
    for mine, theirs in zip(ours, torch.autograd.grad(scalar, list(given.values())), strict=True):
        assert relative_error(mine, theirs) < 1e-10


def test_under_autocast_and_in_linear_cross_entropy() -> None:
    given = {name: t.detach().float() for name, t in tensors().items()}
    labels, pair = torch.arange(N) % V, (linear(given["hidden"], given["a"]), given["up"])
    with torch.autocast("cpu", torch.bfloat16):
        found = dk.linear_cross_entropy(given["hidden"], given["weight"], labels, low_rank=pair)
    narrow = [t.bfloat16() for t in (given["hidden"], given["weight"], *pair)]
    assert torch.equal(found, dk.linear_cross_entropy(narrow[0], narrow[1], labels, low_rank=tuple(narrow[2:])))
    assert found.dtype == torch.float32
