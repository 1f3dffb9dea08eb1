"""What devices ask for: no host synchronisation, checked anywhere; and on a GPU the shared suite, streams, graphs."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cases import CASES, compare, leaves, make, present

import dft_kernels as dk
from dft_kernels.backends import BACKENDS
from dft_kernels.backends.cuda import CudaBackend
from dft_kernels.loss import operators
from dft_kernels.loss.build import build
from dft_kernels.loss.loop import compute_loss
from dft_kernels.loss.options import Function
from dft_kernels.testing import relative_error

CUDA = torch.cuda.is_available()
DESIGNS = ("cuda_generic", "cuda_exponential")  # "cuda" takes the lean kernels where rows are aligned
ON_GPU = present(device="cuda") if CUDA else []
ON_GPU += DESIGNS[:1] if "cuda" in ON_GPU else ()
gpu = pytest.mark.skipif(not CUDA, reason="no GPU")


@pytest.fixture(autouse=True)
def designs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in DESIGNS:
        monkeypatch.setitem(BACKENDS, name, CudaBackend(name.removeprefix("cuda_")))


EXACT = ["everything", "no_compact", "no_compact_none", "cross_entropy_bias"]
WITHIN_AN_ERROR = ["no_compact", "cross_entropy_bias", "jensen_shannon"]  # label smoothing takes every column


@pytest.mark.parametrize(
    ("case", "backend", "error"),
    [
        *((case, backend, None) for case in EXACT for backend in ("reference", "triton")),
        *((case, "triton", 0.01) for case in WITHIN_AN_ERROR),
    ],
)
def test_no_synchronisation_without_compaction(
    case: str, backend: str, error: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors without data: a loop that asks one for a value, as a synchronisation would, raises."""
    launches = []
    if backend == "triton":
        pytest.importorskip("triton")
        for room in ("rows", "columns", "active"):
            monkeypatch.setattr(f"triton_ops.{room}.launch", lambda kernel, *_, **__: launches.append(kernel.__name__))
        monkeypatch.setattr("dft_kernels.backends.active.PREPARES", 0)
        monkeypatch.setattr(dk.backends.TritonBackend, "unavailable", lambda *_: None)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no such device

    def empty(value: Any) -> Any:
        if isinstance(value, dk.TeacherHead):
            return dataclasses.replace(value, **{k: empty(getattr(value, k)) for k in ("hidden", "weight", "bias")})
        return value.detach().to("meta") if isinstance(value, torch.Tensor) else value

    arguments = {name: empty(value) for name, value in make(CASES[case], torch.bfloat16).items()}
    given = [arguments.pop(name, None) for name in ("hidden", "weight", "target", "teacher")]
    arguments |= {"compact": False, "chunk_size": 11, "backend": backend, "gradient_error": error}
    problem = build(Function("test"), *given, {**arguments, "return_metrics": True})
    needs = {"need_hidden": True, "need_weight": True, "need_bias": problem.bias is not None}
    loss, *_, dhidden, dweight, _, _, _ = compute_loss(problem._replace(**needs))
    assert loss.device.type == "meta"
    assert (dhidden.shape, dweight.shape) == (given[0].shape, given[1].shape)
    assert len(launches) >= (3 if backend == "triton" else 0)
    assert ("dweight_kernel" in launches) == (error is not None)
    with pytest.raises((RuntimeError, NotImplementedError)):  # the test can fail: compaction does synchronise
        compute_loss(problem._replace(compact=True, **needs))


