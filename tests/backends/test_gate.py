"""The error gate: it is the same on every processor, it lets rounding through, and planted errors do not pass it."""

from __future__ import annotations

import math

import pytest
import torch
from cases import CASES, exactly, judge, make, oracle_arguments

from dft_kernels.testing import allowance, conditions, relative_error

PLANTED = 16  # eps of the dtype that the result is held in


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES)
def test_a_planted_error_fails(case: str, dtype: torch.dtype) -> None:
    """16 eps in the 2-norm, spread over a result or all of one sign, in the loss and in every gradient. A result in
    the accumulation dtype with a condition number above 2 is itself good to no better than its own multiple of eps:
    there the planted error is that much larger."""
    for judged in judge(CASES[case], dtype, "reference"):
        if not judged.exact.numel():
            continue
        value, eps = judged.value.double(), torch.finfo(judged.value.dtype).eps
        accumulated = judged.value.dtype == torch.float32
        size = PLANTED * eps * (judged.condition if accumulated and judged.condition > 2 else 1.0)
        scale = float(judged.exact.norm()) or 1.0  # of a result that is zero: an absolute error
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        alike = judged.exact if bool(judged.exact.any()) else torch.ones_like(value)
        for direction in (noise, alike, -alike):
            planted = value + direction * (size * scale / float(direction.norm()))
            assert relative_error(planted, judged.exact) > judged.allowed, (judged.name, judged.condition)


def test_condition_numbers() -> None:
    """Of x - y at x = 1 + d, y = 1: sqrt(2) / d in the limit; of a sum of n positive numbers alike: 1 / sqrt(n)."""
    n, d = 4000, 1e-3
    given = {
        "x": torch.full((n,), 1 + d).double(),
        "y": torch.ones(n).double(),
        "label": torch.arange(n),
    }  # which stays as it is
    exact = [given["x"] - given["y"], given["x"].sum()]
    cancelled, summed = conditions(lambda a: [a["x"] - a["y"], a["x"][a["label"]].sum()], given, exact)
    assert cancelled == pytest.approx(math.sqrt(2) / d, rel=0.05)
    assert summed == pytest.approx(1 / math.sqrt(n), rel=0.8)  # one number, of eight samples


@pytest.mark.parametrize(
    "case", ["mixture", "log_mixture", "stream", "topk", "low_rank", "features", "every_statistic"]
)
def test_condition_numbers_see_every_teacher_and_repeat(case: str) -> None:
    """The teacher's numbers count, and a second call gives the same."""
    arguments = oracle_arguments(make(CASES[case], torch.float32))
    exact = exactly(arguments)
    whole, again = (conditions(exactly, arguments, exact) for _ in range(2))
    assert whole == again
    assert all(0.01 < number < 10 for number in whole)
    if (teacher := arguments.get("teacher")) is not None:
        alone = conditions(lambda a: exactly({**arguments, **a}), {"teacher": teacher}, exact)
        assert all(0 < part < 1.5 * total for part, total in zip(alone, whole, strict=True))  # of eight samples


def test_the_gate_grows_with_what_a_result_goes_through() -> None:
    exact = torch.ones(100, dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    assert 4 * eps < allowance(exact, torch.float32, 0.5, (8, 16, 16)) < 6 * eps
    assert allowance(exact, torch.float32, 3.0, (8, 16)) == 3 * allowance(exact, torch.float32, 1.0, (8, 16))
    narrow = allowance(exact, torch.bfloat16, 100.0, (8, 16))  # fp32 inside, at any condition
    assert 1.5 * torch.finfo(torch.bfloat16).eps < narrow < 1.6 * torch.finfo(torch.bfloat16).eps
    tiny = exact * 1e-7  # where fp16 numbers are 6e-8 apart
    assert 0.2 < allowance(tiny, torch.float16, 1.0, (8, 16)) < 0.4


@pytest.mark.parametrize("length", [16, 1000, 100_000])
def test_sums_in_fp32_are_within_it(length: int) -> None:
    """Of numbers of both signs and of positive ones, in blocks of sqrt(L) one after the other."""
    generator = torch.Generator().manual_seed(length)
    addends = torch.randn(200, length, generator=generator)
    block = math.isqrt(length)
    for x in (addends, addends.abs()):
        found, exact = torch.zeros(200), x.double().sum(1)
        for start in range(0, length, block):
            part = torch.zeros(200)
            for column in x[:, start : start + block].T:
                part += column
            found += part
        condition = float(x.double().square().sum().sqrt() / exact.norm())
        assert relative_error(found, exact) <= allowance(exact, torch.float32, condition, (length,))
