"""Every case of the table over a divided vocabulary, in two and four processes, within the same gate, and of the same
bits in all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases import CASES, PRESENT
from divided import run
from two_processes import on

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo")


def table_of_two(folder: Path) -> None:
    for number, case in enumerate(CASES):
        run(
            case,
            torch.float32,
            "native" if "native" in PRESENT else "reference",
            "odd",
            chunk_size=(None, 10)[number % 2],
        )
        run(case, torch.bfloat16, "reference", "even", chunk_size=(10, None)[number % 2])


def table_of_four(folder: Path) -> None:
    for number, case in enumerate(CASES):
        run(case, torch.float32, "reference", "odd", chunk_size=(10, None)[number % 2])
        if "native" in PRESENT:
            run(case, torch.bfloat16, "native", "even", chunk_size=(None, 10)[number % 2])


def doubles_of_two(folder: Path) -> None:
    for case in CASES:
        run(case, torch.float64, "reference", "odd")
        if "native" in PRESENT:
            run(case, torch.float64, "native", "odd", chunk_size=7)


KERNEL_CASES = (
    *("everything", "every_statistic_rows", "topk_everything", "near_forward_kl", "near_jensen_shannon"),
    *("reverse_kl", "low_rank_topk", "topk_capped"),
)


def kernels_of_two(folder: Path) -> None:
    """The GPU kernels, emulated."""
    for case in KERNEL_CASES:
        for backend in (name for name in ("triton", "cuda") if name in PRESENT):
            run(case, torch.float32, backend, "odd", chunk_size=10)


def test_two_processes(tmp_path: Path) -> None:
    on(2, __file__, tmp_path, "table_of_two")


def test_four_processes(tmp_path: Path) -> None:
    on(4, __file__, tmp_path, "table_of_four")


@pytest.mark.full
def test_in_double_precision(tmp_path: Path) -> None:
    on(2, __file__, tmp_path, "doubles_of_two")


def test_the_kernels_of_gpus(tmp_path: Path) -> None:
    on(2, __file__, tmp_path, "kernels_of_two", emulated=True)
