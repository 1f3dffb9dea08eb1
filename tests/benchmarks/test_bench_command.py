"""`dft-kernels bench`: what the command takes, prints, keeps and refuses."""

from __future__ import annotations

import json
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
from terminals import Terminal

from dft_kernels.benchmarks import runs, selection, tables
from dft_kernels.benchmarks.peers import everyone
from dft_kernels.benchmarks.problems import LOSSES, PRESETS, SWEEPS, Case, Shape
from dft_kernels.commands import bench as command
from dft_kernels.commands import main as cli

SMALL = Case(Shape(24, 16, 96), "float32", "forward_kl", "both", "cpu")


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
    said = capsys.readouterr()
    assert said.err == ""  # no bar, where there is no terminal
    for name in ("dft_kernels native", "eager"):
        lines = re.findall(rf"^  {name} +(.*)$", said.out, re.M)
        for memory, time_ in zip(lines[::2], lines[1::2], strict=True):
            assert re.fullmatch(r"-?[\d.]+ MB", memory)
            assert re.fullmatch(r"[\d.e+]+ ms, [\d.]+ x floor", time_)
        assert len(lines) == 6
    assert said.out.index("  dft_kernels native  ") < said.out.index("┏")  # before the table
    assert "floor: 4 products in float32" in said.out
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
        (["--limit", "0"], "--limit must be above 0, got 0"),
        (["--limit", "soon"], "--limit must be a finite number, got 'soon'"),
        (["--timeout", "9"], "--timeout must be a flag that there is, got none of that name. Did you mean --limit?"),
        (["--preset", "edge"], "--preset must be one of 'quick', 'smollm2',"),
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


def test_who_took_too_long_is_left_out_where_no_less_is_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[Case, dict[str, runs.Seen], float]] = []

    def measured(case: Case, names: list[str], *, known: Any, limit: float, found: Any, **_: Any) -> Any:
        asked.append((case, known, limit))
        one = runs.Seen(peak=5)
        one.rounds = {0: (1.0, 2.0)}
        seen = dict.fromkeys(names, one) | known
        if case.loss == "cross_entropy" and case.shape == (8, 8, 8):
            seen["eager"] = runs.Seen("timed out", "a call took longer than 2 s")
        for name in names:
            found(name, seen[name])
        return seen, {}

    monkeypatch.setattr(runs, "measure_case", measured)
    few = ["--backend", "--peer", "eager", "F.linear_cross_entropy", "--loss", "cross_entropy", "stored_kl"]
    assert bench("--shape", "16,8,8", "8,8,8", "8,9,7", *few, "--device", "cpu", "--limit", "2", "--brief") == 0
    reason = "a call took longer than 2 s with less to do: cross-entropy: N 8, H 8, V 8, bfloat16, cpu"
    left = {(case.shape, case.loss): known["eager"].reason for case, known, _ in asked if known}
    assert left == {(Shape(8, 8, 8), "stored_kl"): reason}  # 16,8,8 came before, 8,9,7 has fewer words
    assert {limit for _, _, limit in asked} == {2.0}
    assert f"eager: timed out, {reason}" in " ".join(capsys.readouterr().out.split())
    asked.clear()
    for preset in ([], ["--preset", "edges"], ["--preset", "smollm2"], ["--shape", "8,8,8"], ["--sweep", "n"]):
        assert bench(*preset, "--backend", "--peer", "F.linear_cross_entropy", "--device", "cpu", "--quiet") == 0
    assert list(dict.fromkeys(limit for _, _, limit in asked)) == [3.0, 10.0, 30.0]
    assert capsys.readouterr().out == ""


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    what = ["--shape", "16,8,32", "--dtype", "float32", "--rounds", "1", "--loss", "cross_entropy", "--device", "cpu"]
    for quiet in ([], ["--quiet"]):
        with monkeypatch.context() as patch:
            terminal = Terminal(patch)
            try:
                assert bench(*what, "--backend", "native", "--peer", *quiet) == 0
            finally:
                said = terminal.said()
        if quiet:
            assert said == ""
        else:
            assert re.search(r"measuring .* 1/1 rows .* cross-entropy, N 16, H 8, V 32: time of", said)
            assert "floor: 3 products in float32" in said


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
        Case(Shape(256, 576, 49152), "bfloat16", loss, "both", "cpu") for loss in ("cross_entropy", "forward_kl")
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
    edges = plan("--preset", "edges")
    assert not any(edges.values())
    assert Shape(1, 8, 2) in {case.shape for case in edges}
    for place, ends in enumerate([(1, 131072), (8, 8192), (2, 262144)]):
        sizes = [case.shape[place] for case in edges]
        assert (min(sizes), max(sizes)) == ends
    swept = plan("--shape", "4,8,16", "--sweep", "n", "--loss", "reverse_kl", "--part", "forward")
    assert [(case.shape.n, errors) for case, errors in swept.items()] == [(4, True), *((n, False) for n in SWEEPS["n"])]
    assert {(case.loss, case.part) for case in swept} == {("reverse_kl", "forward")}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_table_has_the_compiled_eager_loss(preset: str, device: str) -> None:
    for case in selection.cases(device, preset):
        assert "torch.compile(eager)" in selection.names(case.loss)
