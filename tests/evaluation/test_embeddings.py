"""MMD against double loops and scipy, its permutation test's size and power, and MAUVE against the package itself."""

from __future__ import annotations

import importlib
import itertools
import sys
from typing import Any

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from dft_kernels.evaluation import embeddings
from dft_kernels.evaluation.embeddings import bandwidths, gram, mauve, mauve_missing, mmd2, permutation_p

RNG = np.random.default_rng(0)
POOL = RNG.normal(size=(90, 5))
POOL[60:] += 1.0  # another distribution
A, B, OTHER = np.arange(30), np.arange(30, 60), np.arange(60, 90)


def test_bandwidths_and_kernel_are_the_definition() -> None:
    distances = cdist(POOL, POOL, "sqeuclidean")
    pairs = [distances[i, j] for i, j in itertools.combinations(range(30), 2)]
    found = bandwidths(POOL[A])
    np.testing.assert_allclose(found, np.median(pairs) * np.array([0.5, 1.0, 2.0]), rtol=1e-12)
    expected = sum(np.exp(-distances / (2 * s2)) for s2 in found) / 3
    np.testing.assert_allclose(gram(POOL, found), expected, atol=1e-14)


def test_kernel_as_scikit_learn_has_it() -> None:
    """Recorded: scikit-learn 1.9.1, the mean of rbf_kernel(gamma=1 / (2 s^2)) over s^2 = 0.5, 1, 2."""
    points = np.array([[0.0, 0.0], [1.0, 0.5], [-0.25, 2.0]])
    found = gram(points, np.array([0.5, 1.0, 2.0]))
    recorded = [0.5177939514419407, 0.1701844679389571, 0.18542131745925458]
    np.testing.assert_allclose(found[np.triu_indices(3, 1)], recorded, rtol=1e-14)


@pytest.mark.parametrize(("a", "b"), [(A, B), (A[:7], OTHER), (A[[4, 2, 9]], B[[1, 0]])])
def test_mmd2_is_the_double_loop(a: Any, b: Any) -> None:
    kernel = gram(POOL, bandwidths(POOL[A]))
    own = [
        sum(kernel[i, j] for i, j in itertools.permutations(rows, 2)) / (len(rows) * (len(rows) - 1)) for rows in (a, b)
    ]
    cross = sum(kernel[i, j] for i in a for j in b) / (len(a) * len(b))
    assert mmd2(kernel, a, b) == pytest.approx(own[0] + own[1] - 2 * cross, abs=1e-14)
    assert mmd2(kernel, a, b) == pytest.approx(mmd2(kernel, b, a), abs=1e-14)


def test_p_is_that_of_every_deal_done_by_hand() -> None:
    """Many permutations come to the share of all 70 deals of 4 and 4 that are as large."""
    kernel = gram(POOL, bandwidths(POOL[A]))
    a, b = np.array([0, 1, 60, 61]), np.array([2, 62, 3, 4])
    rows, observed = np.concatenate([a, b]), mmd2(kernel, a, b)
    deals = [rows[list(deal)] for deal in itertools.combinations(range(8), 4)]
    as_large = [mmd2(kernel, deal, np.setdiff1d(rows, deal)) >= observed - 1e-12 for deal in deals]
    assert permutation_p(kernel, a, b, 40_000, seed=1) == pytest.approx(np.mean(as_large), abs=0.01)
    assert permutation_p(kernel, a, b, seed=1) == permutation_p(kernel, a, b, seed=1)
    assert permutation_p(kernel, a, b, seed=1) != permutation_p(kernel, a, b, seed=2)


def test_p_is_uniform_where_nothing_differs() -> None:
    """Kolmogorov-Smirnov distance of 300 p-values of random splits of one sample; values lie on both sides of 0."""
    points = np.random.default_rng(1).normal(size=(1200, 4))
    kernel = gram(points, bandwidths(points[:200]))
    order, found, signs = np.random.default_rng(2), [], []
    for _ in range(300):
        rows = order.choice(1200, 40, replace=False)
        found.append(permutation_p(kernel, rows[:20], rows[20:], 199, seed=3))
        signs.append(mmd2(kernel, rows[:20], rows[20:]) < 0)
    assert np.abs(np.sort(found) - np.arange(1, 301) / 300).max() < 1.63 / np.sqrt(300)  # the 1 % point
    assert 0.4 < np.mean(signs) < 0.75  # its null distribution has a long right tail


def test_a_shift_is_found() -> None:
    kernel = gram(POOL, bandwidths(POOL[A]))
    assert permutation_p(kernel, A, OTHER) == 1 / 1001  # the smallest that there is
    assert mmd2(kernel, A, OTHER) > 5 * abs(mmd2(kernel, A, B))


def test_equal_texts_are_numbers_still() -> None:
    """A text twice in the pool has the kernel 1; where most human pairs are one text, the others give the bandwidth;
    where all are, there is none."""
    twice = np.concatenate([POOL[:10], POOL[:10]])
    kernel = gram(twice, bandwidths(twice))
    assert kernel[3, 13] == 1.0
    assert mmd2(kernel, np.arange(10), np.arange(10, 20)) < 0  # each has its double on the other side
    mostly = np.concatenate([np.repeat(POOL[:1], 20, 0), POOL[1:3]])
    assert (bandwidths(mostly) > 0).all()
    assert np.isfinite(gram(mostly, bandwidths(mostly))).all()
    for same in (np.ones((5, 3)), np.zeros((5, 3)), np.ones((1, 3)), np.empty((0, 3))):
        with pytest.raises(ValueError, match="mmd: human must hold two different texts at least, got"):
            bandwidths(same)
    equal = gram(np.ones((8, 3)), np.array([1.0, 2.0, 4.0]))
    assert mmd2(equal, A[:4], A[4:8]) == pytest.approx(0.0, abs=1e-15)
    assert permutation_p(equal, A[:4], A[4:8]) == 1.0
    with pytest.raises(ValueError, match="mmd: each side must have at least 2 texts, got 1 and 30"):
        mmd2(kernel, A[:1], B)


def test_mauve_is_not_measured_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mauve", None)  # import raises ImportError
    assert mauve_missing() == "not measured: pip install 'dft-kernels[mauve]'"
    monkeypatch.setattr(embeddings, "import_module", lambda name: importlib.import_module("no_such_part"))
    assert mauve_missing() == "not measured: No module named 'no_such_part'"


def test_mauve_is_the_packages(capfd: pytest.CaptureFixture[str]) -> None:
    package = pytest.importorskip("mauve", reason="mauve-text is not installed")
    found = mauve(POOL, A, OTHER, seed=4)
    assert capfd.readouterr() == ("", "")
    assert found == mauve(POOL, A, OTHER, seed=4)
    assert found == package.compute_mauve(p_features=POOL[A], q_features=POOL[OTHER], seed=4).mauve
    assert found < mauve(POOL, A, B, seed=4)
    assert mauve(POOL, A, A) == 1.0
    assert mauve(np.ones((60, 3)), A, B) is None
