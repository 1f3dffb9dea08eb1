"""The parts of gradient_error: which columns are kept, and what is known of the others."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dft_kernels.backends.active import kept
from dft_kernels.backends.sketch import Sketch

HEAD = torch.randn(1536, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3.0 / math.sqrt(32)
HEAD[:, 0] = -1.5 * torch.arange(2, 1538).log()


def test_kept_columns_leave_out_no_more_than_the_budget() -> None:
    values = np.exp(4.0 * np.random.default_rng(0).standard_normal(5000))
    values[:100] = 0.0
    total = values.sum()
    for part in (0.0, 1e-12, 1e-6, 1e-3, 0.3, 1.0):
        mask = kept(values, part * total)
        assert values[~mask].sum() <= part * total
        assert not mask[:100].any()
        assert mask[values.argmax()]
        assert values[mask].min() >= values[~mask].max()  # the smallest ones
    nearly = kept(values, 0.01 * total)
    more = values[~nearly].sum() + np.sort(values[nearly])[:400].sum()
    assert more > 0.01 * total  # and many of them
    assert not kept(np.zeros(7), 0.0).any()


@pytest.mark.parametrize("rank", [1, 2, 40])
def test_a_sketch_bounds_what_it_cannot_see(rank: int) -> None:
    """Of errors of every rank, in random directions and in the head's own."""
    weight = HEAD
    sketch = Sketch.make(weight, torch.float64)
    subspace = sketch.subspace
    assert torch.allclose(subspace @ subspace.T, torch.eye(len(subspace), dtype=torch.float64), atol=1e-12)
    above = []
    for seed in range(200):
        generator = torch.Generator().manual_seed(1000 + seed)
        left = torch.randn(24, rank, generator=generator, dtype=torch.float64)
        error = left @ torch.randn(rank, len(HEAD), generator=generator, dtype=torch.float64)
        sides = error @ sketch.projected
        missed = error @ weight
        missed -= sides[:, : len(subspace)] @ subspace
        above.append(sketch.residual(sides) / float(missed.norm()))
        assert abs(sketch.norm(sides) / float((error @ weight).norm()) - 1) < 0.5
    assert min(above) >= 1.0
    assert max(above) < 4.0
