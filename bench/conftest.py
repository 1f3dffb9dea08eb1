"""Options of the microbenchmarks: which shapes, dtypes and device."""

from __future__ import annotations

import pytest
import torch

from dft_kernels.benchmarks.problems import LOSSES, PARTS, Case, Shape


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("losses")
    group.addoption("--shape", nargs="+", default=["512,576,49152", "512,2048,32000"], help="N,H,V ...")
    group.addoption("--dtype", nargs="+", default=["bfloat16", "float32"])
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--rounds", type=int, default=5)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        option = metafunc.config.getoption
        cases = [
            Case(Shape.parse(shape), dtype, loss, part, option("--device"))
            for shape in option("--shape")
            for dtype in option("--dtype")
            for loss in LOSSES
            for part in PARTS
        ]
        names = ["-".join([c.loss, c.part, c.dtype, "x".join(map(str, c.shape))]) for c in cases]
        metafunc.parametrize("case", cases, ids=names)
