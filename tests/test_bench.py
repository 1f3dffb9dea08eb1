"""`dft-kernels bench`: that every implementation is the same loss, that workers survive what they run, that the tables
and pictures say what was measured. No test depends on a time."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import PRESENT
from torch import Tensor

from dft_kernels import cli
from dft_kernels.backends import BACKENDS
from dft_kernels.benchmarks import command, measure, plots, runs, tables
from dft_kernels.benchmarks.implementations import EAGER, Implementation, Unavailable
from dft_kernels.benchmarks.peers import everyone
from dft_kernels.benchmarks.problems import LOSSES, PARTS, PRESETS, SWEEPS, Case, Inputs, Shape
from dft_kernels.benchmarks.tables import Row

ROOT = Path(__file__).parent.parent
SMALL = Case(Shape(24, 16, 96), "float32", "forward_kl", "both", "cpu")
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
    case = SMALL._replace(loss=loss)
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
    assert worst(measure.Exact(case, Inputs.make(case, 0)).errors(call)) < 1e-5


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


def _fake(action: Callable[[Inputs], Any], name: str, compiled: bool = False) -> Implementation:
    def prepare(case: Case) -> Callable[[Inputs], Tensor]:
        def call(x: Inputs) -> Tensor:
            # not in the small call before memory is measured
            more = action(x) if len(x.hidden) == SMALL.shape.n else None
            return EAGER.prepare(case)(x) + (0.0 if more is None else more)

        return call

    return Implementation(name, "torch", tuple(LOSSES), prepare, compiled)


BLOCK = 192 << 20


def _allocate(x: Inputs) -> None:
    torch.ones(BLOCK, dtype=torch.int8)


def _wrong(x: Inputs) -> Tensor:
    return x.hidden.sum()


def _too_much(x: Inputs) -> None:
    torch.ones(1 << 36, dtype=torch.int8)


def _raise(x: Inputs) -> None:
    raise RuntimeError("this machine\nis not for me")


def _die(x: Inputs) -> None:
    print("so long", flush=True)
    os._exit(3)


def _hang(x: Inputs) -> None:
    time.sleep(600)


def _unavailable(case: Case) -> Any:
    raise Unavailable("only on Sundays")


def _not_installed(case: Case) -> Any:
    raise ImportError("No module named 'peer'")


def crowd() -> dict[str, Implementation]:
    """What a worker may meet. At module level, so that a worker can import it."""
    made = [
        EAGER,
        _fake(_allocate, "allocates"),
        _fake(_too_much, "wants 64 GB"),
        _fake(_raise, "raises"),
        _fake(_wrong, "is another loss"),
        _fake(_die, "dies"),
        Implementation("unavailable", "none", tuple(LOSSES), _unavailable),
        Implementation("not installed", "none", tuple(LOSSES), _not_installed),
    ]
    return {each.name: each for each in made}


def _dies_in_float64(case: Case) -> Callable[[Inputs], Tensor]:
    """Prepared so that the oracle after it ends the process."""

    def die(*_: Any) -> None:
        os._exit(4)

    measure.Exact = die  # type: ignore[assignment,misc]  # in the worker alone
    return EAGER.prepare(case)


def slow_crowd() -> dict[str, Implementation]:
    return {"hangs": _fake(_hang, "hangs", compiled=True), EAGER.name: EAGER}


def unlucky_crowd() -> dict[str, Implementation]:
    return {EAGER.name: Implementation(EAGER.name, "torch", tuple(LOSSES), _dies_in_float64)}


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
        SMALL, ["hangs", "eager"], **{**QUIET, "timeout": 30.0}, progress=lambda _: None, table=slow_crowd
    )
    assert (seen["hangs"].status, seen["hangs"].reason) == ("timed out", "said nothing for 30 s")
    assert (seen["eager"].status, len(seen["eager"].rounds)) == ("ok", 2)


def test_times_survive_the_oracle() -> None:
    seen, _ = runs.measure_case(
        SMALL, ["eager"], **{**QUIET, "errors": True}, progress=lambda _: None, table=unlucky_crowd
    )
    assert (seen["eager"].status, seen["eager"].errors, len(seen["eager"].rounds)) == ("ok", {}, 2)


# ---- tables and pictures ----


def row(implementation: str = "eager", **others: Any) -> Row:
    given: dict[str, Any] = {
        "date": "2026-01-02", "commit": "abc", "machine": "a machine", "python": "3.11", "torch": "2.13",
        "device": "cpu", "n": 64, "h": 16, "v": 128, "dtype": "bfloat16", "loss": "forward_kl", "part": "both",
        "implementation": implementation, "package": "torch 2.13", "status": "ok", "reason": "", "rounds": 3,
        "ms": 20.0, "ms_low": 19.0, "ms_high": 22.0, "floor_ms": 5.0, "over_floor": 4.0, "over_floor_low": 3.9,
        "over_floor_high": 4.2, "over_eager": 1.0, "over_best_peer": 1.0, "peak_bytes": 3e6, "error_loss": 1e-3,
        "error_dhidden": 2e-3, "error_dweight": 3e-3, "product_flops": 1e11, "copy_bytes": 1e10,
    }  # fmt: skip
    return Row(**(given | others))


def test_rows_of_a_case_take_ratios_within_rounds() -> None:
    ours, eager, best = runs.Seen(), runs.Seen(), runs.Seen()
    ours.rounds = {0: (10.0, 11.0), 1: (20.0, 22.0), 2: (10.0, 12.0)}
    eager.rounds = {0: (10.0, 44.0), 1: (20.0, 88.0), 2: (10.0, 48.0)}
    best.rounds = {0: (10.0, 22.0), 1: (10.0, 22.0)}
    ours.peak, ours.errors = 7, {"loss": 1e-6, "dhidden": 1e-5, "dweight": 1e-4}
    gone = runs.Seen("out of memory", "killed")
    seen = {"dft_kernels native": ours, "eager": eager, "torch.compile(eager)": best, "TRL chunked_divergence": gone}
    about = {"date": "d", "commit": "c", "machine": "m", "python": "p", "torch": "t"}
    rows = runs.rows_of(SMALL, seen, {"product_flops": 1.0, "copy_bytes": 2.0}, about)
    first, second, third, last = rows
    assert (first.ms, first.ms_low, first.ms_high, first.rounds) == (12.0, 11.0, 22.0, 3)
    assert first.over_floor == pytest.approx(1.1)
    assert (first.over_floor_low, first.over_floor_high) == pytest.approx((1.1, 1.2))
    assert first.over_eager == pytest.approx(0.25)
    assert first.over_best_peer == pytest.approx(0.75)  # of rounds 0 and 1, the only ones that both have
    assert (first.peak_bytes, first.error_dweight) == (7, 1e-4)
    assert second.over_eager == 1.0
    assert third.over_best_peer == 1.0
    assert (last.status, last.reason, last.rounds) == ("out of memory", "killed", 0)
    assert math.isnan(last.ms)
    assert first.ours
    assert not second.ours


def test_a_csv_keeps_everything(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.csv"
    gone = row("gone", status="failed", reason='a "quoted", reason', ms=math.nan, peak_bytes=math.nan)
    tables.write(path, [row(), gone])
    back = tables.read(path)
    assert back[0] == row()
    assert back[1].reason == gone.reason
    assert math.isnan(back[1].ms)
    with path.open() as file:
        assert next(csv.reader(file)) == tables.HEADER
    newer = row(ms=1.0)
    other = row(machine="another")
    assert tables.merged(back, [newer, other]) == [newer, back[1], other]


def test_tables_say_who_is_where() -> None:
    from rich.console import Console

    rows = [
        row("dft_kernels native", ms=6.0, over_floor=1.2, over_eager=0.3, over_best_peer=0.6, peak_bytes=1e6),
        row(),
        row("CCE", ms=10.0, over_floor=2.0, over_best_peer=1.0, peak_bytes=2e6),
        row("QuACK", status="skipped", reason="QuACK needs [a GPU]"),
        row("TRL chunked_divergence", status="out of memory", reason="[enforce fail at /x/y.cpp:1]", ms=math.nan),
    ]
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    for table in tables.render(rows):
        console.print(table)
    text = console.export_text()
    lines = [line for line in text.splitlines() if line.startswith("│")]
    assert [line.split("│")[1].strip() for line in lines] == [
        "dft_kernels native", "CCE", "eager", "TRL chunked_divergence",
    ]  # fmt: skip
    assert re.search(r"native +│ +6 \(19\.\.22\) +│ +3 │ +1\.20 .*│ +0\.30 │ +0\.60 │ +1 │", lines[0])
    assert "TRL chunked_divergence: out of memory. [enforce fail at /x/y.cpp:1]" in text
    assert "QuACK" not in text
    assert tables.skipped([*rows, *rows]) == ["QuACK: not measured, QuACK needs [a GPU]"]
    console.print(tables.brief(rows))
    (line,) = [line for line in console.export_text(clear=False).splitlines() if "forward KL: N 64" in line]
    assert [cell.strip() for cell in line.split("│")[2:-1]] == [
        "native", "6", "1.20", "0.30", "0.60", "CCE", "1", "2",
    ]  # fmt: skip
    made = tables.markdown(rows, Shape(64, 16, 128), "bfloat16")
    assert "| dft_kernels native | 1.20, 1 MB |" in made
    assert "| TRL chunked_divergence | out of memory |" in made
    assert "Not measured, since they do not run here: QuACK." in made
    for others in ([], [row(machine="another")]):
        with pytest.raises(ValueError, match="of one machine, got"):
            tables.markdown([*rows, *others] if others else [], Shape(64, 16, 128), "bfloat16")
    assert [len(group) for _, group in tables.by_case([*rows, row(machine="another")])] == [5, 1]
    with pytest.raises(ValueError, match="must have rows of N 1, H 2, V 3 in float32"):
        tables.markdown(rows, Shape(1, 2, 3), "float32")


def test_pictures_of_a_sweep_and_a_roofline(tmp_path: Path) -> None:
    rows = []
    for i, n in enumerate((512, 1024, 2048)):
        rows.append(row("dft_kernels native", n=n, ms=6.0 * n, floor_ms=5.0 * n))
        out = {"status": "out of memory", "ms": math.nan} if i == 2 else {"ms": 20.0 * n}
        rows.append(row(n=n, floor_ms=5.0 * n, **out))
    ((title, group),) = plots.series(rows, "n")
    assert title == "forward KL: H 16, V 128, bfloat16"
    assert [r.n for r in group] == [512, 512, 1024, 1024, 2048, 2048]
    assert plots.series(rows, "v") == []
    plots.draw(rows, tmp_path / "new" / "picture.png")
    from matplotlib import image

    height, width, _ = image.imread(tmp_path / "new" / "picture.png").shape
    assert (height, width) == (920, 1200)  # two lines of panels
    with pytest.raises(ValueError, match="a plot needs rows that were measured"):
        plots.draw([row(status="skipped")], tmp_path / "none.png")


# ---- the command ----


def bench(*arguments: str) -> int:
    return cli.main(["bench", *arguments])


def test_the_command_measures_keeps_and_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, picture = tmp_path / "rows.csv", tmp_path / "rows.png"
    what = ["--shape", "16,8,32", "--dtype", "float32", "--rounds", "2", "--device", "cpu", "--csv", str(path)]
    for loss in ("cross_entropy", "forward_kl", "forward_kl"):  # the third replaces the second
        code = bench(*what, "--loss", loss, "--backend", "native", "--peer", "eager", "--json", str(tmp_path / "j"))
        assert code == 0, capsys.readouterr().err
    kept = tables.read(path)
    assert [(r.loss, r.implementation) for r in kept] == [
        (loss, name) for loss in ("cross_entropy", "forward_kl") for name in ("dft_kernels native", "eager")
    ]
    assert all(r.status == "ok" and r.over_floor > 0 and r.error_dweight < 1e-5 for r in kept)
    assert len(json.loads((tmp_path / "j").read_text())) == 2
    assert "forward KL: N 16, H 8, V 32, float32, cpu" in capsys.readouterr().out
    assert bench("--show", str(path), "--plot", str(picture), "--brief") == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "cross-entropy: N 16" in capsys.readouterr().out


def test_the_command_lists_who_runs_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--list", "--device", "cpu") == 0
    text = capsys.readouterr().out
    for name in everyone():
        assert name.split(",")[0][:20] in text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--shape", "4,5"], "--shape must be three positive integers N,H,V, got '4,5'"),
        (
            ["--peer", "ligre"],
            "--peer must begin names of implementations, got 'ligre'. They are: eager, torch.compile",
        ),
        (["--backend", "--peer", "QuACK", "--loss", "forward_kl"], "--backend, --peer and --loss must leave something"),
        (["--plot", "x.jpg"], "--plot must end in .png, got x.jpg"),
        (["--memory-limit", "-1"], "--memory-limit must be positive gigabytes, got -1"),
        (["--csv", "."], ". must be a file's name, got a folder"),
        (["--show", "nowhere.csv"], "No such file"),
    ],
)
def test_mistakes_are_said_before_any_work(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "measure_case", lambda *_, **__: pytest.fail("work was done"))
    assert bench(*arguments, "--device", "cpu") == 2
    assert text in capsys.readouterr().err


def test_a_foreign_csv_is_refused_and_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("a,b\n1,2\n")
    assert bench("--csv", str(path), "--device", "cpu") == 2
    assert "must have the columns of dft-kernels bench" in capsys.readouterr().err
    assert path.read_text() == "a,b\n1,2\n"


def test_stopping_keeps_what_was_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = []

    def measured(case: Case, names: list[str], **_: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(case)
        one = runs.Seen()
        one.rounds = {0: (1.0, 2.0)}
        return dict.fromkeys(names, one), {}

    monkeypatch.setattr(runs, "measure_case", measured)
    path = tmp_path / "rows.csv"
    assert bench("--csv", str(path), "--backend", "--peer", "eager", "--device", "cpu") == 130
    assert [r.case for r in tables.read(path)] == done
    assert str(path) in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ctrl_c_leaves_no_process_behind() -> None:
    command_line = [sys.executable, "-m", "dft_kernels.cli", "bench", "--peer", "eager", "--device", "cpu"]
    process = subprocess.Popen(
        command_line,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests started with & ignore it
    )

    def group() -> int:
        found = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # one that has just ended
                fields = stat.read_text().rpartition(")")[2].split()  # state, parent, group, ...
                found += fields[0] != "Z" and int(fields[2]) == process.pid
        return found

    try:
        for _ in range(600):
            if group() > 2:  # the command, multiprocessing's tracker, a worker
                break
            time.sleep(0.1)
        assert group() > 2
        os.kill(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130, said
        for _ in range(100):
            if group() == 0:
                return
            time.sleep(0.1)
        raise AssertionError(f"{group()} processes are left")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_a_trace_of_one_step(tmp_path: Path) -> None:
    case = SMALL
    name = command.trace(case, ["QuACK", "dft_kernels native", "eager"], tmp_path / "trace.json")
    assert name == "dft_kernels native"
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert any("dft_kernels::loss" in event.get("name", "") for event in events)
    with pytest.raises(ValueError, match="needs an implementation of"):
        command.trace(case, ["Liger FusedLinearKLDiv"], tmp_path / "none.json")


def test_presets_and_sweeps_hold_what_they_say() -> None:
    def plan(*arguments: str) -> dict[Case, bool]:
        return command.plan(command.parser().parse_args(arguments), "cpu")

    assert list(plan()) == [
        Case(Shape(256, 576, 49152), "bfloat16", loss, "both", "cpu")
        for loss in ("cross_entropy", "forward_kl", "jensen_shannon")
    ]
    for name in PRESETS:
        assert plan("--preset", name)
    assert {case.loss for case in plan("--preset", "smollm2")} == set(LOSSES)
    full = plan("--preset", "full")
    assert {case.shape.n for case in full} >= set(SWEEPS["n"])
    assert {case.shape.v for case in full} >= set(SWEEPS["v"])
    swept = plan("--shape", "4,8,16", "--sweep", "n", "--loss", "reverse_kl", "--part", "forward")
    assert [(case.shape.n, errors) for case, errors in swept.items()] == [(4, True), *((n, False) for n in SWEEPS["n"])]
    assert {(case.loss, case.part) for case in swept} == {("reverse_kl", "forward")}


# ---- bench/ and the README ----


def run(*command_line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    return subprocess.run(
        command_line, cwd=ROOT, capture_output=True, text=True, env={**clean, **environment}, timeout=500
    )


def test_microbenchmarks_run() -> None:
    done = run(
        sys.executable, "-m", "pytest", "bench", "--shape", "16,8,32", "--dtype", "float32", "--rounds", "1",
        "--device", "cpu", "-p", "no:cacheprovider",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "benchmark 'forward KL, backward only: N 16, H 8, V 32, float32, cpu'" in done.stdout
    assert "test_floor" in done.stdout
    assert "failed" not in done.stdout.splitlines()[-1]


def peer_wheel(folder: Path) -> None:
    """A wheel as a peer's: a module of one line."""
    import zipfile

    folder.mkdir()
    record = "peer.py,,\npeer-1.0.dist-info/METADATA,,\npeer-1.0.dist-info/WHEEL,,\npeer-1.0.dist-info/RECORD,,\n"
    with zipfile.ZipFile(folder / "peer-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("peer.py", "HERE = 1\n")
        wheel.writestr("peer-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: peer\nVersion: 1.0\n")
        wheel.writestr(
            "peer-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr("peer-1.0.dist-info/RECORD", record)


PARTS_OF_GPU_SH = ("wheels", "build", "info", "tests", "memcheck", "racecheck", "trace", "main", "sweep", "other")


def test_gpu_script_dry_run(tmp_path: Path) -> None:
    """Every part on a CPU; and one that fails, here since its file cannot be written, takes no other along."""
    out, wheels = tmp_path / "out", tmp_path / "wheels"
    (out / "trace.json.gz").mkdir(parents=True)
    (out / "bench.csv").write_text("of another day\n")
    peer_wheel(wheels)
    done = run("bench/gpu.sh", "--dry-run", OUT=str(out), WHEELS=str(wheels), PYTHON=sys.executable, COMMIT="abc")
    summary = (out / "summary.txt").read_text()
    assert done.returncode == 1, done.stdout
    for part in ("wheels", "build", "info", "tests", "memcheck", "racecheck", "trace", "main", "sweep", "other"):
        state = "FAILED with 2 .*must be a file's name" if part == "trace" else "ok"
        assert re.search(rf"^{part}: {state}", summary, re.M), (out / "log.txt").read_text()
    assert "1 parts failed" in summary
    assert "cross-entropy: N 32, H 16, V 64" in done.stdout
    assert {path.name for path in out.iterdir()} == {
        "log.txt", "summary.txt", "bench.csv", "sweep.csv", "bench.png", "trace.json.gz",
    }  # fmt: skip
    assert {(r.commit, r.n) for r in tables.read(out / "bench.csv")} == {("abc", 32), ("abc", 16)}


def test_gpu_script_has_one_option() -> None:
    assert run("bench/gpu.sh", "--wet-run").returncode == 2


def test_the_readme_has_the_tables_of_the_results() -> None:
    done = run(sys.executable, "bench/readme.py", "--check")
    assert done.returncode == 0, done.stdout


def test_the_readme_claims_nothing_that_no_table_holds() -> None:
    """Measured quantities stand in tables that come from CSVs; elsewhere only what is not a measurement."""
    text = (ROOT / "README.md").read_text()
    assert text.count("<!-- table: bench/results/") >= 2
    prose = re.sub(r"<!-- table: .*?<!-- end -->|```.*?```", "", text, flags=re.S)
    quantities = re.findall(r"\d[\d.,]* ?(?:s|ms|MB|GB|KB|x|%|minutes|hours)\b", prose)
    assert set(quantities) <= {"180 MB", "9 minutes"}, quantities  # a download's size, a limit of gpu.sh


def test_our_peak_is_the_lowest_of_the_committed_table() -> None:
    rows = tables.read(ROOT / "bench" / "results" / "cpu.csv")
    groups = tables.by_case([r for r in rows if r.status == "ok" and r.n == 4096])
    assert {case.loss for case, _ in groups} == set(LOSSES)
    for case, group in groups:
        best = min(group, key=lambda r: r.peak_bytes)
        assert best.ours, (case, best.implementation)
