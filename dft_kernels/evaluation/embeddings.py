"""Distances between sets of texts by their embeddings: MMD with a permutation test, and MAUVE.

All sides lie in one pool of rows; a side is an array of row numbers. The kernel is computed once for the pool, so that
each of hundreds of random halves costs a sum over its rows.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import fail

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]
SAME = 1e-12  # squared distance, of the mean squared norm, up to which two texts are the same
MAUVE_ABSENT = "not measured: pip install 'dft-kernels[mauve]'"


def squared_distances(points: Floats) -> Floats:
    """|x_i - x_j|^2 of rows [P, E], [P, P]; exactly 0 on the diagonal, never below 0."""
    norms = np.einsum("pe,pe->p", points, points)
    out = points @ points.T
    out *= -2.0
    out += norms[:, None]
    out += norms[None, :]
    np.maximum(out, 0.0, out=out)
    np.fill_diagonal(out, 0.0)
    return out


def bandwidths(human: Floats) -> Floats:
    """The three squared bandwidths s^2 [3] of `gram`: the median of |x_i - x_j|^2 over pairs i < j of human texts
    [D, E], times 1/2, 1 and 2.

    Where more than half of the pairs are of the same text, the median is that of the others. ValueError where there are
    no two different texts: nothing can then be said of a distance.
    """
    found = squared_distances(human)[np.triu_indices(len(human), 1)]
    smallest = SAME * float(np.mean(np.sum(human * human, axis=1))) if len(human) else 0.0
    found = found if len(found) and np.median(found) > smallest else found[found > smallest]
    if not len(found):
        fail(
            "mmd", "human", "hold two different texts at least", f"{len(human)} that are all the same", "Name more text"
        )
    return float(np.median(found)) * np.array([0.5, 1.0, 2.0])


def gram(pool: Floats, bandwidths: Floats) -> Floats:
    """The kernel of all rows of the pool [P, E], [P, P] float64: the mean over the bandwidths of

        k(x, y) = exp(-|x - y|^2 / (2 s^2))

    8 P^2 bytes are kept, three times as much while it is made; 2 P^2 E FLOP.
    """
    distances = squared_distances(pool)
    out = np.zeros_like(distances)
    for bandwidth in bandwidths:
        part = distances / (-2.0 * bandwidth)
        out += np.exp(part, out=part)
    out /= len(bandwidths)
    return out


def mmd2(gram: Floats, a: Rows, b: Rows) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy between rows a [m] and rows b [n] of the pool:

        1/(m(m-1)) sum_{i != j} k(a_i, a_j) + 1/(n(n-1)) sum_{i != j} k(b_i, b_j) - 2/(mn) sum_ij k(a_i, b_j)

    (Gretton et al., A Kernel Two-Sample Test, JMLR 13, 2012, Lemma 6). It is about 0 where both are from one
    distribution, below 0 as often as above. Rows of a side are different rows of the pool, whose texts may be equal.
    ValueError below two rows a side. Cost: m^2 + n^2 + mn numbers read.
    """
    _two_each(a, b)
    m, n = len(a), len(b)
    diagonal = gram.diagonal()
    own_a = (gram[np.ix_(a, a)].sum() - diagonal[a].sum()) / (m * (m - 1))
    own_b = (gram[np.ix_(b, b)].sum() - diagonal[b].sum()) / (n * (n - 1))
    return float(own_a + own_b - 2.0 * gram[np.ix_(a, b)].mean())


def permutation_p(gram: Floats, a: Rows, b: Rows, permutations: int = 1000, seed: int = 0) -> float:
    """p of `mmd2`: how often as large a value comes from rows of a and b that are dealt anew, m and n to a side,

        (1 + #{dealt >= observed}) / (1 + permutations)

    so it is never 0, and at most 5 % of tests are below 0.05 where both sides are from one distribution. Where both
    sides answer the same prompts they are more alike than two independent samples, and p is too large rather than too
    small. All are computed by one product [P, P] by [P, permutations] of the m + n rows' kernel with 0/1 indicators.
    """
    _two_each(a, b)
    rows = np.concatenate([a, b])
    m, n, many = len(a), len(b), len(rows)
    kernel = gram[np.ix_(rows, rows)]
    np.fill_diagonal(kernel, 0.0)
    first = np.zeros((many, 1 + permutations))  # column 0: as observed
    first[:m] = 1.0
    first[:, 1:] = np.random.default_rng(seed).permuted(first[:, 1:], axis=0)
    own_a = np.einsum("pk,pk->k", first, kernel @ first)  # sums over i != j
    of_a = kernel.sum(0) @ first  # of rows of a with all
    own_b = kernel.sum() - 2.0 * of_a + own_a
    value = own_a / (m * (m - 1)) + own_b / (n * (n - 1)) - 2.0 * (of_a - own_a) / (m * n)
    ties = 1e-12 * float(kernel.max(initial=0.0))  # equal deals differ by rounding
    return float((1 + np.count_nonzero(value[1:] >= value[0] - ties)) / (1 + permutations))


def _two_each(a: Rows, b: Rows) -> None:
    if min(len(a), len(b)) < 2:
        fail("mmd", "each side", "have at least 2 texts", f"{len(a)} and {len(b)}", "Draw more")


def mauve_missing() -> str:
    """Why MAUVE cannot be measured here; "" where it can."""
    try:
        import_module("faiss"), import_module("mauve")
    except ModuleNotFoundError as error:
        return MAUVE_ABSENT if error.name in ("faiss", "mauve") else f"not measured: {error}"
    except ImportError as error:
        return f"not measured: {error}"
    return ""


def mauve(pool: Floats, a: Rows, b: Rows, seed: int = 0) -> float | None:
    """MAUVE between rows a and rows b of the pool, 0 (apart) to 1 (the same); None where all rows are the same text.
    ImportError where `mauve_missing` says why.

    The area under the curve of exp(-5 KL) of both sides' histograms to their mixtures, over clusters of their
    embeddings (Pillutla et al., arXiv:2102.01454), by the authors' package as it defaults: vectors of norm 1, principal
    components of 90 % of the variance, k-means in max(2, round(min(m, n) / 10)) clusters (best of 5 starts), and 25
    mixtures. The same seed gives the same value. It depends on the encoder and on m and n: compare values of equal ones
    alone. Cost: 0.06 s for 200 and 200 rows on one core, and 3 s once to import the package.
    """
    import faiss
    from mauve import compute_mauve

    both = pool[np.concatenate([a, b])]
    if float(np.ptp(both, axis=0).max(initial=0.0)) ** 2 <= SAME * float(np.mean(np.sum(both * both, axis=1))):
        return None
    with _quiet(faiss):
        found = compute_mauve(p_features=pool[a], q_features=pool[b], seed=seed, verbose=False)
    if np.array_equal(found.p_hist, found.q_hist):  # an area over points sorted with ties, which may say 0.75
        return 1.0
    return float(found.mauve)


@contextlib.contextmanager
def _quiet(faiss: Any) -> Iterator[None]:
    """On one thread, since a small SVD waits for the others 15 times as long as it takes, and without k-means' word to
    stderr that 10 points a cluster are few: 10 are the method's own."""
    from threadpoolctl import threadpool_limits

    kmeans, threads = faiss.Kmeans, faiss.omp_get_max_threads()
    faiss.Kmeans = functools.partial(kmeans, min_points_per_centroid=1)
    faiss.omp_set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        faiss.Kmeans = kmeans
        faiss.omp_set_num_threads(threads)
