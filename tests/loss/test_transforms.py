"""Forward mode, torch.func and torch.vmap: the right value, or one clear error; never a derivative of 0."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import dft_kernels as dk
from dft_kernels import terms
from dft_kernels.testing import dense_loss

N, H, V, B = 7, 5, 11, 3
torch.manual_seed(0)
HIDDEN, WEIGHT, BIAS = (torch.randn(*shape, dtype=torch.float64) for shape in ((N, H), (V, H), (V,)))
BATCH = torch.randn(B, N, H, dtype=torch.float64)
TEACHER = torch.randn(N, V, dtype=torch.float64)
TARGET = torch.randint(0, V, (N,))
TARGET[2] = -100
TANGENTS = tuple(torch.randn_like(x) for x in (HIDDEN, WEIGHT, BIAS))
DOUBLE = "double backward must not be asked of a fused loss"
ROWS = "forward-mode differentiation must be of a loss with"


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def linear(hidden, weight=WEIGHT, bias=BIAS):
    return dk.linear_cross_entropy(hidden, weight, TARGET, linear_bias=bias)


def oracle(hidden, weight=WEIGHT, bias=BIAS):
    return dense_loss(hidden, weight, TARGET, bias=bias)


def entropy(hidden):
    return dk.linear_distribution_statistics(hidden, WEIGHT, TARGET).entropy.sum()


def dense_entropy(hidden):
    log_q = (hidden @ WEIGHT.T).log_softmax(-1)
    return -(log_q.exp() * log_q).sum(-1)[TARGET != -100].sum()


# name: (ours, oracle) of hidden states, weight and bias
SCALARS = {
    "cross_entropy": (linear, oracle),
    "of_logits": (
        lambda h, w=WEIGHT, b=BIAS: dk.cross_entropy(torch.nn.functional.linear(h, w, b), TARGET),
        oracle,
    ),
    "distribution_loss": (
        lambda h, w=WEIGHT, b=BIAS: dk.distribution_loss(torch.nn.functional.linear(h, w, b), TARGET, TEACHER),
        lambda h, w=WEIGHT, b=BIAS: dense_loss(h, w, TARGET, TEACHER, bias=b),
    ),
    "everything": (
        lambda h, w=WEIGHT, b=BIAS: dk.linear_distribution_loss(
            h, w, TARGET, TEACHER, bias=b, hard_weight=0.3, divergence="jensen_shannon", temperature=2.0, z_loss=0.1,
            reduction="sum", chunk_size=2,
        ),
        lambda h, w=WEIGHT, b=BIAS: dense_loss(
            h, w, TARGET, TEACHER, bias=b, hard_weight=0.3, divergence="jensen_shannon", temperature=2.0, z_loss=0.1,
            reduction="sum",
        ),
    ),
    "module": (
        lambda h, w=WEIGHT, b=BIAS: dk.LinearDistributionLoss(label_smoothing=0.1)(h, w, TARGET, bias=b),
        lambda h, w=WEIGHT, b=BIAS: dense_loss(h, w, TARGET, bias=b, label_smoothing=0.1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALARS)
def test_scalar_losses_have_tangents_and_gradients(name: str) -> None:
    ours, exact = SCALARS[name]
    for a, b in zip(*(jvp(f, (HIDDEN, WEIGHT, BIAS), TANGENTS) for f in (ours, exact)), strict=True):
        close(a, b)
    for n in range(3):  # one input at a time
        inputs = [HIDDEN, WEIGHT, BIAS]

        def of(x, f, n=n, inputs=inputs):
            return f(*inputs[:n], x, *inputs[n + 1 :])

        found = [jvp(lambda x, f=f: of(x, f), (inputs[n],), (TANGENTS[n],))[1] for f in (ours, exact)]
        close(*found)
    for a, b in zip(*(grad(f, (0, 1, 2))(HIDDEN, WEIGHT, BIAS) for f in (ours, exact)), strict=True):
        close(a, b)
    seed = torch.tensor(2.0, dtype=torch.float64)
    for a, b in zip(*(vjp(f, HIDDEN, WEIGHT, BIAS)[1](seed) for f in (ours, exact)), strict=True):
        close(a, b)
    close(vmap(ours)(BATCH), torch.stack([exact(one) for one in BATCH]))
    close(vmap(grad(ours))(BATCH), torch.stack([grad(exact)(one) for one in BATCH]))
    close(jacfwd(ours)(HIDDEN), grad(exact)(HIDDEN))


def test_vmap_of_weights_and_labels() -> None:
    weights, targets = torch.randn(B, V, H, dtype=torch.float64), torch.stack([TARGET.roll(n) for n in range(B)])
    ours = vmap(lambda h, w, y: dk.linear_cross_entropy(h, w, y), in_dims=(None, 0, 0))(HIDDEN, weights, targets)
    close(ours, torch.stack([dense_loss(HIDDEN, w, y) for w, y in zip(weights, targets, strict=True)]))
    per_sample = vmap(grad(lambda w, h, y: dk.linear_cross_entropy(h, w, y)), in_dims=(None, 0, 0))(
        WEIGHT, BATCH, targets
    )
    for found, h, y in zip(per_sample, BATCH, targets, strict=True):
        close(found, grad(lambda w, h=h, y=y: dense_loss(h, w, y))(WEIGHT))
    close(grad(lambda w: vmap(lambda h: linear(h, w))(BATCH).sum())(WEIGHT),
          grad(lambda w: sum(oracle(h, w) for h in BATCH))(WEIGHT))  # fmt: skip
    close(jvp(lambda x: vmap(linear)(x).sum(), (BATCH,), (BATCH,))[1],
          jvp(lambda x: sum(oracle(h) for h in x), (BATCH,), (BATCH,))[1])  # fmt: skip


def test_dual_numbers_and_gradcheck() -> None:
    exact = jvp(oracle, (HIDDEN,), TANGENTS[:1])[1]
    with forward_ad.dual_level():
        out = linear(forward_ad.make_dual(HIDDEN, TANGENTS[0]), WEIGHT.clone().requires_grad_())
        tangent = forward_ad.unpack_dual(out).tangent
        close(tangent.detach(), exact)
        with pytest.raises(RuntimeError, match=DOUBLE):  # of the tangent, by the weight
            tangent.backward()
    inputs = [x.clone().requires_grad_() for x in (HIDDEN, WEIGHT, BIAS)]
    assert torch.autograd.gradcheck(linear, inputs, check_forward_ad=True)


def test_row_quantities_under_reverse_mode() -> None:
    def rows(h):
        return dk.linear_cross_entropy(h, WEIGHT, TARGET, reduction="none")

    close(jacrev(rows)(HIDDEN), jacrev(lambda h: dense_loss(h, WEIGHT, TARGET, reduction="none"))(HIDDEN))
    close(grad(entropy)(HIDDEN), grad(dense_entropy)(HIDDEN))
    close(vmap(grad(entropy))(BATCH), torch.stack([grad(dense_entropy)(one) for one in BATCH]))


REFUSED = {
    "jvp_of_rows": (lambda: jvp(lambda h: dk.linear_cross_entropy(h, WEIGHT, TARGET, reduction="none"), (HIDDEN,), (HIDDEN,)), ROWS),
    "jvp_of_statistics": (lambda: jvp(entropy, (HIDDEN,), (HIDDEN,)), ROWS),
    "jvp_of_vmapped_statistics": (lambda: jvp(lambda x: vmap(entropy)(x).sum(), (BATCH,), (BATCH,)), ROWS),
    "jvp_of_exact_terms": (lambda: jvp(lambda h: terms.exact(h, WEIGHT, TARGET, terms.Entropy(value=1.0)).loss, (HIDDEN,), (HIDDEN,)), ROWS),
    "jvp_of_gradient": (lambda: jvp(grad(linear), (HIDDEN,), (HIDDEN,)), DOUBLE),
    "gradient_of_jvp": (lambda: grad(lambda x: jvp(linear, (x,), (HIDDEN,))[1])(HIDDEN), DOUBLE),
    "jvp_of_jvp": (lambda: jvp(lambda x: jvp(linear, (x,), (HIDDEN,))[1], (HIDDEN,), (HIDDEN,)), DOUBLE),
    "gradient_of_gradient": (lambda: grad(lambda x: grad(linear)(x).sum())(HIDDEN), DOUBLE),
    "hessian": (lambda: hessian(linear)(HIDDEN), DOUBLE),
    "jvp_of_gradient_of_statistics": (lambda: jvp(grad(entropy), (HIDDEN,), (HIDDEN,)), DOUBLE),
    "gradient_of_gradient_of_statistics": (lambda: grad(lambda x: grad(entropy)(x).sum())(HIDDEN), DOUBLE),
    "jvp_by_teacher": (lambda: jvp(lambda p: dk.linear_distribution_loss(HIDDEN, WEIGHT, teacher=p), (TEACHER,), (TEACHER,)), "teacher must not be differentiated"),
    "gradient_by_teacher": (lambda: grad(lambda p: dk.linear_distribution_loss(HIDDEN, WEIGHT, teacher=p))(TEACHER), "teacher must not require grad"),
    "jvp_by_row_weight": (lambda: jvp(lambda x: dk.linear_cross_entropy(HIDDEN, WEIGHT, TARGET, row_weight=x), (BATCH[0, :, 0],), (BATCH[0, :, 0],)), "row_weight must not be differentiated"),
    "jvp_in_place": (lambda: jvp(lambda z: dk.cross_entropy(z, TARGET, inplace_gradient=True), (TEACHER,), (TEACHER,)), "no transform of torch.func"),
    "gradient_in_place": (lambda: grad(lambda z: dk.cross_entropy(z, TARGET, inplace_gradient=True))(TEACHER), "no transform of torch.func"),
    "vmap_of_a_stream": (lambda: vmap(lambda h: dk.linear_distribution_loss(h, WEIGHT, teacher=dk.LogitStream(lambda rows: TEACHER[rows])))(BATCH), "teacher must be tensors under torch.vmap"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_value_is_refused(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises((RuntimeError, ValueError), match=message):
        call()


def test_forward_mode_over_backward_is_refused() -> None:
    with forward_ad.dual_level():
        hidden = forward_ad.make_dual(HIDDEN.clone().requires_grad_(), TANGENTS[0])
        with pytest.raises(RuntimeError, match=DOUBLE):
            torch.autograd.grad(linear(hidden), hidden)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("transform", [lambda f: grad(f), lambda f: lambda h: jvp(f, (h,), (h,))[1]])
def test_transforms_inside_of_a_compiled_graph_are_refused(transform) -> None:
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"transforms of torch.func .* must be of an eager call"):
        torch.compile(transform(linear), backend="eager", fullgraph=True)(HIDDEN)
