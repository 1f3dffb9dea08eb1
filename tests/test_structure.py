"""The packages: who may import whom, what an import costs, and that the table of divergences is complete."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

import dft_kernels
from dft_kernels import divergences
from dft_kernels.backends.formulas import PAIRS

ROOT = Path(dft_kernels.__file__).parent
FLOORS = (  # from the top: a package imports from floors below its own, and itself
    {"commands"},
    {"play"},
    {"training", "benchmarks"},
    {"evaluation"},
    {"generation"},
    {"materials"},
    {"terms", "targets"},
    {"store"},
    {"models"},
    {"loss"},
    {"distributed"},
    {"backends"},
    {"teachers"},
    {"divergences"},
    {"files"},
    {"errors", "dtypes"},
)
ANYWHERE = {"testing", "info", "doctor"}  # may import any; imported by tests, benchmarks and commands only
WITH_TRANSFORMERS = {"commands", "play", "training", "benchmarks", "evaluation", "generation", "materials", "models"}
SHARED = (  # by the backends
    "contract", "formulas", "sparse", "rows", "kernels", "gemm", "extension", "sources", "exponentials", "active",
    "sketch",
)  # fmt: skip
FILES = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


def module(path: Path) -> str:
    """dft_kernels.package.file, or dft_kernels.package of its __init__."""
    parts = ("dft_kernels", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it; of this package by file."""
    package = ("dft_kernels", *path.relative_to(ROOT).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join((*base, *([node.module] if node.module else [])))
            inside = {f"{stem}.{alias.name}" for alias in node.names} & set(MODULES)
            found |= inside | ({stem} if len(inside) < len(node.names) else set())
    return found


def floor(package: str) -> int:
    return next(number for number, those in enumerate(FLOORS) if package in those)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    here = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert here in ANYWHERE or floor(here) >= 0
    for name in imports(path):
        parts = name.split(".")
        if parts[0] in ("triton", "transformers"):
            assert here in WITH_TRANSFORMERS, f"{path.name} imports {name}"
        if parts[0] != "dft_kernels" or here in ANYWHERE:
            continue
        if len(parts) == 1:  # its version alone
            assert here in ("commands", "training", "benchmarks", "evaluation", "generation", "targets"), (
                f"{path.name}: imports itself"
            )
            continue
        there = parts[1]
        if there in ANYWHERE:
            assert here in ("commands", "benchmarks"), f"{path.name} imports {name}"
        elif here != there:
            assert floor(here) < floor(there), f"{path.name} imports {name}, which is not below it"
        elif here == "backends" and path.stem not in ("__init__", *SHARED):
            assert len(parts) == 3, f"{path.name} imports {name}"
            assert parts[2] in SHARED, f"{path.name} imports {name}"


def test_what_opens_a_connection_is_on_the_security_page() -> None:
    """Every file that starts a program or takes a library that can ask a network, and what for in the page's words."""
    page = (ROOT.parent / "docs" / "security.md").read_text()
    asks = {
        "commands/evaluate.py": "`--model NAME`",
        "evaluation/retention.py": "`evaluate --retention TASK`",
        "generation/vllm_engine.py": "`evaluate --engine vllm`",
        "generation/vllm_steps.py": "`--model NAME`",
        "materials/encoders.py": "the wheel's sha256",
        "materials/models.py": "the wheel's sha256",
        "materials/records.py": "`hf:NAME`",
        "materials/sources.py": "`--model NAME`",
        "materials/texts.py": "`target presets`",
        "teachers/served_client.py": "`ServedTeacher(url)`",
    }
    here = {  # on this machine
        "benchmarks/runs.py": "git, and workers",
        "doctor.py": "nvcc --version",
        "commands/play.py": "the page",
        "play/page.py": "the page",
    }
    network = page.split("## Network")[1].split("## dft-kernels play")[0]
    assert [words for words in asks.values() if words not in network] == []
    found = {path.relative_to(ROOT).as_posix() for path in FILES if connects(path)}
    assert found == {*asks, *here}


def connects(path: Path) -> bool:
    able = (
        *("subprocess", "socket", "asyncio", "ssl", "urllib.request", "http", "ftplib", "smtplib", "httpx", "requests"),
        *("aiohttp", "huggingface_hub", "datasets", "lm_eval", "vllm", "gradio", "uvicorn"),
    )
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    named = {
        one.value for call in calls for one in call.args if isinstance(one, ast.Constant)
    }  # import_module("lm_eval")
    methods = {call.func.attr for call in calls if isinstance(call.func, ast.Attribute)}
    return bool(
        {"from_pretrained", "push_to_hub", "system", "popen"} & methods
        or [name for name in imports(path) | named for one in able if f"{name}.".startswith(f"{one}.")]
    )


def test_no_circle() -> None:
    """File by file, within packages too: TopologicalSorter raises CycleError with the files of one."""
    arrows = {name: imports(path) & set(MODULES) - {name} for name, path in MODULES.items()}
    assert len(list(TopologicalSorter(arrows).static_order())) == len(MODULES)


def test_triton_ops_knows_torch_and_triton_only() -> None:
    files = sorted((ROOT.parent / "triton_ops").glob("*.py"))
    assert files
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [str(node.module)]
            for name in names:
                assert name.split(".")[0] in {"torch", "triton", *sys.stdlib_module_names}, f"{path.name}: {name}"


def test_kernels_know_no_torch() -> None:
    """The CUDA kernels and what they share with the CPU's include no header of torch: only the bindings do."""
    sources = [p for p in sorted((ROOT.parent / "csrc").rglob("*")) if p.suffix in (".cu", ".cuh")]
    sources += [ROOT.parent / "csrc" / name for name in ("common/divergence.h", "common/element.h", "cuda/gpu.h")]
    for path in sources:
        included = [line for line in path.read_text().splitlines() if line.startswith("#include")]
        assert not [line for line in included if "torch" in line or "ATen" in line or "c10" in line], path


def test_the_package_alone_imports_nothing() -> None:
    """So that `dft-kernels --help` is at once, and dft-kernels doctor runs where torch does not."""
    code = "import sys, dft_kernels, dft_kernels.commands.main as m; m.main([]); print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == "False"


def test_every_public_name_is_imported_from_where_type_checkers_look() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text())
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: one.module for one in checked.body for alias in one.names}  # type: ignore[attr-defined]
    assert seen == {**dict.fromkeys(dft_kernels._PACKAGES), **dft_kernels._WHERE}
    assert sorted(seen) == dft_kernels.__all__


