"""What the functions promise beyond the table of cases: drop-in behaviour, metrics, statistics, errors of use."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, leaves, make, oracle_arguments
from comparisons import close
from torch.utils.checkpoint import checkpoint

import dft_kernels as dk
from dft_kernels.testing import dense_loss, textbook_divergence

H, V = 8, 57
pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("extra", [{}, {"label_smoothing": 0.2}, {"weight": True}, {"ignore_index": 3}])
def test_linear_cross_entropy_is_torchs(tensors, reduction, extra):
    hidden, weight, bias, target, _ = tensors
    extra = dict(extra)
    if "ignore_index" in extra:
        target = target.clamp(min=0)
    if "weight" in extra:
        extra["weight"] = torch.linspace(0, 2, V)
    ours = dk.linear_cross_entropy(hidden, weight, target, linear_bias=bias, reduction=reduction, **extra)
    logits = F.linear(hidden, weight, bias).reshape(-1, V)
    exact = F.cross_entropy(logits, target.reshape(-1), reduction=reduction, **extra).reshape(ours.shape)
    seed = torch.rand_like(ours)
    inputs = (hidden, weight, bias)
    close([ours, *torch.autograd.grad(ours, inputs, seed)], [exact, *torch.autograd.grad(exact, inputs, seed)])


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("leaf", [False, True])
def test_cross_entropy_on_logits(tensors, inplace, leaf):
    target, start = tensors[3], tensors[4]
    base = start.clone().requires_grad_()
    exact = F.cross_entropy(base.reshape(-1, V), target.reshape(-1))
    (grad,) = torch.autograd.grad(3 * exact, base)
    source = start.clone().requires_grad_()
    logits = source if leaf else source * 1.0
    version = logits._version
    loss = dk.cross_entropy(logits, target, inplace_gradient=inplace)
    assert (logits._version > version) == inplace
    (ours,) = torch.autograd.grad(3 * loss, source)
    close([loss, ours], [exact, grad])
    assert torch.equal(start, logits) != inplace


def test_inplace_gradient_allows_one_backward(tensors):
    logits = tensors[4].clone().requires_grad_()
    loss = dk.cross_entropy(logits * 1.0, tensors[3], inplace_gradient=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="must be followed by one backward"):
        loss.backward()
    with pytest.raises(ValueError, match="contiguous"):
        dk.cross_entropy((logits * 1.0).transpose(0, 1), tensors[3].t(), inplace_gradient=True)


def test_distribution_loss_is_the_linear_one_on_logits(tensors):
    target, start = tensors[3], tensors[4]
    logits = start.clone().requires_grad_()
    teacher = torch.randn(3, 11, V)
    terms = {"hard_weight": 0.3, "temperature": 2.0, "divergence": "reverse_kl", "softcap": 4.0, "chunk_size": 5}
    ours = dk.distribution_loss(logits, target, teacher, **terms)
    exact = dense_loss(logits, None, target, teacher, **{k: v for k, v in terms.items() if k != "chunk_size"})
    close([ours, *torch.autograd.grad(ours, logits)], [exact, *torch.autograd.grad(exact, logits)])


def test_metrics(backend, tensors):
    hidden, weight, bias, target, teacher = tensors
    group = torch.arange(11).expand(3, 11) % 2
    loss, m = dk.linear_distribution_loss(
        hidden, weight, target, teacher, bias=bias, hard_weight=0.5, temperature=2.0, temperature_scaling="squared",
        group=group, num_groups=3, return_metrics=True, chunk_size=7,
    )  # fmt: skip
    z = F.linear(hidden, weight, bias).detach()
    valid = target != -100
    log_q = z.log_softmax(-1)
    hard = torch.where(valid, -log_q.gather(-1, target.clamp(min=0)[..., None])[..., 0], 0.0)
    soft = 4 * textbook_divergence((teacher / 2).log_softmax(-1), (z / 2).log_softmax(-1), "forward_kl")
    entropy = -(log_q.exp() * log_q).sum(-1)
    close([m.hard_loss, m.soft_loss], [hard, soft * valid], 1e-5)
    close([m.entropy, m.lse], [entropy * valid, z.logsumexp(-1) * valid])
    assert torch.equal(m.correct, (z.argmax(-1) == target) & valid)
    assert torch.equal(m.teacher_agreement, (z.argmax(-1) == teacher.argmax(-1)) & valid)
    close([loss], [(0.5 * m.hard_loss + m.soft_loss).sum() / valid.sum()])
    q = log_q.exp()
    for g in range(3):
        rows = q[valid & (group == g)]
        want = rows.mean(0) if len(rows) else torch.zeros(V)
        close([m.mean_probability[g]], [want])
    assert not m.hard_loss.requires_grad
    assert m.backend == backend
    alone, same = dk.linear_distribution_loss(hidden, weight, target, reduction="none", return_metrics=True)
    close([same.hard_loss], [alone.detach()])
    assert same.soft_loss is None
    assert same.teacher_agreement is None


# the layout of features is none of a backend's business
@pytest.mark.kept(where=lambda backend, compact, sparse: backend != "triton" or sparse == (None if compact else "csr"))
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("sparse", [None, "coo", "csr"])
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_statistics(tensors, compact, sparse):
    hidden, weight, bias, target, teacher = tensors
    group = torch.arange(11).expand(3, 11) % 3
    row_weight = torch.rand(3, 11)
    features = torch.randn(V, 4)
    if sparse is not None:
        features = features * (torch.rand(V, 4) < 0.3)
    given = features if sparse is None else features.to_sparse() if sparse == "coo" else features.to_sparse_csr()
    s = dk.linear_distribution_statistics(
        hidden, weight, target, teacher, bias=bias, group=group, num_groups=4, features=given,
        row_weight=row_weight, divergence="jensen_shannon", temperature=1.5, compact=compact, chunk_size=6,
    )  # fmt: skip
    z = F.linear(hidden, weight, bias)
    valid = (target != -100).float()
    log_q = z.log_softmax(-1)
    q = log_q.exp()
    w = row_weight * valid
    one_hot = F.one_hot(group, 4).float() * w[..., None]  # [3, 11, 4]
    total = one_hot.sum((0, 1))
    exact = {
        "log_prob": log_q.gather(-1, target.clamp(min=0)[..., None])[..., 0] * valid,
        "entropy": -(q * log_q).sum(-1) * valid,
        "lse": z.logsumexp(-1) * valid,
        "divergence": textbook_divergence((teacher / 1.5).log_softmax(-1), (z / 1.5).log_softmax(-1), "jensen_shannon")
        * valid,
        "features": q @ features * valid[..., None],
        "mean_probability": torch.einsum("btg,btv->gv", one_hot, q) / total.clamp(min=1e-9)[:, None],
    }
    assert s.empty.tolist() == [False, False, False, True]
    seeds = {name: torch.randn_like(value) for name, value in exact.items()}
    inputs = (hidden, weight, bias)
    for name, want in exact.items():
        close([getattr(s, name)], [want], 1e-5)
        grads = torch.autograd.grad((getattr(s, name) * seeds[name]).sum(), inputs, retain_graph=True)
        close(grads, torch.autograd.grad((want * seeds[name]).sum(), inputs, retain_graph=True), 1e-5)
    ours = sum((getattr(s, name) * seeds[name]).sum() for name in exact)
    whole = sum((want * seeds[name]).sum() for name, want in exact.items())
    close(torch.autograd.grad(ours, inputs), torch.autograd.grad(whole, inputs), 1e-5)


@pytest.mark.parametrize("case", ["everything", "none", "no_compact", "potential", "cross_entropy_bias"])
def test_gradcheck(case):
    arguments = make(CASES[case]._replace(shape=(4, 3, 7)), torch.float64)
    inputs = leaves(arguments)
    names = [name for name in ("hidden", "weight", "bias") if name in arguments]

    def function(*values):
        return dk.linear_distribution_loss(**{**arguments, **dict(zip(names, values, strict=True))}, chunk_size=3)

    assert torch.autograd.gradcheck(function, inputs)


def test_second_backward_and_double_backward(tensors):
    hidden, weight, _, target, _ = tensors
    loss = dk.linear_cross_entropy(hidden, weight, target)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    close(torch.autograd.grad(loss, (hidden, weight)), first, 0.0)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, hidden)
    for reduction in ("mean", "none"):
        rows = dk.linear_cross_entropy(hidden, weight, target, reduction=reduction).sum()
        (grad,) = torch.autograd.grad(rows, hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward must not be asked"):
            torch.autograd.grad(grad.sum(), hidden)


def test_checkpointing_strides_and_tied_weights(tensors):
    hidden, weight, bias, target, _ = tensors

    def body(h, w):
        return dk.linear_cross_entropy(torch.tanh(h) + 0.0 * w[0], w, target, linear_bias=bias)

    plain = body(hidden, weight)
    again = checkpoint(body, hidden, weight, use_reentrant=False)
    close(torch.autograd.grad(again, (hidden, weight)), torch.autograd.grad(plain, (hidden, weight)), 1e-6)
    strided = torch.randn(H, 11, 3).permute(2, 1, 0).requires_grad_()
    across = torch.randn(H, V).t().requires_grad_()
    ours = dk.linear_cross_entropy(strided, across, target)
    exact = F.cross_entropy(F.linear(strided, across).reshape(-1, V), target.reshape(-1))
    close(torch.autograd.grad(ours, (strided, across)), torch.autograd.grad(exact, (strided, across)))


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_a_divergence_that_is_only_a_metric(tensors, name):
    """It has no part in the gradient, not even where it is infinite."""
    hidden, weight, bias, target, teacher = tensors
    teacher = teacher.clone()
    teacher[..., 5] = -torch.inf
    loss, metrics = dk.linear_distribution_loss(
        hidden,
        weight,
        target,
        teacher,
        bias=bias,
        divergence=name,
        soft_weight=0.0,
        hard_weight=1.0,
        return_metrics=True,
    )
    exact = F.cross_entropy(F.linear(hidden, weight, bias).reshape(-1, V), target.reshape(-1))
    inputs = (hidden, weight, bias)
    close([loss, *torch.autograd.grad(loss, inputs)], [exact, *torch.autograd.grad(exact, inputs)])
    valid = target != -100
    z = F.linear(hidden, weight, bias).detach()
    assert torch.equal(metrics.teacher_agreement, (z.argmax(-1) == teacher.argmax(-1)) & valid)
    infinite = metrics.soft_loss[valid].isinf()
    assert infinite.all() if name == "reverse_kl" else not infinite.any()


def test_strided_logits_and_rows():
    """Logits and a teacher across memory, labels, weights and groups that are every second number of another."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(V, 14, generator=generator).t().requires_grad_()
    teacher = torch.randn(V, 14, generator=generator).t()
    target = torch.randint(0, V, (28,), generator=generator)[::2]
    row_weight, group = torch.rand(28, generator=generator)[::2], torch.arange(28)[::2] % 3
    arguments = {"row_weight": row_weight, "group": group, "potential": torch.randn(3, V, generator=generator)}
    ours, metrics = dk.distribution_loss(
        logits, target, teacher, hard_weight=0.5, num_groups=3, return_metrics=True, **arguments
    )
    exact = dense_loss(logits, None, target, teacher, hard_weight=0.5, **arguments)
    close([ours, *torch.autograd.grad(ours, logits)], [exact, *torch.autograd.grad(exact, logits)])
    shares = F.one_hot(group, 3).float() * row_weight[:, None]
    want = (shares.t() @ logits.softmax(-1)) / shares.sum(0)[:, None]
    close([metrics.mean_probability], [want])


