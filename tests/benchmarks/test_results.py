"""bench/: the microbenchmarks, the GPU script, the committed results and what the README says of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from dft_kernels.benchmarks import tables
from dft_kernels.benchmarks.problems import LOSSES

ROOT = Path(__file__).parent.parent.parent


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


def test_the_readme_has_the_tables_of_the_results() -> None:
    done = run(sys.executable, "bench/readme.py", "--check")
    assert done.returncode == 0, done.stdout


def test_the_readme_claims_nothing_that_no_table_holds() -> None:
    """Measured quantities stand in tables that come from CSVs; elsewhere only what is not a measurement."""
    text = (ROOT / "README.md").read_text()
    assert text.count("<!-- table: bench/results/") >= 2
    prose = re.sub(r"<!-- table: .*?<!-- end -->|```.*?```", "", text, flags=re.S)
    quantities = re.findall(r"\d[\d.,]* ?(?:s|ms|MB|GB|KB|x|%|minutes|hours)\b", prose)
    assert set(quantities) <= {"180 MB", "9 minutes", "0.5x"}, quantities  # a download, a limit of gpu.sh, a weight


def test_our_peak_is_the_lowest_of_the_committed_table() -> None:
    rows = tables.read(ROOT / "bench" / "results" / "cpu.csv")
    groups = tables.by_case([r for r in rows if r.status == "ok" and r.n == 4096])
    assert {case.loss for case, _ in groups} == set(LOSSES)
    for case, group in groups:
        best = min(group, key=lambda r: r.peak_bytes)
        assert best.ours, (case, best.implementation)