def test_import_is_light() -> None:
    heavy = "print([name for name in ('triton', 'transformers', 'matplotlib') if name in sys.modules])"
    code = f"import sys; from dft_kernels import TopK, linear_cross_entropy; {heavy}"
    base = f"import sys, torch; {heavy}"  # torch itself may load triton; only what it does not load is ours to avoid
    ours, torchs = (
        subprocess.run([sys.executable, "-c", c], capture_output=True, text=True, check=True).stdout
        for c in (code, base)
    )
    assert ours == torchs


def test_table_is_complete() -> None:
    assert set(PAIRS) == set(divergences.TABLE)
    assert sorted(entry.id for entry in divergences.TABLE.values()) == list(range(len(divergences.TABLE)))
    for name, entry in divergences.TABLE.items():
        made = getattr(divergences, name)()
        assert (made.name, made.parameter) == (name, entry.default)
        assert entry.admits(entry.default)
        assert entry.source
        log_p, log_q = torch.tensor([0.0, -torch.inf]), torch.tensor([0.5, 0.5]).log()
        for parameter in (entry.default, *((-0.5, 2.0) if name == "alpha_divergence" else ())):
            finite = bool(PAIRS[name].value(log_p, log_q, parameter).sum().isfinite())
            assert entry.finite_at_zero(parameter) == finite, (name, parameter)


def test_public_names_are_there_and_documented() -> None:
    assert {*dft_kernels.__all__} <= {*dir(dft_kernels)}
    for package in (dft_kernels, dft_kernels.terms, dft_kernels.targets, dft_kernels.divergences):
        for name in package.__all__:
            assert getattr(package, name).__doc__, f"{package.__name__}.{name}"
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_ours'"):
        dft_kernels.nothing_of_ours  # noqa: B018


def test_files_stay_small() -> None:
    """400 lines; more only where the head of the file says why."""
    ours = [ROOT.parent / name for name in ("dft_kernels", "triton_ops", "csrc", "tests")]
    kinds = (".py", ".cpp", ".cu", ".cuh", ".h", ".inc")
    for path in sorted(p for folder in ours for p in folder.rglob("*") if p.suffix in kinds):
        lines = path.read_text().splitlines()
        if len(lines) > 400:
            assert any("over 400 lines" in line for line in lines[:12]), f"{path}: {len(lines)} lines"
