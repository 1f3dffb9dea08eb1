"""Every case, every backend present, against the float64 oracle and its error gate."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, PRESENT, compare, make, present

from dft_kernels.backends import BACKENDS
from dft_kernels.backends.contract import Backward, Chunk
from dft_kernels.loss.build import build
from dft_kernels.loss.options import Function
from dft_kernels.loss.problem import loss_terms
from dft_kernels.loss.row_loss import loss_cotangents
from dft_kernels.loss.selection import select_rows
from dft_kernels.teachers.contract import DenseTarget

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SERVED = [
    pytest.param(backend, dtype, id=f"{backend}-{str(dtype)[6:]}") for dtype in DTYPES for backend in present(dtype)
]


def _kept(case: str, backend: str, dtype: torch.dtype) -> bool:
    """The interpreter's kernels, ten times slower, in one dtype a case, as they compute in fp32 whatever they load; and
    not in the one case that takes a minute."""
    return backend != "triton" or (DTYPES[[*CASES].index(case) % 3] == dtype and case != "low_rank_wide")


@pytest.mark.kept(where=_kept)
@pytest.mark.parametrize(("backend", "dtype"), SERVED)
@pytest.mark.parametrize("case", CASES)
def test_case(case: str, backend: str, dtype: torch.dtype) -> None:
    compare(CASES[case], dtype, backend)


# the loop over chunks is one for all backends that work by rows
@pytest.mark.kept(where=lambda backend, chunk_size: backend != "triton" or chunk_size == 7)
@pytest.mark.parametrize("backend", PRESENT)
@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
@pytest.mark.parametrize(
    "case",
    ["everything", "none", "no_compact", "stream", "row_weight", "topk_everything", "mixture", "low_rank_odd"],
)
def test_chunk_size_changes_nothing(case: str, chunk_size: int, backend: str) -> None:
    compare(CASES[case], torch.float32, backend, chunk_size=chunk_size)
    compare(CASES[case], torch.bfloat16, backend, chunk_size=chunk_size)


@pytest.mark.parametrize("backend", PRESENT)
@pytest.mark.parametrize("case", ["everything", "reverse_kl", "label_smoothing", "z_loss", "skew_kl"])
@torch.no_grad()
def test_the_halves_are_the_step(case: str, backend: str) -> None:
    """chunk_statistics and chunk_gradient, between which a reduction may stand, do what chunk_step does."""
    arguments = make(CASES[case], torch.bfloat16)
    given = [arguments.pop(name, None) for name in ("hidden", "weight", "target", "teacher")]
    problem = build(Function("test"), *given, arguments)
    terms, selection = problem.terms(loss_terms(problem)), select_rows(problem)
    rows = selection.blocks(16)[0]
    assert problem.target is not None
    chunk = Chunk(
        rows.take(problem.hidden.detach()),
        rows.take(problem.target),
        None if selection.group is None else rows.take(selection.group),
        None if selection.weight is None else rows.take(selection.weight),
        None
        if problem.teacher_hidden is None
        else DenseTarget(rows.take(problem.teacher_hidden), problem.teacher_head),
    )
    cotangents = loss_cotangents(problem, chunk.hidden, chunk.weight)
    chosen, outcomes = BACKENDS[backend], []
    for whole in (True, False):
        assert problem.weight is not None
        backward = Backward(
            cotangents,
            torch.full_like(chunk.hidden, torch.nan),
            torch.full(problem.weight.shape, torch.nan),
            None,
            first=True,
            last=True,
        )
        workspace = chosen.workspace(16, problem.vocab, chunk.hidden, terms, gradient=True)
        if whole:
            found = chosen.chunk_step(workspace, chunk, None, backward)
        else:
            found = chosen.chunk_statistics(workspace, chunk, None)
            chosen.chunk_gradient(workspace, chunk, found, backward)
        outcomes.append((found.rows[sorted(terms.wanted)], backward.dhidden, backward.dweight))
    for step, halves in zip(*outcomes, strict=True):
        torch.testing.assert_close(step, halves, rtol=1e-2 if step.dtype == torch.bfloat16 else 1e-5, atol=2e-4)
