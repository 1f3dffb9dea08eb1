"""Cross-entropy by exponentials, on the CPU: its product in plain loops (cuda_on_host/exponentials.cpp), all else as on
a GPU. The product itself: test_ptx.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, Case, compare

import dft_kernels as dk
from dft_kernels.backends import BACKENDS, exponentials, extension
from dft_kernels.backends.cuda import CudaBackend
from dft_kernels.testing import dense_loss, relative_error

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run on")
NARROW = torch.bfloat16


@pytest.fixture(autouse=True)
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Backends "exponential" and "automatic"; returns the rows of each chunk that goes by exponentials."""
    for name in ("exponential", "automatic"):
        monkeypatch.setitem(BACKENDS, name, CudaBackend(name))
    taken: list[int] = []
    step = exponentials.step

    def watched(workspace: Any, chunk: Any, *more: Any) -> Any:
        taken.append(len(chunk.hidden))
        return step(workspace, chunk, *more)

    monkeypatch.setattr(exponentials, "step", watched)
    return taken


def aligned(case: Case) -> Case:
    n, h, v = case.shape
    return case._replace(shape=(n, -(-h // 8) * 8, -(-v // 8) * 8))


ADDED = [
    Case("exponential_weighted", tensors=("row_weight",)),
    Case("exponential_smooth", options={"label_smoothing": 0.1, "z_loss": 1e-2}, tensors=("row_weight",)),
    Case("exponential_smooth_whole", options={"label_smoothing": 0.2, "logit_scale": 0.7}, target="all_valid"),
    Case("exponential_capped", options={"softcap": 3.0, "logit_scale": 0.7, "z_loss": 1e-2}),
    Case("exponential_bias", tensors=("bias", "row_weight"), options={"label_smoothing": 0.1}),
    Case("exponential_bias_capped", tensors=("bias",), options={"softcap": 3.0, "logit_scale": 0.7, "compact": False}),
    Case("exponential_negative", options={"logit_scale": -0.7, "reduction": "sum"}),
    Case("exponential_devices", options={"compact": False, "label_smoothing": 0.1, "num_items": 17}),
    Case("exponential_wide", shape=(37, 64, 2048), target="all_valid"),
]


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("case", ADDED, ids=lambda case: case.name)
def test_within_the_gate(case: Case, chunk_size: int | None, steps: list[int]) -> None:
    compare(aligned(case), NARROW, "exponential", chunk_size=chunk_size)
    assert len(steps) > (chunk_size is not None)


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.hard and "topk" not in name])
def test_the_table_of_cases(case: str, steps: list[int]) -> None:
    """Those of cross-entropy alone go by exponentials, all others as they would."""
    compare(aligned(CASES[case]), NARROW, "exponential")
    alone = not CASES[case].teacher and not CASES[case].tensors and CASES[case].target in ("some", "all_valid")
    smooth_and_capped = {"label_smoothing", "softcap"} <= set(CASES[case].options)
    if CASES[case].options.get("reduction") != "none" and not smooth_and_capped and alone:
        assert steps


def call(backend: str, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, **options: Any) -> Any:
    h, w = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    loss, metrics = dk.linear_cross_entropy(h, w, target, backend=backend, return_metrics=True, **options)
    loss.backward()
    return loss.detach(), h.grad, w.grad, metrics


def drawn(
    n: int = 12, h: int = 16, v: int = 520, scale: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(n + h + v)
    hidden, weight = torch.randn(n, h, generator=g), scale * torch.randn(v, h, generator=g)
    return hidden.to(NARROW), weight.to(NARROW), torch.randint(0, v, (n,), generator=g)


def test_metrics_are_those_of_logits(steps: list[int]) -> None:
    hidden, weight, target = drawn()
    target[2], target[5] = -100, (hidden[5].float() @ weight.float().t()).argmax()
    ours, plain = (call(name, hidden, weight, target, softcap=5.0)[3] for name in ("exponential", "automatic"))
    assert steps == [11]
    assert plain.correct.any()
    for name in ("hard_loss", "entropy", "lse", "correct", "log_prob"):
        torch.testing.assert_close(getattr(ours, name), getattr(plain, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_rows_beyond_the_range_of_exponentials(smoothing: float, chunk_size: int | None, steps: list[int]) -> None:
    """Labels 60 to 300 nats below their logits, and above them all."""
    hidden, weight, target = drawn()
    hidden[:6] *= 12.0
    logits = hidden.float() @ weight.float().t()
    target[:5], target[5] = logits[:5].argmin(1), logits[5].argmax()
    below = logits.max(1).values - logits.gather(1, target[:, None])[:, 0]
    assert (below > 60).sum() >= 4
    options = {"label_smoothing": smoothing, "chunk_size": chunk_size}
    ours, plain = (call(name, hidden, weight, target, **options) for name in ("exponential", "automatic"))
    assert sum(steps) == 12
    wide = [x.double().requires_grad_() for x in (hidden, weight)]
    exact = dense_loss(*wide, target, label_smoothing=smoothing)
    exact.backward()
    assert relative_error(ours[0], exact) < 1e-6
    for got, other, leaf in zip(ours[1:3], plain[1:3], wide, strict=True):
        assert relative_error(got, leaf.grad) < max(2.5e-3, 1.1 * relative_error(other, leaf.grad))
    torch.testing.assert_close(ours[3].lse, plain[3].lse, rtol=1e-6, atol=1e-5)


def test_a_row_with_nan_is_what_it_is_from_logits(steps: list[int]) -> None:
    hidden, weight, target = drawn()
    hidden[3, 2] = torch.nan
    ours, plain = (call(name, hidden, weight, target) for name in ("exponential", "automatic"))
    assert steps == [12]
    assert ours[0].isnan()
    assert plain[0].isnan()
    for got, other in zip(ours[1:3], plain[1:3], strict=True):
        assert torch.equal(got.isnan(), other.isnan())
        torch.testing.assert_close(got, other, rtol=2e-2, atol=1e-3, equal_nan=True)
    assert torch.equal(ours[3].lse.isnan(), torch.arange(12) == 3)


def test_confident_rows_keep_their_digits() -> None:
    """Where q_y is 1 - 1e-3 to 1 - 1e-6, the label's share of the gradient is as exact as all others."""
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(16, 32, generator=g).to(NARROW)
    weight = (0.02 * torch.randn(512, 32, generator=g)).to(NARROW)
    weight[:16] = (hidden.float() * (torch.linspace(14, 21, 16) / hidden.float().square().sum(1))[:, None]).to(NARROW)
    target = torch.arange(16)
    wide = [x.double().requires_grad_() for x in (hidden, weight)]
    logits = wide[0] @ wide[1].t()
    exact = torch.nn.functional.cross_entropy(logits, target)
    exact.backward()
    q = logits.softmax(1).gather(1, target[:, None]).detach()
    assert 0.99 < q.min() < q.max() < 1 - 1e-7
    loss, dhidden, dweight, _ = call("exponential", hidden, weight, target)
    assert relative_error(loss, exact) < 2e-5  # of the label's logit, off by the rounding of its sum
    assert relative_error(dhidden, wide[0].grad) < 2.5e-3
    assert relative_error(dweight, wide[1].grad) < 2.5e-3


def test_two_bytes_a_logit(steps: list[int]) -> None:
    """As many rows a chunk as the budget has room for exponentials; all, where they take no more than dweight would."""
    n, h, v = 192, 8, 1024
    hidden, weight, target = drawn(n, h, v)
    results = [call("exponential", hidden, weight, target, memory_budget=64 * v * size) for size in (2, 4, 8)]
    assert steps == [64, 64, 64, 96, 96, 192]
    steps.clear()
    hidden, weight, target = drawn(48, 64, v)
    call("exponential", hidden, weight, target, memory_budget=32 * v)
    assert steps == [48]
    for loss, dhidden, dweight, _ in results[1:]:
        assert relative_error(loss, results[0][0]) < 1e-6
        assert relative_error(dhidden, results[0][1]) < 1e-3
        assert relative_error(dweight, results[0][2]) < 4e-3


def test_the_binding_refuses_what_the_kernel_cannot_take() -> None:
    kernels = extension.CUDA
    hidden, weight, target = drawn(5, 16, 520)
    shift, number, mean = kernels.label_logits(hidden, weight, None, target, None, 1.0, None)
    assert mean is None
    exact = (hidden.float() * weight[target].float()).sum(1)
    torch.testing.assert_close(shift, exact, rtol=1e-6, atol=1e-6)
    assert torch.equal(number, target.float())
    out = torch.full((5, 528), 7.0, dtype=NARROW)
    sums, *_ = kernels.exponentials(hidden, weight, None, shift, number, 1.0, None, False, out[:, :520])
    assert sums.shape == (3, 5)  # tiles of 256 columns
    assert (out[:, 520:] == 7.0).all()
    e = (hidden.float() @ weight.float().t() - shift[:, None]).exp().scatter(1, target[:, None], 0.0)
    torch.testing.assert_close(out[:, :520].float(), e, rtol=4e-3, atol=0)
    torch.testing.assert_close(sums.sum(0), e.sum(1), rtol=1e-5, atol=0)
    good = [hidden, weight, None, shift, number, 1.0, None, False, out[:, :520]]
    for place, wrong, said in (
        (0, hidden.float(), "hidden"),
        (0, hidden[:, :8], "hidden"),
        (1, weight.t().contiguous().t(), "weight"),
        (2, shift, "bias"),
        (3, shift[:4], "shift"),
        (4, target, "label"),
        (8, out[:, :512], "out"),
        (8, out.flatten()[1 : 1 + 5 * 520].view(5, 520), "16 bytes"),
    ):
        arguments = [*good]
        arguments[place] = wrong
        with pytest.raises(RuntimeError, match=said):
            kernels.exponentials(*arguments)
    for part in (weight[:519], weight[:, :12].contiguous()):
        small = torch.empty(5, len(part), dtype=NARROW)
        with pytest.raises(RuntimeError, match="multiples of 8"):
            kernels.exponentials(
                hidden[:, : part.shape[1]].contiguous(), part, None, shift, number, 1.0, None, False, small
            )
