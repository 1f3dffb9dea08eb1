"""`dft-kernels bench`: that every implementation is the same loss, and that workers survive what they run. No test
depends on a time."""

from __future__ import annotations

import re
import sys
import time
from typing import Any

import pytest
import torch
from bench_crowd import BLOCK, SMALL, crowd, slow_crowd, unlucky_crowd
from cases import PRESENT
from torch import Tensor

from dft_kernels.backends import BACKENDS
from dft_kernels.benchmarks import floor as bare
from dft_kernels.benchmarks import measure, runs, worker
from dft_kernels.benchmarks.implementations import EAGER, NARROW, Call, Implementation, Unavailable
from dft_kernels.benchmarks.inputs import Inputs
from dft_kernels.benchmarks.peers import everyone
from dft_kernels.benchmarks.problems import LOSSES, PARTS, Shape

QUIET: dict[str, Any] = {
    "rounds": 2, "limit": 60.0, "memory_limit": 4 << 30, "errors": False,
    "progress": lambda _: None, "found": lambda *_: None,
}  # fmt: skip

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
    assert worst(errors_of(call, measure.Exact(case, Inputs.make(case, 0)))) < (0.05 if narrow else 1e-5)


def errors_of(call: Call, exact: measure.Exact) -> dict[str, float]:
    return exact.errors(exact.called(call))


def worst(errors: dict[str, float]) -> float:
    return max(error for what, error in errors.items() if what != "rows")


def test_errors_see_a_wrong_gradient() -> None:
    exact = measure.Exact(SMALL, Inputs.make(SMALL, 0))

    def wrong(x: Inputs) -> Tensor:
        loss = EAGER.prepare(SMALL)(x)
        return loss + 0.01 * (x.hidden.sum() - x.hidden.detach().sum())

    errors = errors_of(wrong, exact)
    assert errors["loss"] < 1e-5
    assert errors["dhidden"] > 1e-2
    assert errors["dweight"] < 1e-5


