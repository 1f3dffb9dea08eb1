"""That the tables and pictures of `dft-kernels bench` say what was measured."""

from __future__ import annotations

import csv
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest

from dft_kernels.benchmarks import plots, runs, tables
from dft_kernels.benchmarks.problems import Case, Shape
from dft_kernels.benchmarks.tables import Row

SMALL = Case(Shape(24, 16, 96), "float32", "forward_kl", "both", "cpu")


def row(implementation: str = "eager", **others: Any) -> Row:
    given: dict[str, Any] = {
        "date": "2026-01-02", "commit": "abc", "machine": "a machine", "python": "3.11", "torch": "2.13",
        "device": "cpu", "n": 64, "h": 16, "v": 128, "dtype": "bfloat16", "loss": "forward_kl", "part": "both",
        "implementation": implementation, "package": "torch 2.13", "status": "ok", "reason": "", "rounds": 3,
        "ms": 20.0, "ms_low": 19.0, "ms_high": 22.0, "floor_ms": 5.0, "over_floor": 4.0, "over_floor_low": 3.9,
        "over_floor_high": 4.2, "floor_dtype": "bfloat16", "over_eager": 1.0, "over_best_peer": 1.0, "peak_bytes": 3e6,
        "error_loss": 1e-3,
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
    machine = {"product_flops": 1.0, "copy_bytes": 2.0, "floor_dtype": "float32"}
    rows = runs.rows_of(SMALL, seen, machine, about)
    first, second, third, last = rows
    assert (first.ms, first.ms_low, first.ms_high, first.rounds) == (12.0, 11.0, 22.0, 3)
    assert first.over_floor == pytest.approx(1.1)
    assert (first.over_floor_low, first.over_floor_high) == pytest.approx((1.1, 1.2))
    assert first.over_eager == pytest.approx(0.25)
    assert first.over_best_peer == pytest.approx(0.75)  # of rounds 0 and 1, the only ones that both have
    assert (first.peak_bytes, first.error_dweight, first.floor_dtype) == (7, 1e-4, "float32")
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
    assert "floor: 4 products in bfloat16, 5..5 ms" in text
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
    made = tables.markdown(rows, Shape(64, 16, 128), ["bfloat16"])
    assert "| dft_kernels native | 1.20, 1 MB |" in made
    assert "| TRL chunked_divergence | out of memory |" in made
    assert "Not measured, since they do not run here: QuACK, its twin." in made
    assert (
        tables.markdown([*rows, row(inputs="smollm2", distance=0.4, over_floor=9.0)], Shape(64, 16, 128), ["bfloat16"])
        == made
    )
    for others in ([], [row(machine="another")]):
        with pytest.raises(ValueError, match="of one machine, got"):
            tables.markdown([*rows, *others] if others else [], Shape(64, 16, 128), ["bfloat16"])
    assert [len(group) for _, group in tables.by_case([*rows, row(machine="another")])] == [6, 1]
    with pytest.raises(ValueError, match="must have rows of N 1, H 2, V 3 in float32"):
        tables.markdown(rows, Shape(1, 2, 3), ["float32"])


def test_a_table_of_two_dtypes_names_floors_limits_and_reasons() -> None:
    slow = {"status": "timed out", "reason": "a call took longer than 30 s with less to do: a case", "ms": math.nan}
    wide = {"dtype": "float32", "floor_dtype": "float32"}
    rows = [
        row("dft_kernels native", peak_bytes=3e7, floor_dtype="float32"), row(**slow),
        row("dft_kernels native", peak_bytes=1e6, **wide), row(peak_bytes=2.4e6, **wide),
    ]  # fmt: skip
    shape = Shape(64, 16, 128)
    head, _, ours, eager, _, about = tables.markdown(rows, shape, ["float32", "bfloat16"]).splitlines()
    assert head == "| N 64, H 16, V 128 | forward KL, float32 | forward KL, bfloat16 |"
    assert ours == "| dft_kernels native | 4.00, 1 MB | 4.00, 30 MB |"
    assert eager == "| eager | 4.00, 2.4 MB | over 30 s |"
    assert about.startswith("a machine; torch 2.13")
    assert about.endswith(" In bfloat16 the floor is the products of fp32 copies, which are the faster here.")
    (lost,) = [line for line in tables.reasons(rows) if line.startswith("eager")]
    assert lost == f"eager: timed out, {slow['reason']}"
    rows[2] = row("dft_kernels native", peak_bytes=3e6, **wide)  # more than eager's
    made = tables.markdown(rows, shape, ["float32", "bfloat16"], "It must be so.")
    assert "| dft_kernels native | 4.00, 3 MB ¹ | 4.00, 30 MB |" in made
    assert made.endswith(" ¹ It must be so.")
    with pytest.raises(ValueError, match="must say why a peer has a lower peak, got forward KL in float32"):
        tables.markdown(rows, shape, ["float32", "bfloat16"])
    with pytest.raises(ValueError, match="must be left out, got 'It must be so"):
        tables.markdown(rows, shape, ["bfloat16"], "It must be so.")


def test_pictures_of_a_sweep_and_a_roofline(tmp_path: Path) -> None:
    rows = []
    for i, n in enumerate((512, 1024, 2048)):
        rows.append(row("dft_kernels native", n=n, ms=6.0 * n, floor_ms=5.0 * n))
        out = {"status": "out of memory", "ms": math.nan} if i == 2 else {"ms": 20.0 * n}
        rows.append(row(n=n, floor_ms=5.0 * n, **out))
        out = {"status": "timed out", "ms": math.nan} if i else {"ms": 90.0 * n}
        rows.append(row("CCE", n=n, floor_ms=5.0 * n, **out))
    ((title, group),) = plots.series(rows, "n")
    assert title == "forward KL: H 16, V 128, bfloat16"
    assert [r.n for r in group] == [512, 512, 512, 1024, 1024, 1024, 2048, 2048, 2048]
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
