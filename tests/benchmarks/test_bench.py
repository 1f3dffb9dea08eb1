"""`dft-kernels bench`: that every implementation is the same loss, and that workers survive what they run. No test
depends on a time."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
import torch
from bench_crowd import BLOCK, SMALL, crowd, slow_crowd, unlucky_crowd
from cases import PRESENT
from torch import Tensor

from dft_kernels.backends import BACKENDS
from dft_kernels.benchmarks import measure, runs
from dft_kernels.benchmarks.implementations import EAGER, NARROW, Unavailable
from dft_kernels.benchmarks.inputs import Inputs
from dft_kernels.benchmarks.peers import everyone
from dft_kernels.benchmarks.problems import LOSSES, PARTS, Shape

QUIET: dict[str, Any] = {"rounds": 2, "seconds": 5.0, "limit": 4 << 30, "timeout": 120.0, "errors": False}

# ---- implementations ----

# those that compile themselves take seconds for each loss, and are the same code for all of them
ON_CPU = [
    (name, loss)
    for name, each in everyone().items()
    for loss in each.losses
    if not each.compiled or loss in ("cross_entropy", "jensen_shannon")
]
# what a machine without a GPU, or without QuACK, lacks
ELSEWHERE = ("Liger FLCE", "Liger fused", "Liger Fused", "CCE", "QuACK")
OURS_ELSEWHERE = tuple(f"dft_kernels {name}" for name in BACKENDS if name not in PRESENT)


@pytest.mark.parametrize(("name", "loss"), ON_CPU)
@pytest.mark.filterwarnings("ignore")  # peers' own
def test_every_implementation_is_the_loss(name: str, loss: str) -> None:
    narrow = name == NARROW  # rounds logits, which only 16-bit inputs can ask for
    case = SMALL._replace(loss=loss, dtype="bfloat16" if narrow else SMALL.dtype)
    if name.startswith(ELSEWHERE + OURS_ELSEWHERE) and name != "CCE torch_compile":
        with pytest.raises((Unavailable, ImportError), match=r"needs a GPU|kernels run on"):
            everyone()[name].prepare(case)
        return
    try:
        call = everyone()[name].prepare(case)
    except (Unavailable, ModuleNotFoundError) as reason:
        if everyone()[name].package in ("dft-kernels", "liger-kernel", "cut-cross-entropy"):
            raise
        pytest.skip(str(reason))  # TRL has Python 3.11, F.linear_cross_entropy torch 2.13
    assert worst(measure.Exact(case, Inputs.make(case, 0)).errors(call)) < (0.05 if narrow else 1e-5)


def worst(errors: dict[str, float]) -> float:
    return max(error for what, error in errors.items() if what != "rows")


def test_errors_see_a_wrong_gradient() -> None:
    exact = measure.Exact(SMALL, Inputs.make(SMALL, 0))

    def wrong(x: Inputs) -> Tensor:
        loss = EAGER.prepare(SMALL)(x)
        return loss + 0.01 * (x.hidden.sum() - x.hidden.detach().sum())

    errors = exact.errors(wrong)
    assert errors["loss"] < 1e-5
    assert errors["dhidden"] > 1e-2
    assert errors["dweight"] < 1e-5


def test_errors_take_fewer_rows_where_float64_is_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    n, h, v = SMALL.shape
    monkeypatch.setitem(measure.ORACLE_FLOPS, "cpu", 8.0 * h * v * (n // 2))
    exact = measure.Exact(SMALL, Inputs.make(SMALL, 0))
    assert len(exact.dhidden) == n // 2
    errors = exact.errors(EAGER.prepare(SMALL))
    assert worst(errors) < 1e-5
    assert errors["rows"] == n // 2


def test_inputs_are_as_they_say() -> None:
    case = SMALL._replace(shape=Shape(64, 256, 4096), loss="stored_kl")
    x, y = Inputs.make(case, 0), Inputs.make(case, 1)
    assert not torch.equal(x.hidden, y.hidden)
    assert torch.equal(x.hidden, Inputs.make(case, 0).hidden)
    logits, teacher = x.hidden.detach() @ x.weight.detach().t(), x.teacher_hidden @ x.teacher_weight.t()
    frequency = -torch.arange(2.0, 4098.0).log()  # Zipf's law
    noise, other = logits - frequency, teacher - frequency
    assert 2.7 < float(noise.std()) < 3.3
    assert abs(float(noise.mean())) < 0.1
    assert 0.75 < float(torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1]) < 0.95
    assert x.teacher_logits is not None
    assert x.teacher_probabilities is not None
    torch.testing.assert_close(x.teacher_probabilities, teacher.softmax(-1))
    assert case.input_bytes() == sum(
        t.numel() * 4
        for t in (x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, x.teacher_logits, x.teacher_probabilities)
    )


# ---- measurement ----


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_floor_is_the_products(loss: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = SMALL._replace(loss=loss, part=part)
    rows, v = 8, case.shape.v
    monkeypatch.setattr(measure, "FLOOR_BYTES", rows * v * 4)  # three slices
    x, floor = Inputs.make(case, 0), measure.Floor(case)
    made = []
    product = torch.mm

    def counted(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        made.append(2.0 * a.shape[0] * a.shape[1] * b.shape[1])
        return product(a, b, out=out)

    monkeypatch.setattr(torch, "mm", counted)
    floor(x)
    assert floor.rows == rows
    assert sum(made) == case.flops()
    if part != "backward":
        torch.testing.assert_close(floor.logits, (x.hidden @ x.weight.t()).detach()[-rows:])
    if part != "forward":
        torch.testing.assert_close(floor.dweight, (floor.logits.t() @ x.hidden[-rows:]).detach())


def test_rounds_turn_and_fit_the_time() -> None:
    orders = [measure.turned(["a", "b", "c"], number) for number in range(50)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert {(order.index("a"), order.index("b")) for order in orders} == {
        (i, j) for i in range(3) for j in range(3) if i != j
    }  # fmt: skip
    assert measure.rounds_for(1.0, 5, 30.0) == 5
    assert measure.rounds_for(10_000.0, 5, 30.0) == 3
    assert measure.rounds_for(90_000.0, 5, 30.0) == 1


def test_workers_survive_what_they_run() -> None:
    seen, ceilings = runs.measure_case(
        SMALL, list(crowd()), **{**QUIET, "errors": True}, progress=lambda _: None, table=crowd
    )
    status = {name: one.status for name, one in seen.items()}
    assert status == {
        "eager": "ok",
        "allocates": "ok",
        "wants 64 GB": "out of memory",
        "raises": "failed",
        "is another loss": "failed",
        "dies": "failed",
        "unavailable": "skipped",
        "not installed": "skipped",
    }
    assert re.fullmatch(r"its gradient is off by \d+%: not this loss's", seen["is another loss"].reason)
    assert seen["raises"].reason == "RuntimeError: this machine"
    assert seen["dies"].reason == "the process ended with 3: so long"
    assert seen["unavailable"].reason == "only on Sundays"
    assert "pip install 'dft-kernels[bench]'" in seen["not installed"].reason
    for name in ("eager", "allocates"):
        assert len(seen[name].rounds) == 2
        assert worst(seen[name].errors) < 1e-5
    assert ceilings["product_flops"] > 0
    if sys.platform == "linux":
        eager, more = seen["eager"].peak, seen["allocates"].peak
        assert eager is not None
        assert more is not None
        assert 0.95 * BLOCK < more < 1.2 * BLOCK
        assert eager < 0.1 * BLOCK


def test_what_dies_while_it_is_timed_takes_nobody_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where one process measures all: it is started again without the one that died."""
    case, names = SMALL, ["dies", "eager"]
    jobs = []
    watch = runs.watch

    def as_on_a_gpu(job: Any, *rest: Any) -> Any:
        jobs.append(job.names)
        return watch(job._replace(memory=False), *rest)

    monkeypatch.setattr(runs, "watch", as_on_a_gpu)
    seen, _ = runs.measure_case(case, names, **QUIET, progress=lambda _: None, table=crowd)
    assert jobs[-2:] == [("dies", "eager"), ("eager",)]
    assert (seen["dies"].status, seen["eager"].status) == ("failed", "ok")
    assert len(seen["eager"].rounds) == 2


def test_what_says_nothing_is_stopped() -> None:
    seen, _ = runs.measure_case(
        SMALL, ["hangs", "eager"], **{**QUIET, "timeout": 12.0}, progress=lambda _: None, table=slow_crowd
    )
    assert (seen["hangs"].status, seen["hangs"].reason) == ("timed out", "said nothing for 12 s")
    assert (seen["eager"].status, len(seen["eager"].rounds)) == ("ok", 2)


def test_times_survive_the_oracle() -> None:
    seen, _ = runs.measure_case(
        SMALL, ["eager"], **{**QUIET, "errors": True}, progress=lambda _: None, table=unlucky_crowd
    )
    assert (seen["eager"].status, seen["eager"].errors, len(seen["eager"].rounds)) == ("ok", {}, 2)
    assert seen["eager"].reason.startswith("no errors, float64 does not fit: ")


def test_a_slow_product_is_not_tried_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU without bf16 instructions, where one of 2048 takes minutes."""
    sizes: set[int] = set()
    multiply = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: (sizes.add(len(a)), multiply(a, b, out=out))[1])
    monkeypatch.setattr(measure, "QUICK", 0.0)
    assert measure.ceilings(SMALL)["product_flops"] > 0
    assert sizes == {256}
