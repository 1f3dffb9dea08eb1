"""LogitStream: every source gives what TeacherLogits gives; faults are named by row; no thread stays behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from dft_kernels import LogitStream, linear_distribution_loss

N, H, V = 23, 6, 31


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    yield
    names = [t.name for t in threading.enumerate() if t.name == "dft_kernels.LogitStream"]
    assert not names


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(N, H, generator=g).requires_grad_()
    weight = torch.randn(V, H, generator=g).requires_grad_()
    target = torch.randint(0, V, (N,), generator=g)
    target[::4] = -100
    target[-3:] = -100
    return hidden, weight, target, torch.randn(N, V, generator=g)


def gradients(problem, teacher, **options):
    hidden, weight, target, _ = problem
    loss = linear_distribution_loss(hidden, weight, target, teacher, **options)
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]


@pytest.mark.parametrize("chunk_size", [1, 5, 100])
@pytest.mark.parametrize("pieces", [[N], [1] * N, [7, 7, 9], [5, 7, 8, 3], [20, 3]])
def test_iterator_equals_tensor(problem, pieces, chunk_size):
    logits = problem[3]
    ours = gradients(problem, LogitStream(iter(logits.split(pieces))), chunk_size=chunk_size)
    for a, b in zip(ours, gradients(problem, logits, chunk_size=chunk_size), strict=True):
        assert torch.equal(a, b)


def test_callable_gets_ascending_rows_without_ignored(problem):
    logits, target = problem[3], problem[2]
    asked = []

    def source(rows):
        assert not torch.is_grad_enabled()
        asked.append(rows)
        return logits[rows].half()

    ours = gradients(problem, LogitStream(source), chunk_size=4)
    for a, b in zip(ours, gradients(problem, logits.half(), chunk_size=4), strict=True):
        assert torch.equal(a, b)
    rows = torch.cat(asked)
    assert rows.dtype == torch.int64
    assert torch.equal(rows, (target != -100).nonzero()[:, 0])


def test_callable_is_asked_again_in_backward(problem):
    logits = problem[3]
    hidden, weight, target, _ = problem
    rows = linear_distribution_loss(hidden, weight, target, LogitStream(lambda r: logits[r]), reduction="none")
    exact = linear_distribution_loss(hidden, weight, target, logits, reduction="none")
    ours = torch.autograd.grad(rows.sum(), (hidden, weight))
    for a, b in zip(ours, torch.autograd.grad(exact.sum(), (hidden, weight)), strict=True):
        assert torch.equal(a, b)


def broken(logits, at):
    for row in range(N):
        if row == at:
            raise OSError("disk full")
        yield logits[row : row + 1]


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda x: iter(x[:10].split(5)), ValueError, "must cover all 23 rows, got 10"),
        (lambda x: iter([x, x[:2]]), ValueError, "must end after 23 rows"),
        (lambda x: iter([x[:20], x[:5]]), ValueError, "starts at row 20 must hold 1 to 3 rows"),
        (lambda x: iter([x[:, :30]]), ValueError, r"starts at row 0 must have shape \[r, 31\], got \[23, 30\]"),
        (lambda x: iter([x.long()]), TypeError, "must have a floating dtype, got torch.int64"),
        (lambda x: iter([x.numpy()]), TypeError, "must be a tensor of logits, got ndarray"),
        (lambda x: broken(x, 9), RuntimeError, r"failed for rows 9\.\.22: OSError: disk full"),
        (lambda x: lambda rows: x[rows][:, :3], ValueError, r"must have shape \[\d+, 31\]"),
        (lambda x: lambda rows: x[:1], ValueError, r"must have shape \[\d+, 31\], got \[1, 31\]"),
        (lambda x: lambda rows: 1 / 0, RuntimeError, "ZeroDivisionError"),
    ],
)
@pytest.mark.parametrize("chunk_size", [3, 100])
def test_faults_are_named(problem, make, error, text, chunk_size):
    with pytest.raises(error, match=text):
        gradients(problem, LogitStream(make(problem[3])), chunk_size=chunk_size)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["iterator", "callable"])
def test_bad_values_are_refused_by_row(problem, value, kind):
    logits = problem[3].clone()
    logits[13, 5] = value
    stream = LogitStream(iter(logits.split(6)) if kind == "iterator" else lambda rows: logits[rows])
    with pytest.raises(ValueError, match="row 13 must have logits"):
        gradients(problem, stream, chunk_size=4)


def test_a_row_of_nothing_but_minus_infinity_is_refused(problem):
    logits = problem[3].clone()
    logits[13] = -torch.inf
    with pytest.raises(ValueError, match="row 13 must have logits"):
        gradients(problem, LogitStream(iter([logits])))


def test_one_shot(problem):
    stream = LogitStream(iter(problem[3].split(5)))
    gradients(problem, stream)
    with pytest.raises(ValueError, match="must be an unread stream"):
        gradients(problem, stream)
    with pytest.raises(ValueError, match="must be replayable where backward recomputes"):
        linear_distribution_loss(*problem[:3], LogitStream(iter([problem[3]])), reduction="none")


def test_abandoned_generator_is_closed(problem):
    closed = threading.Event()
    logits = problem[3]

    def source():
        try:
            yield logits[:4]
            yield logits[4:8, :5]  # wrong: the loss stops here
            yield logits[8:]
        finally:
            closed.set()

    with pytest.raises(ValueError, match="starts at row 4"):
        gradients(problem, LogitStream(source()), chunk_size=2)
    assert closed.is_set()


def test_prefetch_is_bounded(problem):
    logits, ahead, hidden = problem[3], [], problem[0]
    consumed = []

    def source(rows):
        ahead.append(len(ahead) - len(consumed))
        return logits[rows]

    from dft_kernels.backends import choose

    backend = choose("auto", torch.device("cpu"), torch.float32)
    original = type(backend).chunk_step

    def counting(self, *arguments):
        consumed.append(1)
        return original(self, *arguments)

    type(backend).chunk_step = counting
    try:
        linear_distribution_loss(hidden, problem[1], None, LogitStream(source, prefetch=1), chunk_size=1)
    finally:
        type(backend).chunk_step = original
    assert len(consumed) == N
    assert max(ahead) <= 3  # one computed, one queued, one being fetched
