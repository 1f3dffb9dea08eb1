"""bench/: the microbenchmarks, the GPU script, the committed results and what the pages say of them."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dft_kernels.benchmarks import tables
from dft_kernels.benchmarks.problems import LOSSES

ROOT = Path(__file__).parent.parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}


def run(*command_line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}
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


def test_the_pages_have_the_tables_of_the_results() -> None:
    done = run(sys.executable, "bench/readme.py", "--check")
    assert done.returncode == 0, done.stdout


def test_every_result_is_shown() -> None:
    shown = {source for text in PAGES.values() for source in re.findall(r"bench/results/([\w-]+\.(?:csv|png))", text)}
    assert shown == {path.name for path in (ROOT / "bench" / "results").iterdir()}


def test_a_stale_table_is_found_and_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """In README.md and in docs/ alike."""
    spec = importlib.util.spec_from_file_location("readme", ROOT / "bench" / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    (tmp_path / "docs").mkdir()
    (tmp_path / "bench").symlink_to(ROOT / "bench")
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    for path, text in PAGES.items():
        (tmp_path / path).write_text(text.replace("Gemma3-270M, batch 1", "?").replace("dft_kernels native | 1.0", "?"))
    assert readme.main(["--check"]) == 1
    assert re.findall(r"tables of (\S+) must", capsys.readouterr().out) == ["README.md", "docs/performance.md"]
    assert readme.main([]) == 0
    assert {path: (tmp_path / path).read_text() for path in PAGES} == PAGES


def test_the_pages_claim_nothing_that_no_table_holds() -> None:
    """Measured quantities stand in tables that come from CSVs; elsewhere only what is not a measurement."""
    known = {"180 MB", "9 minutes", "0.5x", "80 GB"}  # a download, a limit of gpu.sh, a weight, a GPU's name
    tables_alone = re.compile(r"<!-- table: .*?<!-- end -->|```.*?```", re.S)
    for path, text in PAGES.items():
        prose = tables_alone.sub("", text)
        quantities = re.findall(r"\d[\d.,]* ?(?:s|ms|MB|GB|GiB|KB|x|%|minutes|hours)\b", prose)
        assert set(quantities) <= known, (path, quantities)


def test_the_readme_says_of_the_gpu_what_the_table_says() -> None:
    with (ROOT / "bench" / "results" / "h100.csv").open(newline="") as file:
        rows = {row["bfloat16, forward and backward"]: list(row.values()) for row in csv.DictReader(file)}
    ratio = {name: [cell.split(",")[0] for cell in cells[1:3]] for name, cells in rows.items()}  # CE, forward KL
    said = " ".join(PAGES["README.md"].split("**On a GPU**")[1].split("##")[0].split())
    peer, ours, cuda = (ratio[name] for name in ("torch.compile(eager)", "dft_kernels triton", "dft_kernels cuda"))
    assert f"takes {peer[0]} times the floor for cross-entropy and {peer[1]} for forward KL" in said
    assert f"our Triton kernels take {ours[0]} and {ours[1]}, our CUDA kernels {cuda[0]} and {cuda[1]}." in said
    assert "2026-11-27 at commit 0e6a826" in said


def test_our_peak_is_the_lowest_of_the_committed_table() -> None:
    rows = tables.read(ROOT / "bench" / "results" / "cpu.csv")
    groups = tables.by_case([r for r in rows if r.status == "ok" and r.n == 4096])
    assert {case.loss for case, _ in groups} == set(LOSSES)
    for case, group in groups:
        best = min(group, key=lambda r: r.peak_bytes)
        assert best.ours, (case, best.implementation)