def test_only_the_gradients_that_are_needed(tensors):
    hidden, weight, _, target, _ = tensors
    for need_hidden, need_weight in ((True, False), (False, True)):
        h, w = hidden.detach().requires_grad_(need_hidden), weight.detach().requires_grad_(need_weight)
        dk.linear_cross_entropy(h, w, target).backward()
        assert (h.grad is not None, w.grad is not None) == (need_hidden, need_weight)
    with torch.no_grad():
        assert not dk.linear_cross_entropy(hidden, weight, target).requires_grad


def test_autocast(tensors):
    hidden, weight, bias, target, _ = tensors
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = dk.linear_cross_entropy(hidden, weight, target, linear_bias=bias)
        teacher = dk.TeacherHead(torch.randn(3, 11, 5), torch.randn(V, 5).bfloat16())
        dk.linear_distribution_loss(hidden, weight, target, teacher).backward()
    exact = F.cross_entropy(F.linear(hidden, weight, bias).reshape(-1, V), target.reshape(-1))
    assert loss.dtype == torch.float32
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert grads[0].dtype == torch.float32
    close(grads, torch.autograd.grad(exact, (hidden, weight)), 1e-2)
    assert weight.grad.dtype == torch.float32


def test_modules_and_shift(tensors):
    hidden, weight, _, target, teacher = tensors
    module = dk.LinearDistributionLoss(divergence="reverse_kl", temperature=2.0)
    close(
        [module(hidden, weight, target, teacher)],
        [dk.linear_distribution_loss(hidden, weight, target, teacher, divergence="reverse_kl", temperature=2.0)],
        0.0,
    )
    assert "temperature=2.0" in repr(copy.deepcopy(module))
    ce = dk.LinearCrossEntropyLoss(reduction="sum")
    close([ce(hidden, weight, target)], [dk.linear_cross_entropy(hidden, weight, target, reduction="sum")], 0.0)
    ids = torch.arange(8).view(2, 4)
    assert dk.shift_labels(ids).tolist() == [[1, 2, 3, -100], [5, 6, 7, -100]]
    for wrong in (ids.float(), ids > 2):
        with pytest.raises(TypeError, match="shift_labels: labels must be of an integer dtype, got torch"):
            dk.shift_labels(wrong)


