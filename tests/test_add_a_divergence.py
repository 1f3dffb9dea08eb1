"""docs/divergence.md does what it says: its changes fit the tree, and what they add is right in every language."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dft_kernels

ROOT = Path(dft_kernels.__file__).parent.parent
CHANGE = re.compile(r"^```diff\n--- (\S+)\n(.*?)^```$", re.M | re.S)
PARTS = ("dft_kernels", "triton_ops", "csrc")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, without what was compiled of them, and with the page's changes."""
    at = tmp_path_factory.mktemp("tree")
    for name in PARTS:
        shutil.copytree(ROOT / name, at / name, ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__"))
    changes = CHANGE.findall((ROOT / "docs" / "divergence.md").read_text())
    assert {file.split("/")[0] for file, _ in changes} == set(PARTS)
    for file, body in changes:
        lines = body.splitlines()
        assert all(line[:1] in {"+", "-", " ", ""} for line in lines), file
        old, new = ("\n".join(line[1:] for line in lines if line[:1] != left_out) for left_out in "+-")
        text = (at / file).read_text()
        assert text.count(old) == 1, (file, old)  # where a change belongs is never in doubt
        (at / file).write_text(text.replace(old, new))
    return at


def run(tree: Path, *command: str, timeout: float = 300, **more: str) -> str:
    """What a command prints, in the copy and with its packages."""
    environment = {**os.environ, "PYTHONPATH": str(tree), **more}
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=timeout, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


COMPARED = """
import torch
from dft_kernels import TopK, divergences, linear_distribution_loss
from dft_kernels.testing import dense_loss, relative_error

assert divergences.triangular() == divergences.Divergence("triangular")
torch.manual_seed(0)
hidden, weight, far = torch.randn(7, 8), torch.randn(50, 8), 3 * torch.randn(7, 50)
near = hidden @ weight.T + 0.01 * torch.randn(7, 50)
masked = far.clone()
masked[:, ::3], at = -torch.inf, {"teacher_temperature": 1.0}
top = far.log_softmax(-1).topk(5)
teachers = {"far": far, "near": near, "masked": masked, "top": TopK(top.indices, top.values)}
for backend in ("reference", "triton"):
    for name, teacher in teachers.items():
        found = []
        for function, more, dtype in (
            (linear_distribution_loss, {"backend": backend}, torch.float32), (dense_loss, {}, torch.float64)
        ):
            inputs = [one.to(dtype).requires_grad_() for one in (hidden, weight)]
            loss = function(*inputs, teacher=teacher, divergence="triangular", temperature=1.5, **at, **more)
            found.append([loss, *torch.autograd.grad(loss, inputs)])
        errors = [relative_error(*pair) for pair in zip(*found, strict=True)]
        assert max(errors) < (3e-4 if name == "near" else 3e-5), (backend, name, errors)  # near: by its condition
        print(backend, name)
"""


def test_python_and_triton(tree: Path) -> None:
    """Against the oracle in float64, by autograd of the textbook formula that the page adds."""
    out = run(tree, sys.executable, "-W", "ignore", "-c", COMPARED, TRITON_INTERPRET="1")
    assert len(out.splitlines()) == 8


PAIRS = """
#include <cstdio>
#include "cuda/arithmetic.h"
template <class T>
void pair(double lp, double lq) {
  T f, g;
  dft::Triangular<dft::cuda::Math<T>>::eval(T(lp), T(lq), T(std::exp(lq)), T(0), f, g);
  std::printf("%.17g %.17g ", double(f), double(g));
}
int main() {
  static_assert(dft::kDivergences == 9);
  double lp, lq;
  while (std::scanf("%lf %lf", &lp, &lq) == 2) pair<double>(lp, lq), pair<float>(lp, lq), std::puts("");
}
"""


def compiled(tree: Path, out: Path, *sources: str | Path) -> str:
    """The program of these sources, by the compiler that the package is built with."""
    flags = ["-std=c++20", "-O1", "-w", "-DDFT_ISA=baseline", "-Icsrc"]
    run(tree, os.environ.get("CXX", "c++"), *flags, *map(str, sources), "-o", str(out))
    return str(out)


def test_cpp_pairs(tree: Path, tmp_path: Path) -> None:
    """f and g of single numbers, in double and float, from agreement to far apart and to probabilities of 0."""
    source = tmp_path / "pairs.cpp"
    source.write_text(PAIRS)
    program = compiled(tree, tmp_path / "pairs", source)
    logs = [-0.1, -0.1000001, -3.0, -12.0, -60.0, -torch.inf]
    inputs = [(lp, lq) for lp in logs for lq in logs]
    given = "\n".join(f"{lp} {lq}" for lp, lq in inputs)
    done = subprocess.run([program], input=given, capture_output=True, text=True, timeout=60)
    for (lp, lq), line in zip(inputs, done.stdout.splitlines(), strict=True):
        p, q = torch.tensor([lp, lq], dtype=torch.float64).exp()
        q.requires_grad_()
        f, g = torch.zeros(()), 0.0
        if p + q > 0:
            f = 0.5 * (p - q) ** 2 / (p + q)
            g = float(q.detach() * torch.autograd.grad(f, q)[0])
        exact = [float(f.detach()), g] * 2
        found = [float(word) for word in line.split()]
        assert found[:2] == pytest.approx(exact[:2], rel=1e-8, abs=1e-300), (lp, lq)
        if abs(lp - lq) > 1e-3 or lp == lq:  # nearer, the logs themselves are not floats
            assert found[2:] == pytest.approx(exact[2:], rel=1e-5, abs=1e-25), (lp, lq)


def test_cpp_rows(tree: Path, tmp_path: Path) -> None:
    """The CPU's row kernels of all divergences, compiled for the baseline processor: floats beside doubles."""
    sources = tree / "csrc" / "cpu" / "rows.cpp", ROOT / "tests" / "other_cpus" / "check_rows.cpp"
    out = run(tree, compiled(tree, tmp_path / "rows", *sources))
    assert len(re.findall(r"^triangular ", out, re.M)) >= 3


@pytest.mark.full
def test_the_whole_build(tree: Path, tmp_path: Path) -> None:
    """Built as the page says, every test of the new divergence passes on every backend of this machine."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "tests", tree / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    build, tests = ["setup.py", "-q", "build_ext", "--inplace"], ["tests/backends", "tests/loss", "-k", "triangular"]
    run(tree, sys.executable, *build, timeout=3000, DFT_KERNELS_CPU="1")
    out = run(tree, sys.executable, "-m", "pytest", "-p", "no:benchmark", "-o", "addopts=", *tests, timeout=3000)
    assert int(re.findall(r"(\d+) passed", out)[0]) > 50
