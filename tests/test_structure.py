"""The rooms: who may import whom, what an import costs, and that the table of divergences is complete."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dft_kernels
from dft_kernels import divergences
from dft_kernels.backends.formulas import PAIRS

ROOT = Path(dft_kernels.__file__).parent
FLOORS = [
    {"cli"},
    {"demo"},
    {"finetune", "benchmarks"},
    {"evaluation", "generation"},
    {"targets"},
    {"terms"},
    {"modules"},
    {"functional"},
    {"metrics"},
    {"autograd"},
    {"gradients"},
    {"selection", "row_loss", "distributed"},
    {"problem"},
    {"wanted"},
    {"checks"},
    {"mixture"},
    {"backends"},
    {"streams"},
    {"teachers"},
    {"gemm", "divergences", "extension"},
]
SHARED = ("contract.py", "formulas.py", "sparse.py", "rows.py", "kernels.py")  # by the backends, which share no more
ANYWHERE = {"testing", "info"}  # may import any; imported by tests, demo, benchmarks and cli only


def floor(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def imports(path: Path) -> set[str]:
    """Absolute names under dft_kernels that a file imports."""
    package = ("dft_kernels", *path.relative_to(ROOT).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join((*base, *([node.module] if node.module else [])))
            found |= {f"{stem}.{alias.name}" for alias in node.names} | {stem}
    return found


FILES = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    here = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for name in imports(path):
        parts = name.split(".")
        if parts[0] in ("triton", "transformers"):
            assert here in ("finetune", "benchmarks", "demo", "evaluation", "generation", "targets"), name
        if (
            parts[0] != "dft_kernels"
            or len(parts) < 2
            or not ((ROOT / parts[1]).exists() or (ROOT / f"{parts[1]}.py").exists())
        ):
            continue
        there = parts[1]
        if here in ANYWHERE:
            continue
        if there in ANYWHERE:
            assert here in ("cli", "demo", "benchmarks"), f"{path.name} imports {name}"
        elif here != there:
            assert floor(here) < floor(there), f"{path.name} imports {name}, which is not below it"
        elif here == "backends" and path.name not in ("__init__.py", *SHARED):
            assert len(parts) < 3 or f"{parts[2]}.py" in SHARED, f"{path.name} imports {name}"


def test_triton_ops_knows_torch_and_triton_only() -> None:
    rooms = sorted((ROOT.parent / "triton_ops").glob("*.py"))
    assert rooms
    for path in rooms:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [str(node.module)]
            for name in names:
                assert name.split(".")[0] in {"torch", "triton", *sys.stdlib_module_names}, f"{path.name}: {name}"
        assert len(path.read_text().splitlines()) <= 400, path.name


def test_import_is_light() -> None:
    code = "import sys, dft_kernels; print([m for m in ('triton', 'transformers', 'matplotlib') if m in sys.modules])"
    # torch itself may load triton where it is installed; only what it does not load is ours to avoid
    base = "import sys, torch; print([m for m in ('triton', 'transformers', 'matplotlib') if m in sys.modules])"
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


def test_every_public_name_is_documented() -> None:
    for name in dft_kernels.__all__:
        assert getattr(dft_kernels, name).__doc__


def test_files_stay_small() -> None:
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 400, path.name
