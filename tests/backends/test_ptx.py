"""The CUDA backend as nvcc compiles it for sm_90a, on the CPU (tests/ptx_on_host): against the oracle, and against the
same kernels compiled from their source for the CPU."""

from __future__ import annotations

import shutil
from typing import Any

import ptx_on_host
import pytest
import torch
from cases import CASES, Case, compare
from ptx_on_host.translate import UnknownPtxError, entries_of
from test_exponentials import ADDED, aligned
from test_lean import LEAN, steps

from dft_kernels.backends import BACKENDS, extension
from dft_kernels.backends.contract import Row
from dft_kernels.backends.cuda import CudaBackend

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run on"),
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc"),
]
WIDE, HALF, NARROW = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def source(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernels compiled from their source, in whose place the others are. reverse_threads is of both: they have one
    machine."""
    kernels = extension.CUDA
    monkeypatch.setattr(extension, "CUDA", ptx_on_host.load())
    for name in ("generic", "lean", "exponential"):
        monkeypatch.setitem(BACKENDS, name, CudaBackend(name))
    yield kernels
    kernels.reverse_threads(False)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", ADDED, ids=lambda case: case.name)
def test_exponentials(case: Case, reverse: bool, source: Any) -> None:
    source.reverse_threads(reverse)
    compare(aligned(case), NARROW, "exponential")


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("rows", [1, 300])
def test_each_tile_of_the_product(rows: int, cap: float | None, source: Any) -> None:
    """Tiles that the matrix fills in part, several a block: what csrc/cuda/exponentials.h promises of each, of a row
    beyond the range too, and nothing beside them."""
    vocab, width = 1032, 136
    g = torch.Generator().manual_seed(rows)
    hidden, weight = (torch.randn(n, width, generator=g).to(NARROW) for n in (rows, vocab))
    weight /= width**0.5
    label = torch.randint(-1, vocab, (rows,), generator=g)
    shift = torch.randn(rows, generator=g)
    shift[-1] = -200.0
    outs = [torch.full((rows, vocab + 8), 7.0, dtype=NARROW) for _ in range(2)]
    ours, theirs = (
        kernels.exponentials(hidden, weight, None, shift, label.float(), 0.7, cap, cap is not None, out[:, :vocab])
        for kernels, out in zip((extension.CUDA, source), outs, strict=True)
    )
    torch.testing.assert_close(outs[0], outs[1], rtol=8e-3, atol=0)
    assert (ours[0].sum(0) >= extension.CUDA.BAD_TOTAL).nonzero().flatten().tolist() == [rows - 1]
    assert (outs[0][label >= 0, label[label >= 0]] == 0).all()
    for got, expected in zip(ours, theirs, strict=True):
        assert (got is None) == (expected is None) == (cap is None and got is not ours[0])
        if got is not None:
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.kept(where=lambda case, design: (case, design) in {("everything", "generic"), ("topk_scaled", "cuda")})
@pytest.mark.parametrize("design", ["generic", "cuda"])
@pytest.mark.parametrize("case", CASES)
def test_the_table_of_cases(case: str, design: str) -> None:
    n, h, v = CASES[case].shape
    for dtype in (WIDE, NARROW):
        compare(CASES[case]._replace(shape=(n, h, 16 * -(-v // 16))), dtype, design)


@pytest.mark.kept(where=lambda name, vocab: (name, vocab) in {(None, 128_256), ("forward_kl", 40_000)})
@pytest.mark.parametrize(("vocab", "blocks"), [(1000, (1, 1)), (40_000, (4, 4)), (128_256, (8, 8)), (151_936, (8, 16))])
@pytest.mark.parametrize("name", LEAN)
def test_rows_of_real_vocabularies(name: str | None, vocab: int, blocks: tuple[int, int], source: Any) -> None:
    """A row in the clusters that a GPU would give it, of 512 threads a block."""
    hows = (
        ((WIDE, NARROW, NARROW), {"in_place": True}),
        ((WIDE, WIDE, HALF), {"in_place": True, "T": 1.7, "scale": 0.8, "cap": 5.0}),
        ((NARROW, NARROW, NARROW), {"T": 2.0, "broken": True}),
    )
    for i, (dtypes, how) in enumerate(hows):
        source.reverse_threads(i == 1)
        ours = steps("lean", vocab, name, dtypes, **how)
        assert source.cluster_blocks() == blocks[name is not None]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(extension, "CUDA", source)
            exact = steps("generic", vocab, name, dtypes, **how)
        torch.testing.assert_close(ours[0], exact[0], rtol=3e-5, atol=3e-6, equal_nan=True)
        rounding = 1e-3 if dtypes[2] == HALF else 8e-3
        torch.testing.assert_close(ours[1], exact[1], rtol=rounding, atol=rounding / 100, equal_nan=True)


def test_columns_and_scaling(source: Any) -> None:
    """In rows 2^31 numbers apart, of which only the pages that are touched exist; gradients of any dtype."""
    apart, vocab = 2**31, 700
    logits = torch.empty(apart + vocab, dtype=NARROW).as_strided((2, vocab), (apart, 1))
    logits.copy_(torch.randn(2, vocab))
    exact = logits.float().softmax(-1)
    statistics = source.row_statistics(source.Rows(logits=logits), 1 << Row.LSE, 0)
    rows = extension.CUDA.Rows(logits=logits)
    torch.testing.assert_close(extension.CUDA.probabilities(rows, statistics), exact)
    columns = torch.zeros(1, vocab)
    extension.CUDA.accumulate_columns(rows, statistics, None, columns)
    torch.testing.assert_close(columns[0], exact.sum(0))
    for dtype in (WIDE, NARROW, HALF, torch.float64):
        x = torch.randn(70, 100).to(dtype)
        ours = x.clone()
        for factor in (1.0, 3.0):
            extension.CUDA.scale(ours, torch.tensor([factor], dtype=torch.promote_types(dtype, WIDE)))
        assert torch.equal(ours, 3.0 * x)


@pytest.mark.parametrize(
    "instruction",
    ["sqrt.rn.f32 %f1, %f1", "ld.u32 %r1, [%rd1]", "mul.rz.f32 %f1, %f1, %f1", "setp.nan.f32 %p1, %f1, %f1"],
)
def test_an_instruction_that_is_not_translated_is_refused(instruction: str) -> None:
    text = (
        ".entry k(.param .u64 k_param_0)\n{\n.reg .f32 %f<2>;\n.reg .b32 %r<2>;\n.reg .b64 %rd<2>;\n.reg .pred %p<2>;\n"
    )
    (entry,) = entries_of(f"{text}ld.param.u64 %rd1, [k_param_0];\nret;\n}}\n")
    assert "ld_of<uint64_t>((uint64_t(parameters[0]) + 0), R.rd[1])" in entry.source
    with pytest.raises(UnknownPtxError, match=instruction.split()[0]):
        list(entries_of(f"{text}{instruction};\nret;\n}}\n"))
