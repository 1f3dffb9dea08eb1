"""The Triton backend beyond the shared suite: its availability, its offsets, its order, and what it compiles to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import CASES, PRESENT

import dft_kernels as dk
from dft_kernels import divergences
from dft_kernels.backends import triton as backend
from dft_kernels.backends.contract import Row

pytestmark = pytest.mark.skipif("triton" not in PRESENT, reason="triton is not installed, or there is a GPU to run on")
TESTS = Path(__file__).parent.parent


def without_interpreter(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{TESTS.parent}{os.pathsep}{TESTS}"
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, **options)


def test_rows_and_divergences_have_the_same_names() -> None:
    from triton_ops import STATISTICS, row_kernel
    from triton_ops.divergences import DIVERGENCES

    assert set(DIVERGENCES) == set(divergences.TABLE)
    assert len(Row) == STATISTICS
    for row in Row:
        assert getattr(row_kernel, row.name).value == row
        if row <= Row.AGREEMENT:
            assert getattr(row_kernel, f"HAS_{row.name}").value == 1 << row


def test_unavailable_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import torch, dft_kernels as dk\n"
        "dk.linear_cross_entropy(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2).long(), backend='triton')"
    )
    done = without_interpreter(["-c", code])
    assert (
        "ValueError: linear_cross_entropy: backend must be available for torch.float32 on cpu, got 'triton': its "
        "kernels run on a GPU; on the CPU only under Triton's interpreter (TRITON_INTERPRET=1), for tests. Use "
        'backend="auto".' in done.stderr
    )
    hidden, weight, target = torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2).long()
    with pytest.raises(ValueError, match="float64 on cpu, got 'triton': its kernels compute in float32"):
        dk.linear_cross_entropy(hidden.double(), weight.double(), target, backend="triton")
    with pytest.raises(ValueError, match="not on meta"):
        dk.linear_cross_entropy(hidden.to("meta"), weight.to("meta"), target.to("meta"), backend="triton")
    monkeypatch.setattr(backend, "TRITON", False)
    with pytest.raises(ValueError, match=r"triton is not installed \(pip install triton\)"):
        dk.linear_cross_entropy(hidden, weight, target, backend="triton")


def test_auto_does_not_choose_the_interpreter() -> None:
    assert "triton" not in dk.backends.fitting(torch.device("cpu"), torch.float32)


def test_offsets_are_64_bit() -> None:
    """Two rows 2^31 numbers apart, of which only the pages that are touched exist."""
    from triton_ops import Rows, accumulate_columns, probabilities, row_step

    apart, vocab = 2**31, 700
    memory = torch.empty(apart + vocab, dtype=torch.bfloat16)
    logits = memory.as_strided((2, vocab), (apart, 1))
    logits.copy_(torch.randn(2, vocab))
    out = torch.empty(apart + vocab, dtype=torch.bfloat16).as_strided((2, vocab), (apart, 1))
    cotangents = torch.zeros(6, 2)
    cotangents[Row.LSE] = 1.0  # whose gradient is q
    statistics = row_step(Rows(logits), 1 << Row.LSE, 1 << Row.LSE, cotangents, None, out)
    exact = logits.float().softmax(-1)
    torch.testing.assert_close(out.float(), exact, rtol=8e-3, atol=0)
    torch.testing.assert_close(probabilities(Rows(logits), statistics), exact)
    columns = torch.zeros(1, vocab)
    accumulate_columns(Rows(logits), statistics, None, columns)
    torch.testing.assert_close(columns[0], exact.sum(0))


@pytest.mark.parametrize("groups", [1, 5])
def test_column_sums(groups: int) -> None:
    """Into what is there, rows of weight 0 unread, empty groups, and the same bits every time."""
    from triton_ops import Rows, accumulate_columns, row_statistics

    count, vocab = 37, 600
    logits, weight = torch.randn(count, vocab), torch.rand(count)
    weight[3] = 0.0
    logits[3] = torch.nan
    group = None if groups == 1 else torch.randint(0, groups - 1, (count,))  # the last one has no rows
    rows = Rows(logits, scale=0.5, cap=3.0, group=group)
    statistics = row_statistics(rows, 0, 0)
    sums = []
    for _ in range(2):
        columns = torch.ones(groups, vocab)
        accumulate_columns(rows, statistics, weight, columns)
        sums.append(columns)
    assert torch.equal(*sums)
    q = (3.0 * torch.tanh(logits * 0.5 / 3.0)).softmax(-1)
    q[3] = 0.0
    share = torch.zeros(count, groups)
    share[torch.arange(count), 0 if group is None else group] = weight
    torch.testing.assert_close(sums[0], 1.0 + share.t() @ q)


@pytest.mark.kept(where=lambda architecture: architecture == 90)
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_what_kernels_compile_to(architecture: int) -> None:
    """Every specialisation that the table of cases launches: nothing spills, and logits are read 16 bytes at a time
    where V is divisible by 16, as the vocabularies of models are, and where the row has memory to read on to that, as
    that of a workspace has. (The kernel of probabilities has too few a thread,
    and columns are gathered one by one.)"""
    from triton_ops import launch

    done = without_interpreter([str(TESTS / "triton_resources.py"), str(architecture)])
    assert done.returncode == 0, done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    rows = [entry for entry in compiled if entry["kernel"] == "row_kernel"]
    assert {entry["constants"]["PAIR"] for entry in rows} == {None, *divergences.TABLE}
    assert {(bool(entry["constants"]["WANTED"]), entry["constants"]["GRADIENT"]) for entry in rows} == {
        (True, True),
        (True, False),
        (False, True),
    }
    products = [entry for entry in compiled if entry["kernel"] in ("dhidden_kernel", "dweight_kernel")]
    assert {(entry["kernel"], entry["types"]["columns"]) for entry in products} == {
        (kernel, dtype) for kernel in ("dhidden_kernel", "dweight_kernel") for dtype in ("*bf16", "*fp32")
    }
    for entry in products:
        assert entry["spilled"] <= 1024, entry  # around the loop
        assert entry["shared"] <= launch.PRODUCT_MEMORY, entry
        assert entry["copies"] > 0, entry
        assert (entry["products"] > 0) == (entry["types"]["columns"] == "*bf16"), entry
    for entry in compiled:
        if entry not in products:
            assert entry["spilled"] == 0, entry
            assert entry["registers"] <= 96, entry
            assert entry["shared"] <= 8192, entry  # 28 programs a multiprocessor
    few = ("probability_kernel", "gather_kernel")
    even = [entry for entry in compiled if entry["even"] and entry["kernel"] not in few]
    assert len(even) > 70
    for entry in even:
        assert entry["wide_loads"] > 0, entry


KERNELS = {
    "row_kernel", "probability_kernel", "column_kernel", "scale_kernel", "spread_kernel", "gather_kernel",
    "dhidden_kernel", "dweight_kernel",
}  # fmt: skip
FEW = ["everything", "every_statistic", "active", "scaled", "columns"]


@pytest.mark.kept(where=lambda cases: cases == FEW)
@pytest.mark.parametrize("cases", [FEW, list(CASES)], ids=["few", "table"])
def test_compiled_kernels(cases: list[str]) -> None:
    """What Triton compiles for sm_90, executed on the CPU: within the gate of the table of cases."""
    done = without_interpreter([str(TESTS / "triton_on_host.py"), *cases])
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(said) == 2 * len(cases)
    assert [line for line in said if line["wrong"]] == []
    if cases == FEW:
        assert set().union(*(line["launched"] for line in said)) == KERNELS
