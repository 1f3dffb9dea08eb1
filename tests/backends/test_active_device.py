"""gradient_error where the device chooses: how columns are chosen and ordered, and the kernels that multiply them.

That bounds hold is asked of it in test_active.py, as of every backend; that nothing is waited for in test_device.py."""

from __future__ import annotations

import plain_products
import pytest
import torch
from cases import PRESENT
from test_active import CASES, ERROR, device, errors, few_rows_pay, run

from dft_kernels.backends.active_device import ordered, smallest

__all__ = ["device", "few_rows_pay"]  # fixtures


@pytest.mark.parametrize("part", [0.0, 1e-12, 1e-6, 1e-3, 0.3, 1.0, 2.0])
def test_the_smallest_sum_up_to_no_more_than_the_budget(part: float) -> None:
    values = (4.0 * torch.randn(5000, dtype=torch.float64)).exp()
    values[:100] = 0.0
    budget = part * values.sum()
    mask = smallest(values, budget)
    assert values[mask].sum() <= budget
    assert mask[:100].all()
    assert not mask[values.argmax()]
    if 0 < part < 1:
        one_more = values[~mask].min()
        assert values[mask].max() <= one_more
        assert values[mask].sum() + one_more > budget * (1 - 1e-9)


@pytest.mark.parametrize("bad", [0.0, torch.inf, torch.nan])
def test_of_numbers_that_say_nothing_none_is_the_smallest(bad: float) -> None:
    values, one = torch.full((9,), bad, dtype=torch.float64), torch.ones((), dtype=torch.float64)
    assert not smallest(values, one).any()
    assert not smallest(one.repeat(9), torch.nan * one).any()


@pytest.mark.parametrize("vocab", [1, 15, 16, 17, 1000])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_every_column_has_a_place(vocab: int, share: float) -> None:
    left = torch.rand(vocab) < share
    order, begin = ordered(left)
    assert len(order) % 16 == 0
    assert begin % 16 == 0
    first, rest = order[:begin], order[begin:]
    assert first[first < vocab].tolist() == (~left).nonzero()[:, 0].tolist()
    assert rest[rest < vocab].tolist() == left.nonzero()[:, 0].tolist()
    assert (order <= vocab).all()


@pytest.mark.skipif("triton" not in PRESENT, reason="triton is not installed, or there is a GPU to run on")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernels_are_the_plain_products(dtype: torch.dtype) -> None:
    """Each over the columns that are kept, over the others, and over none; of strides beyond their width."""
    import triton_ops.active as kernels

    rows, vocab, width = 37, 613, 40
    dlogits = torch.randn(rows, vocab + 3).to(dtype)[:, :vocab]
    hidden, weight, norms = torch.randn(rows, width).to(dtype), torch.randn(vocab, width).to(dtype), torch.rand(rows)
    for found, exact in zip(kernels.spread(dlogits, norms), plain_products.spread(dlogits, norms), strict=True):
        torch.testing.assert_close(found, exact)
    order, begin = ordered(torch.rand(vocab) < 0.6)
    columns = torch.full((2, rows, len(order)), torch.nan, dtype=dtype)
    for span in ([0, int(begin)], [int(begin), len(order)], [len(order), len(order)]):
        where = torch.tensor(span)
        dhidden, dweight, grown = torch.ones(2, rows, width), torch.ones(2, vocab, width).to(dtype), []
        for own, (into, of) in enumerate(zip(columns, (kernels, plain_products), strict=True)):
            of.gather(dlogits, order, where, into)
            of.add_dhidden(into, order, where, weight, dhidden[own])
            grown.append(of.add_dweight(into, order, where, hidden, dweight[own]))
        assert torch.equal(columns[0].nan_to_num(7.0), columns[1].nan_to_num(7.0))
        torch.testing.assert_close(*dhidden, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(*dweight)
        torch.testing.assert_close(*grown, rtol=1e-5, atol=0)
        assert bool(grown[0] == 0) == (span[0] == span[1])


@pytest.mark.parametrize("chunk_size", [None, 32])
@pytest.mark.parametrize("case", ["cross-entropy", "forward KL", "aligned"])
def test_too_little_is_made_up_for(case: str, chunk_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where more was left out than a bound allows, that product is of all columns."""
    given = CASES[case]()
    plain = run(given, ERROR, backend="device", chunk_size=chunk_size)
    monkeypatch.setattr("dft_kernels.backends.active_device._CAUTION", 30.0)
    exact = run(given, None, backend="device", chunk_size=chunk_size)
    found = run(given, ERROR, backend="device", chunk_size=chunk_size)
    assert plain[1].active_columns < 0.9
    assert (float(found[1].dropped), float(found[1].active_columns)) == (0.0, 1.0)
    assert max(errors(found, exact)) < 1e-13


@pytest.mark.skipif("triton" not in PRESENT, reason="triton is not installed, or there is a GPU to run on")
def test_products_in_fp32_are_as_precise_as_torchs() -> None:
    """Asked for in the one way that torch answers whichever way it was told."""
    from triton_ops.launch import product_tile

    matmul, found = torch.backends.cuda.matmul, []
    before = matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            matmul.fp32_precision = precision
            found.append(product_tile(torch.zeros(1, 1), gathers=True)["PRECISION"])
    finally:
        matmul.fp32_precision = before
    assert found == ["ieee", "tf32"]


def test_no_norm_of_a_gradient_is_of_a_wider_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp64 it would take twice the memory of dweight."""
    given, norms, plain = CASES["cross-entropy"](), [], torch.linalg.vector_norm

    def seen(x: torch.Tensor, *rest: object, **more: object) -> torch.Tensor:
        norms.append((tuple(x.shape), more["dtype"]))
        return plain(x, *rest, **more)

    monkeypatch.setattr(torch.linalg, "vector_norm", seen)
    run(given, ERROR, torch.float32, backend="device")
    assert (tuple(given.weight.shape), torch.float32) in norms
    assert (tuple(given.weight.shape), torch.float64) not in norms
