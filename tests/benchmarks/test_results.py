"""bench/: the microbenchmarks, the GPU script, the committed results and what the pages say of them."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from dft_kernels.benchmarks import runs, tables
from dft_kernels.benchmarks.problems import Case, Shape
from dft_kernels.commands import bench as command

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


def load(name: str) -> Any:
    """A script of bench/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where a dataclass looks for its own
    spec.loader.exec_module(module)
    return module


def test_microbenchmarks_run() -> None:
    done = run(
        sys.executable, "-m", "pytest", "bench", "--shape", "16,8,32", "--dtype", "float32", "--rounds", "1",
        "--device", "cpu", "-p", "no:cacheprovider", "-k", "both or forward_kl",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "benchmark 'forward KL, backward only: N 16, H 8, V 32, float32, cpu'" in done.stdout
    assert "test_floor" in done.stdout
    assert "failed" not in done.stdout.splitlines()[-1]


def peer_wheel(folder: Path) -> None:
    """A wheel as a peer's: a module of one line."""
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


# ---- gpu.sh: its own work with a stand-in for Python, then each command line that it makes, in this process

SECTIONS = ("check", "timings", "rows", "suite", "large", "memcheck", "racecheck", "trace")
STAND_IN = r"""#!/usr/bin/env bash
if [[ "$*" == *"import xdist"* ]]; then exit 1; fi
if [[ "$1 $2" == "-m pip" ]]; then exec "$REAL" "$@"; fi
printf '%s\0' "$@" >>"$SEEN"; printf '\n\0' >>"$SEEN"
if [[ "$*" == *"bench/timings.py --out"* && -n "$SLOW" ]]; then echo measuring; exec sleep 60; fi
if [[ "$*" == *"-k 2_to"* ]]; then echo "1 failed"; exit 3; fi
echo "fine, peers: $(ls ${PYTHONPATH//:/ } 2>/dev/null | grep -c "^peer.py$")"
"""


class Ran(NamedTuple):
    code: int
    said: str
    calls: list[list[str]]  # of Python


def gpu_sh(folder: Path, *arguments: str, slow: bool = False, **environment: str) -> Ran:
    """Run gpu.sh with a Python that records what it is called with, and a compute-sanitizer that runs it."""
    folder.mkdir()
    for name, text in (
        ("python", STAND_IN),
        ("compute-sanitizer", '#!/usr/bin/env bash\nwhile [[ $1 == --* ]]; do shift 2; done\nexec "$@"\n'),
    ):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    done = run(
        "bench/gpu.sh", *arguments, PATH=f"{folder}:{os.environ['PATH']}", PYTHON=str(folder / "python"),
        REAL=sys.executable, SEEN=str(folder / "seen"), SLOW="1" if slow else "", **{"COMMIT": "abc", **environment},
    )  # fmt: skip
    seen = (folder / "seen").read_text().split("\0\n\0") if (folder / "seen").exists() else [""]
    return Ran(done.returncode, done.stdout, [call.split("\0") for call in seen[:-1]])


def test_gpu_script_runs_its_sections_in_time(tmp_path: Path) -> None:
    """One that fails and one that runs out of its time take no other along, and files of another day go."""
    out, wheels = tmp_path / "out", tmp_path / "wheels"
    out.mkdir()
    (out / "timings.csv").write_text("of another day\n")
    peer_wheel(wheels)
    done = gpu_sh(tmp_path / "bin", "--limit", "8", "--out", str(out), slow=True, WHEELS=str(wheels))
    lines = [line for line in done.said.splitlines() if re.match(rf"({'|'.join(SECTIONS)}): ", line)]
    assert [line.split(":")[0] for line in lines] == list(SECTIONS)
    for line in lines:
        name = line.split(":")[0]
        want = {"timings": "OUT OF TIME after [23] s. measuring", "large": "FAILED with 3 .* s. 1 failed"}
        assert re.match(f"{name}: {want.get(name, 'ok, .* s. fine, peers: 1')}", line), done.said
    assert "2 sections failed" in done.said
    assert done.code == 1
    assert (out / "summary.txt").read_text() == done.said
    assert {path.name for path in out.iterdir()} == {"log.txt", "summary.txt"}


def test_gpu_script_runs_what_is_named(tmp_path: Path) -> None:
    done = gpu_sh(tmp_path / "bin", "trace", "active", "build", "errors", OUT=str(tmp_path / "out"), CACHE="there")
    assert done.code == 0, done.said
    build, trace, errors, active = done.calls
    assert (build[0], trace[:2]) == ("setup.py", ["bench/timings.py", "--trace"])
    given = command.parser().parse_args(
        ["cpu" if word == "cuda" else word for word in errors[errors.index("bench") + 1 :]]
    )
    assert str(given.cache) == "there"
    assert [case.loss for case in command.todo(given, "cuda")] == ["cross_entropy", *["forward_kl"] * 3]
    assert (active[0], active[-2:]) == ("bench/active.py", ["--rounds", "5"])
    assert active[active.index("--cache") + 1] == "there"


@pytest.mark.parametrize("mistake", [["--wet-run"], ["suites"], ["--limit", "soon"], ["--limit"], ["--out"]])
def test_gpu_script_refuses(mistake: list[str], tmp_path: Path) -> None:
    done = gpu_sh(tmp_path / "bin", *mistake, OUT=str(tmp_path / "out"))
    assert done.code != 0
    assert not done.calls
    assert not (tmp_path / "out").exists()


def cpu_sh(folder: Path, *arguments: str) -> Ran:
    """Run cpu.sh with a Python that records what it is called with and under which instruction set, and fails in one
    section."""
    folder.mkdir()
    (folder / "python").write_text(
        "#!/usr/bin/env bash\n"
        'printf "%s\\0" "$@" "${ATEN_CPU_CAPABILITY:-}" "${ONEDNN_MAX_CPU_ISA:-}" >>"$SEEN"\n'
        'printf "\\n\\0" >>"$SEEN"; [[ "$*" != *2048,2048,32000* ]]\n'
    )
    (folder / "python").chmod(0o755)
    done = run("bench/cpu.sh", *arguments, PYTHON=str(folder / "python"), SEEN=str(folder / "seen"))
    seen = (folder / "seen").read_text().split("\n\0") if (folder / "seen").exists() else [""]
    return Ran(done.returncode, done.stdout, [call.split("\0")[:-1] for call in seen[:-1]])


def test_the_cpu_script_measures_what_the_pages_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each section's command is one that there is; one that fails takes no other along."""
    for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    out = tmp_path / "out"
    done = cpu_sh(tmp_path / "bin", "--out", str(out))
    lines = [re.sub(r", \d+ s$", "", line) for line in done.said.splitlines()]
    assert lines == ["large: ok", "small: FAILED", "avx2: ok", "edges: ok", "threads: ok"]
    assert done.code == 1
    asked = {}
    *benches, threads = done.calls
    for call in benches:
        *words, capability, most = call[call.index("bench") + 1 :]
        options = command.parser().parse_args(words)
        assert (capability, most) == (("avx2", "AVX2") if "avx2" in options.csv else ("", ""))
        assert options.commit == threads[2]
        cases = command.todo(options, "cpu")
        assert all(command._names(options, case) for case in cases)
        asked.setdefault(Path(options.csv).name, set()).update(cases)
    assert (threads[0], threads[3]) == ("bench/threads.py", "--csv")
    for text in PAGES.values():
        for name, shape, dtypes in re.findall(r"table: bench/results/([\w-]+\.csv) (\d+,\d+,\d+) ([\w ]+) -->", text):
            wanted = {(case.shape, case.dtype) for case in asked[name]}
            assert wanted >= {(Shape.parse(shape), dtype) for dtype in dtypes.split()}
    assert {path.name for path in out.iterdir()} == set()
    few = cpu_sh(tmp_path / "few", "threads", "--out", str(out))
    assert (few.code, len(few.calls)) == (0, 1)


@pytest.mark.parametrize("mistake", [["--wet-run"], ["edge"], ["--out"]])
def test_the_cpu_script_refuses(mistake: list[str], tmp_path: Path) -> None:
    done = cpu_sh(tmp_path / "bin", *mistake)
    assert done.code != 0
    assert not done.calls


def test_a_loss_beside_busy_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))  # where the process that is timed finds it too
    threads, summaries = importlib.import_module("threads"), load("summaries")
    case = Case(Shape(16, 8, 32), "float32", "forward_kl", "both", "cpu")
    before = dict(os.environ)
    row = threads.measured(case, 1, "OMP_WAIT_POLICY=passive", 1, 3)
    assert (row.threads, row.busy, row.rounds, row.setting) == (1, 1, 3, "OMP_WAIT_POLICY=passive")
    assert 0 < row.ours_low <= row.ours_ms <= row.ours_high
    assert 0 < row.over_low <= row.over_eager <= row.over_high
    assert dict(os.environ) == before
    plan = list(threads.plan(4))
    assert {busy for _, _, busy in plan} == {0, 4}
    assert {(count, setting) for count, setting, _ in plan} == {
        (1, ""), (2, ""), (4, ""), (8, ""), *((4, name) for name in threads.SETTINGS if name),
    }  # fmt: skip
    monkeypatch.setattr(threads, "measured", lambda _, count, setting, busy, rounds: dataclasses.replace(
        row, threads=count, setting=setting, busy=busy, rounds=rounds))  # fmt: skip
    what = ["--shape", "16,8,32", "--rounds", "4", "--commit", "abc"]
    assert threads.main([*what, "--csv", str(tmp_path / "t.csv")]) == 0
    with (tmp_path / "t.csv").open(newline="") as file:
        head, _, *lines, _, caption = summaries.threads_table(list(csv.DictReader(file))).splitlines()
    cores = len(os.sched_getaffinity(0))
    assert head == f"| ours, and over eager (least to most) | alone | beside {cores} busy processes |"
    assert lines[0].startswith("| 1 thread | ")
    assert re.search(r"medians of 4 rounds; load average before: [\d.]+; .*; commit abc\.$", caption)
    with pytest.raises(SystemExit):
        threads.main(["--rounds", "0"])


