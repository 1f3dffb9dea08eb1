"""Every case, every backend present, against the float64 oracle and its error gate."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, PRESENT, compare

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("backend", PRESENT)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES)
def test_case(case: str, dtype: torch.dtype, backend: str) -> None:
    compare(CASES[case], dtype, backend)


@pytest.mark.parametrize("backend", PRESENT)
@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
@pytest.mark.parametrize("case", ["everything", "none", "no_compact", "stream", "row_weight"])
def test_chunk_size_changes_nothing(case: str, chunk_size: int, backend: str) -> None:
    compare(CASES[case], torch.float32, backend, chunk_size=chunk_size)
    compare(CASES[case], torch.bfloat16, backend, chunk_size=chunk_size)