@gpu
@pytest.mark.parametrize("case", [name for name, case in CASES.items() if not case.teacher])
def test_exponentials_on_a_gpu(case: str) -> None:
    """Rows that go by exponentials where the build has them, among them labels far below their logits."""
    n, h, v = (-(-size // 8) * 8 for size in CASES[case].shape)
    compare(CASES[case]._replace(shape=(n, h, v)), torch.bfloat16, "cuda_exponential", device="cuda")
    hidden = (8 * torch.randn(64, 64)).bfloat16().cuda().requires_grad_()
    weight = torch.randn(1000, 64).bfloat16().cuda().requires_grad_()
    target = (hidden.float() @ weight.float().t()).argmin(1)
    found = []
    for backend in ("cuda", "cuda_exponential"):
        loss = dk.linear_cross_entropy(hidden, weight, target, backend=backend)
        found.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    for one, other in zip(*found, strict=True):
        assert relative_error(other, one.double()) < 5e-3


@gpu
@pytest.mark.parametrize("backend", ON_GPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES)
def test_case_on_a_gpu(case: str, dtype: torch.dtype, backend: str) -> None:
    n, h, v = CASES[case].shape
    for vocab in (v, 16 * -(-v // 16)):  # whose rows are aligned
        aligned = CASES[case]._replace(shape=(n, h, vocab))
        compare(aligned, dtype, backend, device="cuda")
        compare(aligned, dtype, backend, device="cuda", chunk_size=7)


@gpu
@pytest.mark.parametrize("backend", ON_GPU)
@pytest.mark.parametrize("vocab", [32_000, 128_256])
def test_large_vocabularies_on_a_gpu(vocab: int, backend: str) -> None:
    for name in ("everything", "forward_kl", "reverse_kl", "skew_kl", "none"):
        compare(CASES[name]._replace(shape=(300, 64, vocab)), torch.bfloat16, backend, device="cuda", chunk_size=128)


def fixed(backend: str) -> tuple[dict[str, Any], list[torch.Tensor]]:
    arguments = make(CASES["everything"]._replace(shape=(96, 64, 2048)), torch.bfloat16, "cuda")
    arguments |= {"backend": backend, "compact": False, "chunk_size": 40}
    return arguments, leaves(arguments)


def step(arguments: dict[str, Any], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    loss = dk.linear_distribution_loss(**arguments)
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


@gpu
@pytest.mark.parametrize("backend", ON_GPU)
def test_another_stream_and_the_same_bits(backend: str) -> None:
    arguments, inputs = fixed(backend)
    plain = step(arguments, inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # whatever ran on the default stream would be ahead of what it needs
        arguments["hidden"] = arguments["hidden"].detach().clone().requires_grad_()
        elsewhere = step(arguments, [arguments["hidden"], *inputs[1:]])
    torch.cuda.synchronize()
    for a, b in zip(plain, elsewhere, strict=True):
        assert torch.equal(a, b)


@gpu
@pytest.mark.parametrize("backend", ON_GPU)
@pytest.mark.filterwarnings("ignore")
def test_opcheck_on_a_gpu(backend: str) -> None:
    arguments = make(CASES["everything"], torch.float32, "cuda") | {"backend": backend}
    given = [arguments.pop(name, None) for name in ("hidden", "weight", "target", "teacher")]
    problem = build(Function("test"), *given, {"chunk_size": 11, **arguments})
    torch.library.opcheck(operators.loss._opoverload, tuple(problem), rtol=1e-2, atol=1e-3)


@gpu
@pytest.mark.parametrize("chunk_size", [None, 512])
@pytest.mark.parametrize("backend", [name for name in ON_GPU if name != "reference"])
@pytest.mark.parametrize("case", ["cross_entropy", "forward_kl", "jensen_shannon"])
def test_some_columns_on_a_gpu(case: str, backend: str, chunk_size: int | None) -> None:
    """Within what is said, the same bits again, and nothing waits for the device."""
    arguments = make(CASES[case]._replace(shape=(1024, 512, 32_000)), torch.bfloat16, "cuda")
    arguments |= {"backend": backend, "compact": False, "chunk_size": chunk_size}
    inputs, found = leaves(arguments), []
    for error in (None, 0.01, 0.01):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("default" if error is None else "error")
        try:
            loss, metrics = dk.linear_distribution_loss(**arguments, gradient_error=error, return_metrics={"dropped"})
            gradients = torch.autograd.grad(loss, inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found.append((gradients, metrics))
    exact, own, again = found
    bound = float(own[1].dropped)
    assert 0 <= bound <= 0.01
    assert float(own[1].active_columns) <= 1.0
    for a, b, c in zip(own[0], exact[0], again[0], strict=True):
        assert relative_error(a, b.double()) <= bound + 5e-3
        assert torch.equal(a, c)


@gpu
@pytest.mark.parametrize("backend", ON_GPU)
def test_graph_capture(backend: str) -> None:
    arguments, inputs = fixed(backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(arguments, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(arguments, inputs)
    with torch.no_grad():
        arguments["hidden"].normal_()
        arguments["target"].random_(0, 2048)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, step(arguments, inputs), strict=True):
        assert relative_error(a, b) < 1e-6


@gpu
@pytest.mark.parametrize("backend", ON_GPU)
def test_more_than_2_to_the_31_logits(backend: str) -> None:
    n, v = 17_000, 131_072
    logits = torch.randn(n, v, device="cuda", dtype=torch.bfloat16)
    last = logits[-4:].float().requires_grad_()
    target = torch.randint(0, v, (n,), device="cuda")
    exact = torch.nn.functional.cross_entropy(last, target[-4:], reduction="sum")
    (want,) = torch.autograd.grad(exact, last)
    loss = dk.cross_entropy(
        logits.requires_grad_(), target, reduction="sum", inplace_gradient=True, backend=backend, compact=False
    )
    loss.backward()
    assert logits.grad is not None
    assert relative_error(logits.grad[-4:], want) < 1e-2
