"""The shapes at which kernels go wrong: one hidden number, one class, one row, vocabularies that no tile divides."""

from __future__ import annotations

import pytest
import torch
from cases import PRESENT, Case, compare

import dft_kernels as dk
from dft_kernels import divergences

SHAPES = {  # N, H, V
    "one_hidden": (5, 1, 13),
    "one_class": (4, 3, 1),
    "one_row": (1, 6, 37),
    "one_of_each": (1, 1, 1),
    "two_classes": (3, 2, 2),
    "a_prime": (9, 5, 257),
    "a_larger_prime": (2, 4, 2053),
}
CALLS = {
    "labels": Case("labels", target="all_valid", tensors=("bias",), options={"label_smoothing": 0.1}),
    "head": Case(
        "head",
        teacher="head",
        tensors=("low_rank", "potential", "entropy", "features"),
        target="all_valid",
        options={"divergence": divergences.jensen_shannon(0.3), "temperature": 1.7},
    ),
    "sparse": Case(
        "sparse", teacher="topk", tensors=("bias", "row_weight"), target="none", options={"temperature": 2.0}
    ),
    "rows": Case("rows", teacher="logits", target="all_valid", options={"reduction": "none", "softcap": 4.0}),
}


@pytest.mark.parametrize("backend", PRESENT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_at_the_edge(shape: str, call: str, dtype: torch.dtype, backend: str) -> None:
    case = CALLS[call]._replace(name=f"{call} {shape}", shape=SHAPES[shape])
    compare(case, dtype, backend)
    compare(case, dtype, backend, chunk_size=1)


@pytest.mark.parametrize("backend", PRESENT)
@pytest.mark.parametrize("name", divergences.TABLE)
def test_one_class_is_certain(name: str, backend: str) -> None:
    """q = p = 1: the loss and the gradients of hidden and weight are zero, but for the rounding of z / T where a
    processor has no fused multiplication and addition."""
    hidden, weight = torch.randn(3, 2).requires_grad_(), torch.randn(1, 2).requires_grad_()
    label, teacher = torch.zeros(3, dtype=torch.int64), 5 * torch.randn(3, 1)
    loss = dk.linear_distribution_loss(
        hidden, weight, label, teacher, hard_weight=0.5, divergence=name, temperature=1.3, backend=backend
    )
    off = 2e-7 * float((hidden @ weight.t()).detach().abs().max() + teacher.abs().max())  # of log q and log p
    assert abs(float(loss.detach())) <= (off if name == "total_variation" else off**2)  # of first or second order
    for gradient in torch.autograd.grad(loss, (hidden, weight)):
        assert float(gradient.abs().max()) <= 10 * off
