"""Every case, every backend present, against the float64 oracle and its error gate."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, leaves, make, oracle_arguments

from dft_kernels import linear_distribution_loss
from dft_kernels.backends import BACKENDS
from dft_kernels.testing import allowance, dense_loss, relative_error

PRESENT = [name for name, backend in BACKENDS.items() if backend.unavailable(torch.device("cpu")) is None]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def differentiate(loss: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    seed = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, inputs, seed)]


def compare(case: str, dtype: torch.dtype, backend: str, **options: object) -> None:
    arguments = make(CASES[case], dtype)
    inputs = leaves(arguments)
    ours = differentiate(linear_distribution_loss(**{**arguments, "backend": backend, **options}), inputs)
    plain = oracle_arguments(arguments)
    wide = {
        name: value.detach().double().requires_grad_()
        for name, value in plain.items()
        if name in ("hidden", "weight", "bias")
    }
    exact = differentiate(dense_loss(**{**plain, **wide}), list(wide.values()))
    eager = differentiate(dense_loss(**plain, compute_dtype=None if dtype != torch.float64 else dtype), inputs)
    assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for name, value, truth, usual in zip(("loss", "dhidden", "dweight", "dbias"), ours, exact, eager, strict=False):
        gate = allowance(usual, truth, dtype) if dtype != torch.float64 else 1e-12  # the oracle rounds too
        if name == "loss":  # never below what a sum of fp32 addends of this size can hold
            gate = max(gate, 4 * torch.finfo(ours[0].dtype).eps)
        else:
            assert value.dtype == dtype
        error = relative_error(value, truth)
        assert error <= gate, f"{name}: error {error:.2e}, allowed {gate:.2e}"


@pytest.mark.parametrize("backend", PRESENT)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES)
def test_case(case: str, dtype: torch.dtype, backend: str) -> None:
    compare(case, dtype, backend)


@pytest.mark.parametrize("backend", PRESENT)
@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
@pytest.mark.parametrize("case", ["everything", "none", "no_compact", "stream", "row_weight"])
def test_chunk_size_changes_nothing(case: str, chunk_size: int, backend: str) -> None:
    compare(case, torch.float32, backend, chunk_size=chunk_size)
    compare(case, torch.bfloat16, backend, chunk_size=chunk_size)