class Selected:
    """What a run of pytest would run."""

    items: list[Any]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = session.items


def test_what_the_gpu_script_calls(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its test selections choose tests, its check tells what loads, and its timings run here, tiny."""
    out = tmp_path / "out"
    done = gpu_sh(tmp_path / "bin", "--out", str(out))
    assert len(done.calls) == len(SECTIONS)
    check, _, _, *tests, _ = done.calls
    counts = {}
    assert tests[2] == tests[3]  # memcheck and racecheck
    for call in tests[:3]:
        chosen, words = Selected(), call[2:]
        words[-1] = words[-1].replace(" and cuda", "")  # without a GPU no cell has a backend
        assert pytest.main([*words, "--collect-only", "-qq", "-p", "no:benchmark"], plugins=[chosen]) == 0
        counts[words[-1]] = {item.name for item in chosen.items}
    suite, large, checked = counts.values()
    assert len(suite) > 200
    assert {name.split("[")[0] for name in large} == {"test_more_than_2_to_the_31_logits"}
    assert checked < suite
    assert len(checked) > 0
    assert all("everything" in name and "bfloat16" in name for name in checked)

    dry = gpu_sh(tmp_path / "dry", "--dry-run", "--out", str(out))
    timings, rows, trace = dry.calls[1], dry.calls[2], dry.calls[-1]
    assert load("timings").main([*timings[1:], "--limit", "600"]) == 0  # whatever else this machine does
    said = (out / "bars.txt").read_text()
    assert re.search(r"dft_kernels native .* x floor .* GiB  bar 1.10: (met|MISSED)", said)
    assert "host time of a call" in said
    assert re.search("Liger FLCE +skipped: Liger's Triton kernel needs a GPU", said)
    assert {(r.commit, r.n) for r in tables.read(out / "timings.csv")} == {("abc", 16)}
    if not torch.cuda.is_available():  # there the kernels run on a GPU alone
        assert load("rows").main([*rows[1:], "--vocab", "1024"]) == 0
        table = list(csv.DictReader((out / "rows.csv").open()))
        assert {row["design"] for row in table} == {"cuda lean", "cuda generic"}
        assert all(float(row["apart"]) < 4e-3 for row in table)
    assert load("timings").main([*trace[1:], "--limit", "600"]) == 0
    assert (out / "trace.json.gz").stat().st_size > 1000
    capsys.readouterr()
    for arguments, code, words in (
        (
            [""],
            1,
            "carry the .so files and _build.json of this Python and torch, or name the section build: torch sees",
        ),
        (["1"], 0, "the extensions load"),
    ):
        if torch.cuda.is_available():
            break
        monkeypatch.setattr(sys, "argv", ["-c", *arguments])
        with pytest.raises(SystemExit) as ended:
            exec(check[1], {})
        said = capsys.readouterr().out
        assert (ended.value.code, said.splitlines()[-1][: len(words)]) == (code, words)
        assert "CPU kernels: they load" in said


def test_timings_stop_when_the_time_is_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load("timings").main(["--dry-run", "--limit", "0", "--calls", "1", "--out", str(tmp_path)]) == 1
    assert "cross-entropy: N 16, H 8, V 64, bfloat16, cpu: NOT REACHED" in (tmp_path / "bars.txt").read_text()
    table = {"wants": ValueError("out of memory"), "raises": RuntimeError("no\nmore"), "gone": ImportError("peer")}
    for name, error in table.items():
        one = runs.Seen()
        with load("timings").failing(one):
            raise error
        assert one.status == {"wants": "out of memory", "raises": "failed", "gone": "skipped"}[name]
        assert one.reason in ("ValueError: out of memory", "RuntimeError: no", "not installed (peer)")


def test_the_pages_have_the_tables_of_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert load("readme").main(["--check"]) == 0, capsys.readouterr().out


def test_every_result_is_shown() -> None:
    shown = {source for text in PAGES.values() for source in re.findall(r"bench/results/([\w-]+\.(?:csv|png))", text)}
    kept = [*(ROOT / "bench" / "results").iterdir()]
    assert shown == {path.name for path in kept if path.is_file()}
    assert {path.name for path in kept if path.is_dir()} == {"effect"}  # runs, of which that page's table is made
    assert "kept in bench/results/effect, " in PAGES["docs/effect.md"]


def test_a_stale_table_is_found_and_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """In README.md and in docs/ alike."""
    readme = load("readme")
    (tmp_path / "docs").mkdir()
    (tmp_path / "bench").symlink_to(ROOT / "bench")
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    for path, text in PAGES.items():
        (tmp_path / path).write_text(text.replace("Gemma3-270M, batch 1", "?").replace("dft_kernels | 1.0", "?"))
    assert readme.main(["--check"]) == 1
    assert re.findall(r"tables of (\S+) must", capsys.readouterr().out) == ["README.md", "docs/performance.md"]
    assert readme.main([]) == 0
    assert {path: (tmp_path / path).read_text() for path in PAGES} == PAGES


def test_the_pages_claim_nothing_that_no_table_holds() -> None:
    """Measured quantities stand in tables that come from CSVs; elsewhere only what is not a measurement."""
    known = {"180 MB", "0.5x", "80 GB"}  # a download, a weight, a GPU's name
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


def test_our_peak_is_the_lowest_or_the_table_says_why() -> None:
    readme = load("readme")
    sources = [
        source
        for text in PAGES.values()
        for source in re.findall(r"<!-- table: (\S+\.csv \d+,\d+,\d+ [\w ]+) -->", text)
    ]
    assert set(readme.NOTES) <= set(sources)
    marked = [source for source in sources if "¹" in readme.table(source)]  # ValueError where one lacks its reason
    assert set(marked) == set(readme.NOTES)
    (whole,) = [source for source in sources if "4096,576,49152" in source]
    assert whole not in marked
