"""Fixtures of the tests of the loss: `backend` runs a test over every backend present."""

from __future__ import annotations

import pytest
import torch
from cases import PRESENT

from dft_kernels import backends


@pytest.fixture(params=PRESENT)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """ "auto" is made to choose it."""
    chosen = backends.BACKENDS[request.param]
    monkeypatch.setattr(chosen, "emulated", ())
    monkeypatch.setattr(backends, "BACKENDS", {request.param: chosen, **backends.BACKENDS})
    return request.param


@pytest.fixture
def tensors() -> tuple[torch.Tensor, ...]:
    """hidden [3, 11, 8], weight [57, 8], bias, target with ignored rows, a teacher's logits."""
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 11, 8, generator=g).requires_grad_()
    weight = torch.randn(57, 8, generator=g).requires_grad_()
    bias = torch.randn(57, generator=g).requires_grad_()
    target = torch.randint(0, 57, (3, 11), generator=g)
    target[:, ::4] = -100
    return hidden, weight, bias, target, torch.randn(3, 11, 57, generator=g)