def test_oracle_arguments_are_complete():
    """The oracle sees every option of a case that could change the number."""
    arguments = make(CASES["everything"], torch.float64)
    changed = dense_loss(**{**oracle_arguments(arguments), "z_loss": 1.0})
    assert not torch.equal(changed, dense_loss(**oracle_arguments(arguments)))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_some_metrics_are_those_of_all(smoothing: float) -> None:
    draw = torch.Generator().manual_seed(4)
    hidden, weight = torch.randn(9, 6, generator=draw), torch.randn(11, 6, generator=draw)
    target, teacher = torch.randint(0, 11, (9,), generator=draw), torch.randn(9, 11, generator=draw)
    more = {"hard_weight": 0.3, "features": torch.eye(11)[:, :2], "feature_weight": torch.ones(9, 2)}
    more |= {"label_smoothing": smoothing, "group": torch.zeros(9, dtype=torch.int64), "gradient_error": 0.1}
    weight.requires_grad_()
    loss, known = dk.linear_distribution_loss(hidden, weight, target, teacher, return_metrics=True, **more)
    names = [one.name for one in dataclasses.fields(known) if one.name != "backend"]
    for name in names:
        assert getattr(known, name) is not None, name
        same, one = dk.linear_distribution_loss(hidden, weight, target, teacher, return_metrics={name}, **more)
        assert torch.equal(same, loss)
        assert torch.equal(getattr(one, name), getattr(known, name)), name
    _, none = dk.linear_distribution_loss(hidden, weight, target, return_metrics=["lse"])
    assert {name for name in names if getattr(none, name) is not None} == {"lse", "hard_loss", "log_prob"}
    for wrong in ("entropy", {"perplexity"}, 3):
        with pytest.raises(ValueError, match="return_metrics must be True, False, or some of hard_loss, soft_loss"):
            dk.linear_distribution_loss(hidden, weight, target, return_metrics=wrong)
