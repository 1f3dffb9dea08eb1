"""The smallest shapes there are, keywords that are not there, and the one signature that all functions share."""

from __future__ import annotations

import inspect

import pytest
import torch
from cases import PRESENT

import dft_kernels as dk
from dft_kernels import divergences
from dft_kernels.loss.build import build
from dft_kernels.loss.functional import LINEAR_DISTRIBUTION_LOSS
from dft_kernels.loss.options import DEFAULTS, LOSS, STATISTICS, LossOptions, StatisticsOptions
from dft_kernels.testing import dense_loss

# N, H, V
SHAPES = [(0, 3, 5), (4, 0, 5), (4, 3, 1), (1, 3, 5), (1, 1, 1), (0, 0, 1), (4, 1, 2), (1, 0, 7)]


def inputs(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    n, h, v = shape
    torch.manual_seed(1)
    hidden, weight, bias = torch.randn(n, h), torch.randn(v, h), torch.randn(v)
    return tuple(x.to(dtype).requires_grad_() for x in (hidden, weight, bias)), torch.randint(0, v, (n,))


@pytest.mark.parametrize("backend", PRESENT)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_smallest_shapes(shape: tuple[int, int, int], backend: str) -> None:
    (hidden, weight, bias), target = inputs(shape)
    teacher = torch.randn(shape[0], shape[2])
    for options in (
        {"hard_weight": 1.0, "label_smoothing": 0.1, "z_loss": 0.1},
        {"teacher": teacher, "hard_weight": 0.5, "temperature": 2.0},
        {"teacher": teacher, "divergence": "jensen_shannon", "reduction": "sum"},
        {"teacher": dk.TeacherHead(torch.randn(shape[0], 2), torch.randn(shape[2], 2))},
        {"reduction": "none"},
    ):
        given = {"target": target, "bias": bias, **options}
        ours = dk.linear_distribution_loss(hidden, weight, **given, backend=backend)
        exact = dense_loss(hidden, weight, **given)
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)
        both = [torch.autograd.grad(loss.sum(), (hidden, weight, bias)) for loss in (ours, exact)]
        for a, b in zip(*both, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    logits = torch.randn(shape[0], shape[2], requires_grad=True)
    ours, exact = dk.cross_entropy(logits, target, backend=backend), dense_loss(logits, None, target)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, exact)), rtol=1e-5, atol=1e-6)
    found = dk.linear_distribution_statistics(hidden, weight, target, teacher, bias=bias, backend=backend)
    log_q = torch.nn.functional.linear(hidden, weight, bias).double().log_softmax(-1)
    torch.testing.assert_close(found.entropy.double(), -(log_q.exp() * log_q).sum(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.log_prob.double(), log_q.gather(1, target[:, None])[:, 0], rtol=1e-5, atol=1e-6)
    mean = log_q.exp().mean(0, keepdim=True) if shape[0] else torch.zeros(1, shape[2])
    torch.testing.assert_close(found.mean_probability.double(), mean.double(), rtol=1e-5, atol=1e-6)
    assert bool(found.empty) == (shape[0] == 0)


def test_more_likely_tokens_than_there_are() -> None:
    hidden, weight = torch.randn(2, 3), torch.randn(4, 3)
    whole = torch.randn(2, 4).log_softmax(-1)
    indices = torch.arange(4).expand(2, 4)
    for k in (4, 1):  # all of V: nothing is left for the tail
        top = dk.TopK(indices[:, :k], whole[:, :k], whole[:, k:].logsumexp(-1) if k < 4 else None)
        ours = dk.linear_distribution_loss(hidden, weight, teacher=top)
        torch.testing.assert_close(ours.double(), dense_loss(hidden, weight, teacher=top), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"teacher.indices must hold 1 to 4 ids a row \(V\), got \[2, 5\]"):
        dk.linear_distribution_loss(hidden, weight, teacher=dk.TopK(torch.zeros(2, 5).long(), torch.zeros(2, 5)))


def test_shift_labels_of_short_sequences() -> None:
    assert dk.shift_labels(torch.tensor([3])).tolist() == [-100]
    assert dk.shift_labels(torch.zeros(2, 0).long()).shape == (2, 0)


X, W, Y = torch.randn(2, 3), torch.randn(4, 3), torch.zeros(2).long()
CALLS = {
    "linear_distribution_loss": lambda **more: dk.linear_distribution_loss(X, W, Y, **more),
    "distribution_loss": lambda **more: dk.distribution_loss(X, Y, **more),
    "linear_cross_entropy": lambda **more: dk.linear_cross_entropy(X, W, Y, **more),
    "cross_entropy": lambda **more: dk.cross_entropy(X, Y, **more),
    "linear_distribution_statistics": lambda **more: dk.linear_distribution_statistics(X, W, Y, **more),
    "dense_loss": lambda **more: dense_loss(X, W, Y, **more),
    "LinearDistributionLoss": dk.LinearDistributionLoss,
    "LinearCrossEntropyLoss": dk.LinearCrossEntropyLoss,
}
WRONG = [
    ("linear_cross_entropy", "bias", "Did you mean linear_bias"),
    ("LinearCrossEntropyLoss", "bias", "Did you mean linear_bias"),
    ("cross_entropy", "bias", "Add it to the logits"),
    ("distribution_loss", "low_rank", "Add it to the logits"),
    ("linear_distribution_loss", "linear_bias", "Did you mean bias"),
    ("linear_distribution_loss", "temprature", "Did you mean temperature"),
    ("linear_distribution_statistics", "potential", "There are hidden, weight, target"),
    ("cross_entropy", "inplace_gradients", "Did you mean inplace_gradient"),
    *((name, internal, "") for name in CALLS for internal in ("names", "projected", "statistics", "zzzzzz")),
]


@pytest.mark.parametrize(("function", "keyword", "remedy"), WRONG)
def test_a_keyword_that_is_not_taken(function: str, keyword: str, remedy: str) -> None:
    message = rf"^{function}: {keyword} must (be a keyword that it takes|be left out), got .*{remedy}"
    with pytest.raises(TypeError, match=message):
        CALLS[function](**{keyword: None})


def test_no_other_public_name_takes_any_keyword_at_all() -> None:
    """So that Python's own error names the function and the keyword; what hands keywords on has a check of its own."""
    hands_on = {"attach", "DFTTrainer"}  # to linear_distribution_loss, whose names it checks; to transformers' Trainer
    for name in {*dk.__all__} - {*CALLS}:
        public = getattr(dk, name)
        if callable(public):
            kinds = {parameter.kind for parameter in inspect.signature(public).parameters.values()}
            assert (inspect.Parameter.VAR_KEYWORD in kinds) == (name in hands_on), name


def test_one_signature() -> None:
    assert set(LOSS) == set(LossOptions.__annotations__)
    assert set(STATISTICS) == set(StatisticsOptions.__annotations__)
    shown = inspect.signature(dk.linear_distribution_loss).parameters
    assert {name: p.default for name, p in shown.items() if name in LOSS} == DEFAULTS
    assert list(shown)[:4] == ["hidden", "weight", "target", "teacher"]
    assert set(inspect.signature(dk.linear_distribution_statistics).parameters) >= set(STATISTICS)
    assert "bias" not in inspect.signature(dk.linear_cross_entropy).parameters
    described = dk.linear_distribution_loss.__doc__
    assert all(name in described for name in LOSS)
    assert isinstance(divergences.TABLE, dict)


@pytest.mark.parametrize("teacher", [None, torch.zeros(2, 5)])
@pytest.mark.parametrize("target", [None, torch.tensor([0, 4])])
def test_defaults_that_are_given_change_nothing(teacher, target):
    """What a call leaves out is not checked again; it is what the checks make of the defaults."""
    hidden, weight = torch.zeros(2, 3), torch.zeros(5, 3)
    z_loss = 0.0 if teacher is not None or target is not None else 0.1  # a call without any term is refused
    left_out = build(LINEAR_DISTRIBUTION_LOSS, hidden, weight, target, teacher, {"z_loss": z_loss} if z_loss else {})
    given = build(LINEAR_DISTRIBUTION_LOSS, hidden, weight, target, teacher, DEFAULTS | {"z_loss": z_loss})
    for name, one, two in zip(left_out._fields, left_out, given, strict=True):
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two, name
