"""logits_dtype=: logits in the input dtype where that is asked for, and never else."""

from __future__ import annotations

import pytest
import torch
from cases import PRESENT

import dft_kernels as dk
from dft_kernels.testing import dense_loss, relative_error

N, H, V, R = 37, 24, 83, 2
NARROW = (torch.bfloat16, torch.float16)
CASES = {
    "cross_entropy": {},
    "smoothed": {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0, "logit_scale": 0.7},
    "forward_kl": {"teacher": "logits", "temperature": 2.0},
    "teacher_head": {"teacher": "head", "hard_weight": 0.5},
    "jensen_shannon": {"teacher": "logits", "divergence": "jensen_shannon"},
    "top_k": {"teacher": "top_k", "hard_weight": 0.5},
    "low_rank": {"low_rank": True},
}


def make(case: str, dtype: torch.dtype) -> tuple[list[torch.Tensor], dict[str, object]]:
    """hidden, weight, bias; and the options of a call."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    leaves = [random(N, H), random(V, H), random(V)]
    options = dict(CASES[case])
    target = torch.randint(0, V, (N,), generator=generator)
    target[3] = -100
    options["target"] = target
    if options.get("teacher") == "logits":
        options["teacher"] = random(N, V)
    elif options.get("teacher") == "head":
        options["teacher"] = dk.TeacherHead(random(N, 8), random(V, 8))
    elif options.get("teacher") == "top_k":
        found = random(N, V).float().log_softmax(-1).topk(5)
        options["teacher"] = dk.TopK(found.indices, found.values)
    if options.get("low_rank"):
        options["low_rank"] = (random(N, R), random(V, R))
    return leaves, options


def rounded(leaves: list[torch.Tensor], options: dict[str, object], dtype: torch.dtype):
    """The loss in float64 on logits that were rounded to `dtype`, and its gradients, by the identity's for rounding."""
    wide = [leaf.double().requires_grad_() for leaf in leaves]
    more = dict(options)
    product = wide[0] @ wide[1].T
    if (pair := more.pop("low_rank", None)) is not None:
        product = product + pair[0].double() @ pair[1].double().T
    logits = product + wide[2]
    held = logits + (logits.detach().to(dtype).double() - logits.detach())
    teacher = more.pop("teacher", None)
    if isinstance(teacher, dk.TeacherHead):
        teacher = (teacher.hidden.double() @ teacher.weight.double().T).to(dtype).double()
    elif isinstance(teacher, torch.Tensor):
        teacher = teacher.double()
    eye = torch.eye(V, dtype=torch.float64)
    loss = dense_loss(held, eye, more.pop("target"), teacher, **more)
    return loss.detach(), torch.autograd.grad(loss, wide)


@pytest.mark.parametrize("backend", PRESENT)
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.kept(where=lambda case, dtype, backend: dtype == torch.bfloat16 or case == "smoothed")
def test_rounded_logits(backend, dtype, case):
    """A logit may be rounded to its other neighbour, where a sum of another order lies on the other side of a tie, or a
    low-rank product is added to what was rounded; so a tenth of what rounding itself costs is allowed."""
    leaves, options = make(case, dtype)
    right, gradients = rounded(leaves, options, dtype)
    eps = torch.finfo(dtype).eps
    for chunk_size in (N, 8):
        given = [leaf.clone().requires_grad_() for leaf in leaves]
        loss = dk.linear_distribution_loss(
            *given[:2], bias=given[2], backend=backend, chunk_size=chunk_size, logits_dtype=dtype, **options
        )
        assert abs(loss.item() - float(right)) < eps * max(1.0, abs(float(right)))
        found = torch.autograd.grad(loss, given)
        for gradient, exact in zip(found, gradients, strict=True):
            assert gradient.dtype == dtype
            assert relative_error(gradient, exact) < 3 * eps


@pytest.mark.parametrize("backend", PRESENT)
def test_what_it_costs_near_agreement(backend):
    """With fp32 logits, the default, the gradient of a small KL is right; with bf16 logits it is mostly rounding."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((N, H), (V, H)))
    near = ((hidden.double() @ weight.double().T) + 0.02 * torch.randn(N, V, generator=generator)).float()
    wide = hidden.double().requires_grad_()
    (exact,) = torch.autograd.grad(dense_loss(wide, weight.double(), None, near.double()), wide)
    errors = []
    for logits_dtype in (None, torch.float32, torch.bfloat16):
        leaf = hidden.clone().requires_grad_()
        loss = dk.linear_distribution_loss(leaf, weight, teacher=near, backend=backend, logits_dtype=logits_dtype)
        (found,) = torch.autograd.grad(loss, leaf)
        errors.append(relative_error(found, exact))
    assert errors[0] == errors[1] < 0.01
    assert errors[2] > 0.1


@pytest.mark.parametrize("backend", PRESENT)
def test_statistics_and_rows(backend):
    leaves, options = make("forward_kl", torch.bfloat16)
    options = {"teacher": options["teacher"], "target": options["target"], "backend": backend}
    narrow = dk.linear_distribution_statistics(*leaves[:2], logits_dtype=torch.bfloat16, **options)
    logits = torch.nn.functional.linear(*leaves[:2])
    valid = options["target"] != -100
    assert relative_error(narrow.lse[valid], logits.double().logsumexp(-1)[valid]) < 1e-3
    rows = dk.linear_distribution_loss(*leaves[:2], reduction="none", logits_dtype=torch.bfloat16, **options)
    assert relative_error(rows, narrow.divergence) < 1e-5


@pytest.mark.parametrize("backend", PRESENT)
def test_half_the_scratch(backend):
    from dft_kernels.loss.build import build
    from dft_kernels.loss.functional import LINEAR_DISTRIBUTION_LOSS
    from dft_kernels.loss.planning import row_bytes

    leaves, options = make("teacher_head", torch.bfloat16)
    target, teacher = options["target"], options["teacher"]
    bytes_of = [
        row_bytes(
            build(
                LINEAR_DISTRIBUTION_LOSS,
                *leaves[:2],
                target,
                teacher,
                {"backend": backend, "logits_dtype": logits_dtype},
            )
        )
        for logits_dtype in (None, torch.bfloat16)
    ]
    assert bytes_of[0] == 2 * bytes_of[1]


def test_what_it_takes():
    hidden, weight, target = torch.randn(3, 4).bfloat16(), torch.randn(5, 4).bfloat16(), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"logits_dtype must be None, torch\.float32, or the dtype of input, got"):
        dk.linear_cross_entropy(hidden, weight, target, logits_dtype=torch.float16)
    with pytest.raises(TypeError, match="logits_dtype must be None"):
        dk.linear_cross_entropy(hidden, weight, target, logits_dtype="bfloat16")
    with pytest.raises(TypeError, match="logits_dtype must be a keyword that it takes"):
        dk.cross_entropy(hidden, target, logits_dtype=torch.bfloat16)
    wide = [
        dk.linear_cross_entropy(hidden.float(), weight.float(), target, logits_dtype=d) for d in (None, torch.float32)
    ]
    assert torch.equal(*wide)
