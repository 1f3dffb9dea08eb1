"""torch.compile(fullgraph=True) with a dynamic N, opcheck of every operator."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, PRESENT, leaves, make
from torch._dynamo.testing import CompileCounterWithBackend

import dft_kernels as dk
from dft_kernels.loss import operators
from dft_kernels.loss.build import build
from dft_kernels.loss.options import Function
from dft_kernels.testing import relative_error


# inductor runs a C++ compiler, on graphs in which the loss is one node
@pytest.mark.kept(where=lambda backend, case: backend != "inductor" or case == "everything")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(
    "case", ["everything", "none", "cross_entropy_bias", "no_compact", "low_rank", "every_statistic"]
)
@pytest.mark.filterwarnings("ignore")
def test_fullgraph_with_dynamic_rows(case, backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(dk.linear_distribution_loss, fullgraph=True, backend=counter)
    for rows in (29, 29, 40, 17, 33):
        shape = (rows, *CASES[case].shape[1:])
        arguments = make(CASES[case]._replace(shape=shape), torch.float32)
        values = []
        for function in (compiled, dk.linear_distribution_loss):
            loss = function(**arguments)
            values.append([loss.detach(), *torch.autograd.grad(loss.sum(), leaves(arguments))])
        for a, b in zip(*values, strict=True):
            assert relative_error(a, b) < 1e-6
    assert counter.frame_count <= 2  # one static, one dynamic


@pytest.mark.parametrize("backend", PRESENT)
@pytest.mark.filterwarnings("ignore")
def test_fullgraph_with_a_named_backend(backend):
    torch._dynamo.reset()
    arguments = make(CASES["cross_entropy_bias"], torch.float32) | {"backend": backend}
    compiled = torch.compile(dk.linear_distribution_loss, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(**arguments), dk.linear_distribution_loss(**arguments)) < 1e-6


@pytest.mark.filterwarnings("ignore")
def test_statistics_compile_fullgraph():
    torch._dynamo.reset()
    hidden, weight = torch.randn(9, 4).requires_grad_(), torch.randn(7, 4).requires_grad_()

    def entropy(h, w):
        s = dk.linear_distribution_statistics(h, w)
        return s.entropy.mean() + s.mean_probability.square().sum()

    ours = torch.compile(entropy, fullgraph=True, backend="aot_eager")(hidden, weight)
    exact = entropy(hidden, weight)
    for a, b in zip(
        torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(exact, (hidden, weight)), strict=True
    ):
        assert relative_error(a, b) < 1e-6


@pytest.mark.filterwarnings("ignore")
def test_a_stream_says_why_it_breaks_the_graph():
    torch._dynamo.reset()
    hidden, weight, logits = torch.randn(9, 4), torch.randn(7, 4), torch.randn(9, 7)
    compiled = torch.compile(
        lambda h: dk.linear_distribution_loss(h, weight, None, dk.LogitStream(lambda rows: logits[rows])),
        fullgraph=True,
        backend="eager",
    )
    with pytest.raises(Exception, match="LogitStream"):
        compiled(hidden)


@pytest.mark.parametrize("case", ["everything", "cross_entropy", "none", "low_rank_odd", "every_statistic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore")
def test_opcheck(case, dtype):
    arguments = make(CASES[case], dtype)
    options = {
        name: value for name, value in arguments.items() if name not in ("hidden", "weight", "target", "teacher")
    }
    problem = build(
        Function("test"),
        *(arguments.get(name) for name in ("hidden", "weight", "target", "teacher")),
        {"chunk_size": 11, **options},
    )
    torch.library.opcheck(operators.loss._opoverload, tuple(problem), rtol=1e-2, atol=1e-3)
    torch.library.opcheck(operators.statistics._opoverload, tuple(problem), rtol=1e-2, atol=1e-3)
    torch.library.opcheck(
        operators.scale._opoverload,
        (torch.randn(5, 4), torch.tensor(2.0), torch.bfloat16, None, None),
        rtol=1e-2,
        atol=1e-3,
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compiled_autograd(dtype):
    """Backward as a graph: no value of grad_output is asked for."""
    torch._dynamo.reset()
    hidden, weight = torch.randn(9, 4).to(dtype).requires_grad_(), torch.randn(7, 4).to(dtype).requires_grad_()
    target = torch.randint(0, 7, (9,))

    def gradients() -> tuple[torch.Tensor, ...]:
        loss = 3.0 * dk.linear_cross_entropy(hidden, weight, target)
        loss.backward()
        found = hidden.grad, weight.grad
        hidden.grad = weight.grad = None
        return found

    counter = CompileCounterWithBackend("aot_eager")
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend=counter, fullgraph=True)):
        compiled = gradients()
    assert counter.frame_count > 0
    for a, b in zip(compiled, gradients(), strict=True):
        assert relative_error(a, b) < torch.finfo(dtype).eps