def test_errors_take_fewer_rows_where_float64_is_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    n, h, v = SMALL.shape
    monkeypatch.setitem(measure.ORACLE_FLOPS, "cpu", 8.0 * h * v * (n // 2))
    exact = measure.Exact(SMALL, Inputs.make(SMALL, 0))
    assert len(exact.dhidden) == n // 2
    errors = errors_of(EAGER.prepare(SMALL), exact)
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
    monkeypatch.setattr(bare, "FLOOR_BYTES", rows * v * 4)  # three slices
    x, floor = Inputs.make(case, 0), bare.Floor(case)
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
    seen, ceilings = runs.measure_case(SMALL, list(crowd()), **{**QUIET, "errors": True}, table=crowd)
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
    seen, _ = runs.measure_case(case, names, **QUIET, table=crowd)
    assert jobs[-2:] == [("dies", "eager"), ("eager",)]
    assert (seen["dies"].status, seen["eager"].status) == ("failed", "ok")
    assert len(seen["eager"].rounds) == 2


def test_who_takes_longer_is_left_out_and_the_others_go_on() -> None:
    told = []
    seen, machine = runs.measure_case(
        SMALL, ["hangs", "eager"], table=slow_crowd,
        **{**QUIET, "limit": 4.0, "found": lambda name, one: told.append((name, one.status, len(one.rounds)))},
    )  # fmt: skip
    assert (seen["hangs"].status, seen["hangs"].reason) == ("timed out", "a call took longer than 4 s")
    assert (seen["eager"].status, len(seen["eager"].rounds)) == ("ok", 2)
    assert told == [("hangs", "timed out", 0), ("eager", "ok", 0), ("eager", "ok", 2)]
    assert machine["floor_dtype"] == "float32"


def test_who_is_known_to_take_longer_is_not_run() -> None:
    told = []
    known = {"dies": runs.Seen("timed out", "before"), "eager": runs.Seen(peak=7)}
    seen, _ = runs.measure_case(
        SMALL, list(known), known=known, table=crowd, **QUIET | {"found": lambda name, _: told.append(name)}
    )
    assert seen["dies"].reason == "before"
    assert (seen["eager"].peak, len(seen["eager"].rounds)) == (7, 2)
    assert told == ["dies", "eager"]


def test_what_a_call_compiles_does_not_count() -> None:
    patience = runs.Patience(30.0)
    assert patience.hear("begin", 0.0) == runs.PATIENCE
    assert patience.lost() == "said nothing for 300 s"
    assert patience.hear("call", 10.0) == 30.0
    assert patience.hear("compiling", 15.0) == runs.PATIENCE
    assert patience.lost() == "compiled for 300 s"
    assert patience.hear("compiled", 100.0) == 25.0
    assert patience.hear("compiling", 110.0) == runs.PATIENCE  # the backward
    assert patience.hear("compiled", 150.0) == 15.0
    assert patience.lost() == "a call took longer than 30 s"
    assert patience.hear("time", 151.0) == runs.PATIENCE
    assert patience.hear("call", 160.0) == 30.0


def test_a_worker_says_when_it_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(case: Any) -> Call:
        return torch.compile(EAGER.prepare(case), backend="eager")

    monkeypatch.setattr(measure, "limit_memory", lambda *_: None)  # it would stay in this process
    table = {"compiled": Implementation("compiled", "torch", tuple(LOSSES), prepare, compiled=True)}
    job = worker.Job(SMALL, ("compiled",), True, False, False, 1, 60.0, 1 << 30, lambda: table)
    events: list[worker.Event] = []
    worker.run(job, events.append)
    torch._dynamo.reset()  # which forgets the callbacks
    kinds = [event.kind for event in events]
    assert kinds == ["begin", "begin", "call", "compiling", "compiled", "call", "peak"]


def test_times_survive_the_oracle() -> None:
    seen, _ = runs.measure_case(SMALL, ["eager"], **{**QUIET, "errors": True}, table=unlucky_crowd)
    assert (seen["eager"].status, seen["eager"].errors, len(seen["eager"].rounds)) == ("ok", {}, 2)
    assert seen["eager"].reason.startswith("no errors, float64 does not fit: ")


def test_a_slow_product_is_not_tried_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: set[int] = set()
    multiply = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: (sizes.add(len(a)), multiply(a, b, out=out))[1])
    monkeypatch.setattr(bare, "QUICK", 0.0)
    assert bare.ceilings(SMALL, torch.float32)["product_flops"] > 0
    assert sizes == {256}


@pytest.mark.parametrize("slow", [torch.bfloat16, torch.float32])
def test_the_floor_is_in_the_faster_dtype(slow: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU without bf16 instructions, where a product takes a hundred times as long; or with them."""
    made: list[tuple[torch.dtype, int]] = []
    multiply = torch.mm

    def product(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        made.append((out.dtype, len(a)))
        if out.dtype == slow:
            time.sleep(0.4 if slow == torch.bfloat16 else 0.01)
        return multiply(a, b, out=out)

    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.setattr(bare, "LONG", 100.0)
    case = SMALL._replace(dtype="bfloat16")
    x = Inputs.make(case, 0)
    assert bare.floor_dtype(SMALL, Inputs.make(SMALL, 0)) == torch.float32
    assert bare.floor_dtype(case._replace(device="cuda"), x) == torch.bfloat16
    assert made == []
    assert bare.floor_dtype(case, x) == ({torch.bfloat16, torch.float32} - {slow}).pop()
    if slow == torch.bfloat16:
        assert [rows for dtype, rows in made if dtype == slow] == [bare.FIRST_ROWS]  # given up at the first product
    else:
        assert {rows for _, rows in made} == {bare.FIRST_ROWS, case.shape.v}  # of logits.t()


def test_a_floor_in_fp32_has_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    case = SMALL._replace(dtype="bfloat16")
    sets = [Inputs.make(case, seed) for seed in range(2)]
    race = measure.Race(case, sets, torch.float32)
    dtypes = []
    multiply = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: (dtypes.append((a.dtype, b.dtype)), multiply(a, b, out=out))[1])
    assert race.bare(1) > 0
    assert set(dtypes) == {(torch.float32, torch.float32)}
    copies = race.floor.operands(sets[1])
    for name in ("hidden", "weight", "teacher_hidden", "teacher_weight"):
        assert not getattr(copies, name).requires_grad
        torch.testing.assert_close(getattr(copies, name), getattr(sets[1], name).detach().float())
    assert measure.Race(case, sets).floor.operands(sets[0]) is sets[0]


@pytest.mark.parametrize("loss", ["cross_entropy", "forward_kl"])
@pytest.mark.parametrize("shape", [Shape(1, 8, 2), Shape(1, 1, 1), Shape(1, 256, 2), Shape(64, 8, 2)])
def test_the_smallest_problems(loss: str, shape: Shape) -> None:
    """By every backend that runs here."""
    case = SMALL._replace(shape=shape, loss=loss)
    for name, each in everyone().items():
        if each.ours and name.removeprefix("dft_kernels ") in PRESENT:
            x = Inputs.make(case, 0)
            found = each.prepare(case)(x)
            found.backward()
            eager = Inputs.make(case, 0)
            EAGER.prepare(case)(eager).backward()
            torch.testing.assert_close(x.hidden.grad, eager.hidden.grad, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(x.weight.grad, eager.weight.grad, rtol=1e-4, atol=1e-6)
