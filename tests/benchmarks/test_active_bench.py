"""bench/active.py: what it measures, on a small random problem, and the table of it."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
from test_results import load


def test_the_errors_are_within_what_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "active.csv"
    shape = ["--shape", "64", "32", "2000", "--inputs", "random", "--dtype", "float32", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["active.py", *shape, "--csv", str(file)])
    bench: Any = load("active")
    monkeypatch.setattr(bench, "ERRORS", (0.01, 0.05))
    monkeypatch.setattr("dft_kernels.backends.active.PREPARES", 0)
    bench.main()
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert [(row["loss"], row["gradient_error"]) for row in rows] == [
        (loss, error) for loss in ("cross_entropy", "forward_kl") for error in ("", "0.01", "0.05")
    ]
    for row in rows:
        bound = float(row["dropped"] or 0)
        assert bound <= float(row["gradient_error"] or 0)
        assert max(float(row["dhidden_error"]), float(row["dweight_error"])) <= bound + 1e-5
        assert float(row["ratio_25"]) <= float(row["ratio"]) <= float(row["ratio_75"])
    assert float(rows[2]["active"]) < 1
    table = load("summaries").active_table(rows)
    assert "| cross-entropy | none |" in table
    assert "| forward KL | 0.05 |" in table
