"""Microbenchmarks of this loss, by every backend, beside the reference PyTorch loss and the floor.

    pytest bench                                       # forward, backward and both of every loss, 2 shapes, 2 dtypes
    pytest bench --shape 4096,576,49152 --dtype bfloat16 -k "forward_kl and both"

One group a case; other libraries, memory and errors are `dft-kernels bench`'s. What a fused loss does in its forward
the reference does in its backward, so only `both` compares like with like.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dft_kernels.benchmarks.floor import Floor, floor_dtype
from dft_kernels.benchmarks.implementations import EAGER, Unavailable, ours
from dft_kernels.benchmarks.inputs import Inputs
from dft_kernels.benchmarks.problems import Case
from dft_kernels.testing import relative_error

TABLE = {each.name: each for each in (EAGER, *ours())}


@functools.lru_cache(maxsize=1)
def inputs(case: Case) -> Inputs:
    return Inputs.make(case, 0)


@functools.lru_cache(maxsize=1)
def eager_gradient(case: Case) -> torch.Tensor:
    x = inputs(case)
    (gradient,) = torch.autograd.grad(EAGER.prepare(case)(x), x.hidden)
    return gradient


def rounds(benchmark: Any, case: Case, prepare: Callable[[], Any], work: Callable[..., Any], count: int) -> None:
    """`work(prepare())`, the preparation untimed."""

    def done(result: Any) -> Any:
        if case.device == "cuda":
            torch.cuda.synchronize()
        return result

    benchmark.group = str(case)
    benchmark.pedantic(
        lambda given: done(work(given)), setup=lambda: ((done(prepare()),), {}), rounds=count, warmup_rounds=1
    )


@pytest.mark.parametrize("name", TABLE)
def test_loss(benchmark: Any, case: Case, name: str, pytestconfig: pytest.Config) -> None:
    try:
        call = TABLE[name].prepare(case)
    except Unavailable as reason:
        pytest.skip(str(reason))
    x = inputs(case._replace(part="both"))
    count = pytestconfig.getoption("--rounds")
    if case.part == "forward":
        with torch.no_grad():
            rounds(benchmark, case, x.forget_gradients, lambda _: call(x), count)
        return
    if case.part == "backward":
        rounds(benchmark, case, lambda: (x.forget_gradients(), call(x))[1], lambda loss: loss.backward(), count)
    else:
        rounds(benchmark, case, x.forget_gradients, lambda _: call(x).backward(), count)
    assert x.hidden.grad is not None
    assert relative_error(x.hidden.grad, eager_gradient(case._replace(part="both"))) < 0.05  # the same loss


def test_floor(benchmark: Any, case: Case, pytestconfig: pytest.Config) -> None:
    x = inputs(case._replace(part="both"))
    floor = Floor(case, floor_dtype(case, x))
    operands = floor.operands(x)
    rounds(benchmark, case, lambda: None, lambda _: floor(operands), pytestconfig.getoption("--rounds"))
    if case.part != "backward":
        exact = x.hidden.detach()[:4].double() @ x.weight.detach().double().t()
        assert relative_error(floor.logits[:4], exact) < 0.01
