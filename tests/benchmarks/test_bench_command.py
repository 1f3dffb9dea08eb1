"""`dft-kernels bench`: that tables and pictures say what was measured, and what the command takes and refuses."""

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
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dft_kernels.benchmarks import plots, runs, selection, tables
from dft_kernels.benchmarks.peers import everyone
from dft_kernels.benchmarks.problems import LOSSES, PRESETS, SWEEPS, Case, Shape
from dft_kernels.benchmarks.tables import Row
from dft_kernels.commands import bench as command
from dft_kernels.commands import main as cli

SMALL = Case(Shape(24, 16, 96), "float32", "forward_kl", "both", "cpu")


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
        row("its twin", status="skipped", reason="QuACK needs [a GPU]"),
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
    assert "TRL chunked_divergence: out of memory, [enforce fail at /x/y.cpp:1]" in text
    assert "QuACK, its twin: skipped, QuACK needs [a GPU]" in text
    assert tables.reasons([*rows, *rows])[0] == "QuACK, its twin: skipped, QuACK needs [a GPU]"
    assert tables.reasons([row(status="failed", reason="a line\nand  more")]) == ["eager: failed, a line and more"]
    console.print(tables.brief(rows))
    (line,) = [line for line in console.export_text(clear=False).splitlines() if "forward KL: N 64" in line]
    assert [cell.strip() for cell in line.split("│")[2:-1]] == [
        "native", "6", "1.20", "0.30", "0.60", "CCE", "1", "2",
    ]  # fmt: skip
    made = tables.markdown(rows, Shape(64, 16, 128), "bfloat16")
    assert "| dft_kernels native | 1.20, 1 MB |" in made
    assert "| TRL chunked_divergence | out of memory |" in made
    assert "Not measured, since they do not run here: QuACK, its twin." in made
    assert (
        tables.markdown([*rows, row(inputs="smollm2", distance=0.4, over_floor=9.0)], Shape(64, 16, 128), "bfloat16")
        == made
    )
    for others in ([], [row(machine="another")]):
        with pytest.raises(ValueError, match="of one machine, got"):
            tables.markdown([*rows, *others] if others else [], Shape(64, 16, 128), "bfloat16")
    assert [len(group) for _, group in tables.by_case([*rows, row(machine="another")])] == [6, 1]
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
    real = [row(n=n, inputs="smollm2", distance=0.01) for n in (512, 1024, 2048)]
    assert [title for title, _ in plots.series([*rows, *real], "n")] == [
        "forward KL: H 16, V 128, bfloat16", "forward KL, KL 0.01: H 16, V 128, smollm2, bfloat16",
    ]  # fmt: skip
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
        (["--inputs", "llama"], "--inputs must be one of 'random', 'smollm2', got 'llama'"),
        (
            ["--inputs", "smollm2", "--shape", "64,576,49152", "64,512,49152"],
            "--shape must have the head of smollm2, H 576, V 49152, with --inputs smollm2, got N 64, H 512, V 49152",
        ),
        (
            ["--inputs", "smollm2", "--preset", "qwen"],
            "--preset must have the head of smollm2, H 576, V 49152, with --inputs smollm2, got N 8192, H 4096",
        ),
        (["--inputs", "smollm2", "--sweep", "n"], "--sweep must be left out with --inputs smollm2, got n"),
        (["--plot", "x.jpg"], "--plot must end in .png, got x.jpg"),
        (["--memory-limit", "-1"], "--memory-limit must be above 0, got -1"),
        (["--csv", "."], "--csv must be a file's name, got ., a folder"),
        (["--show", "nowhere.csv"], "--show must be a readable file, got nowhere.csv"),
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
    command_line = [sys.executable, "-m", "dft_kernels.commands.main", "bench", "--peer", "eager", "--device", "cpu"]
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
    name = selection.trace(case, ["QuACK", "dft_kernels native", "eager"], tmp_path / "trace.json")
    assert name == "dft_kernels native"
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert any("FusedLoss" in event.get("name", "") for event in events)
    with pytest.raises(ValueError, match="must have an implementation of"):
        selection.trace(case, ["Liger FusedLinearKLDiv"], tmp_path / "none.json")


def test_presets_and_sweeps_hold_what_they_say() -> None:
    def plan(*arguments: str) -> dict[Case, bool]:
        return command.todo(command.parser().parse_args(arguments), "cpu")

    assert list(plan()) == [
        Case(Shape(256, 576, 49152), "bfloat16", loss, "both", "cpu")
        for loss in ("cross_entropy", "forward_kl", "jensen_shannon")
    ]
    for name in PRESETS:
        assert plan("--preset", name)
    assert {case.loss for case in plan("--preset", "smollm2")} == set(LOSSES)
    real = plan("--inputs", "smollm2")
    assert {case.shape for case in real} == {Shape(512, 576, 49152)}
    assert [(case.loss, case.distance) for case in real] == [
        ("cross_entropy", 0.0), ("forward_kl", 0.4), ("forward_kl", 0.01), ("forward_kl", 0.001),
    ]  # fmt: skip
    assert {case.shape.n for case in plan("--inputs", "smollm2", "--shape", "8,576,49152")} == {8}
    assert {case.loss for case in plan("--inputs", "smollm2", "--preset", "smollm2")} == set(LOSSES)
    full = plan("--preset", "full")
    assert {case.shape.n for case in full} >= set(SWEEPS["n"])
    assert {case.shape.v for case in full} >= set(SWEEPS["v"])
    swept = plan("--shape", "4,8,16", "--sweep", "n", "--loss", "reverse_kl", "--part", "forward")
    assert [(case.shape.n, errors) for case, errors in swept.items()] == [(4, True), *((n, False) for n in SWEEPS["n"])]
    assert {(case.loss, case.part) for case in swept} == {("reverse_kl", "forward")}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_table_has_the_compiled_eager_loss(preset: str, device: str) -> None:
    for case in selection.cases(device, preset):
        assert "torch.compile(eager)" in selection.names(case.loss)
