"""Sparse teachers and mixtures: what the table of cases does not say of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import PRESENT, top_k

import dft_kernels
from dft_kernels import Labels, LogitStream, Mixture, TeacherHead, TeacherLogits, TopK
from dft_kernels.testing import dense_loss, record_allocations, relative_error

N, H, V, K = 24, 12, 201, 9


def problem(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden, weight and a teacher's logits"""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64)
    logits = 2 * torch.randn(N, V, generator=generator, dtype=torch.float64)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), logits.to(dtype)


def gradients(loss: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("backend", PRESENT)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_statistics_and_their_gradients(backend: str, temperature: float) -> None:
    """A sparse divergence beside entropy, features, column means: one backward for all of them."""
    dtype = torch.float32 if backend == "triton" else torch.float64
    hidden, weight, logits = problem(dtype)
    teacher = top_k(logits, K, temperature)
    features = torch.randn(V, 3, generator=torch.Generator().manual_seed(1), dtype=dtype)
    group = torch.arange(N) % 2
    group_of_mean = torch.linspace(-1, 1, 2 * V, dtype=dtype).reshape(2, V)
    seen = dft_kernels.linear_distribution_statistics(
        hidden, weight, torch.arange(N) * 7 % V, teacher, divergence="jensen_shannon", temperature=temperature,
        features=features, group=group, num_groups=2, backend=backend, chunk_size=10,
    )  # fmt: skip
    assert seen.divergence is not None
    assert seen.features is not None
    mixed = (
        seen.divergence.sum() + 0.3 * seen.entropy.sum() + seen.features.square().sum()
        + (seen.mean_probability * group_of_mean).sum()
    )  # fmt: skip
    found = gradients(mixed, hidden, weight)

    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    z = wide[0] @ wide[1].t()
    q, log_q = z.softmax(-1), z.log_softmax(-1)
    divergence = dense_loss(
        *wide, teacher=teacher, divergence="jensen_shannon", temperature=temperature, reduction="sum"
    )
    means = torch.stack([q[group == g].mean(0) for g in (0, 1)])
    exact = (
        divergence - 0.3 * (q * log_q).sum() + (q @ features.double()).square().sum()
        + (means * group_of_mean.double()).sum()
    )  # fmt: skip
    for ours, truth in zip(found, gradients(exact, *wide), strict=True):
        assert relative_error(ours, truth) < (1e-5 if dtype == torch.float32 else 1e-11)


@pytest.mark.parametrize("backend", PRESENT)
def test_metrics(backend: str) -> None:
    hidden, weight, logits = problem(torch.float32)
    with torch.no_grad():
        logits[::2] = (hidden @ weight.t())[::2]  # these rows agree
    target = (hidden @ weight.t()).argmax(-1)
    target[::3] += 1
    _, metrics = dft_kernels.linear_distribution_loss(
        hidden, weight, target % V, top_k(logits, K), hard_weight=0.5, backend=backend, return_metrics=True
    )
    best = (hidden @ weight.t()).argmax(-1)
    torch.testing.assert_close(metrics.teacher_agreement, best == logits.argmax(-1))
    torch.testing.assert_close(metrics.correct, best == target % V)
    alone = dense_loss(hidden, weight, teacher=top_k(logits, K), reduction="none")
    torch.testing.assert_close(metrics.soft_loss.double(), alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", PRESENT)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize("mass", [1e-12, 1e-6, 1 - 1e-6])
def test_tail_mass_near_0_and_near_1(mass: float, divergence: str, backend: str) -> None:
    """A model whose own tail is that small, or that large, against a teacher whose tail is one half: the sum over the
    tail keeps its digits where 1 - sum would not."""
    dtype = torch.float32
    generator = torch.Generator().manual_seed(3)
    index = torch.stack([torch.randperm(V, generator=generator)[:K] for _ in range(N)])
    z = torch.randn(N, V, generator=generator, dtype=torch.float64)
    inside = z.gather(1, index)
    outside = z.scatter(1, index, -torch.inf)
    move = torch.log(torch.tensor((1 - mass) / mass)) - inside.logsumexp(-1) + outside.logsumexp(-1)
    z = z.scatter(1, index, inside + move[:, None]).to(dtype).requires_grad_()
    teacher = TopK(index, torch.full((N, K), 0.5 / K).log(), torch.full((N,), 0.5).log())
    loss = dft_kernels.distribution_loss(z, teacher=teacher, divergence=divergence, backend=backend, reduction="sum")
    ours = gradients(loss, z)
    wide = z.detach().double().requires_grad_()
    exact = gradients(dense_loss(wide, None, teacher=teacher, divergence=divergence, reduction="sum"), wide)
    for found, truth in zip(ours, exact, strict=True):
        assert relative_error(found, truth) < 2e-5
    tail = torch.ones(N, V, dtype=torch.bool).scatter(1, index, False)
    assert relative_error(ours[1][tail], exact[1][tail]) < 2e-5  # and there, not in the norm of the whole alone


def test_a_bucket_is_a_lower_bound_that_more_tokens_tighten() -> None:
    hidden, weight, logits = problem()
    hidden, weight = hidden.detach(), weight.detach()
    exact = float(dft_kernels.linear_distribution_loss(hidden, weight, teacher=logits))
    found = [
        float(dft_kernels.linear_distribution_loss(hidden, weight, teacher=top_k(logits, k))) for k in (1, 8, 64, V)
    ]
    assert found == sorted(found)
    assert found[-1] == pytest.approx(exact, rel=1e-10)
    assert found[0] < 0.9 * exact


def test_nothing_of_size_rows_by_vocabulary_is_made() -> None:
    hidden, weight = torch.randn(512, 16, requires_grad=True), torch.randn(20000, 16, requires_grad=True)
    teacher = top_k(torch.randn(512, 20000), 16)
    dft_kernels.release_scratch()
    with record_allocations() as seen:
        dft_kernels.linear_distribution_loss(
            hidden, weight, teacher=teacher, chunk_size=32, backend="reference"
        ).backward()
    assert seen.largest <= 32 * 20000 * 4 + 4096


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"indices": (3, 2, V)}, rf"teacher.indices must hold ids in 0..{V - 1}, got {V} at row 3"),
        ({"indices": (3, 2, -1)}, r"got -1 at row 3"),
        ({"indices": (5, 1, "copy")}, r"hold distinct ids in a row, got \d+ twice at row 5"),
        ({"log_probs": (4, 0, 0.25)}, r"teacher.log_probs must hold logarithms.*got 0.25 at row 4"),
        ({"log_probs": (4, 0, float("nan"))}, r"none above 0 or NaN, got nan at row 4"),
        ({"tail_log_prob": (7, None, -0.01)}, r"sum to 1 in probability with tail_log_prob, got 1\.\d+ at row 7"),
        ({"tail_log_prob": (7, None, -30.0)}, r"sum to 1 in probability with tail_log_prob, got 0\.\d+ at row 7"),
    ],
)
def test_wrong_values_are_refused_by_row(change: dict[str, Any], said: str) -> None:
    hidden, weight, logits = problem(torch.float32)
    good = top_k(logits, K)
    assert good.tail_log_prob is not None
    parts = {
        "indices": good.indices.clone(),
        "log_probs": good.log_probs.clone(),
        "tail_log_prob": good.tail_log_prob.clone(),
    }
    for name, (row, column, value) in change.items():
        at = row if column is None else (row, column)
        parts[name][at] = parts[name][row, 0] if value == "copy" else value
    with pytest.raises(ValueError, match=said):
        dft_kernels.linear_distribution_loss(hidden, weight, teacher=TopK(**parts))
    target = torch.zeros(N, dtype=torch.int64)
    target[[row for row, *_ in change.values()]] = -100  # an ignored row may hold anything
    assert torch.isfinite(dft_kernels.linear_distribution_loss(hidden, weight, target, TopK(**parts)))


def test_a_sum_above_1_is_refused_but_not_its_rounding() -> None:
    hidden, weight, logits = problem(torch.float32)
    peaked = 20 * logits  # nearly all of the mass in the first few: rounded to bf16 some rows sum to more than 1
    rounded = top_k(peaked.bfloat16(), K, with_tail=False)
    assert float(rounded.log_probs.float().exp().sum(-1).max()) > 1
    assert torch.isfinite(dft_kernels.linear_distribution_loss(hidden, weight, teacher=rounded))
    raised = TopK(rounded.indices, (rounded.log_probs.float() + 0.02).clamp(max=0.0))
    with pytest.raises(ValueError, match=r"sum to at most 1 in probability, got 1\.0"):
        dft_kernels.linear_distribution_loss(hidden, weight, teacher=raised)


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (lambda t, z: TopK(t.indices.int(), t.log_probs), {}, "teacher.indices must be int64"),
        (lambda t, z: TopK(t.indices[:-1], t.log_probs), {}, r"teacher.indices must have shape \[24, 9\]"),
        (lambda t, z: TopK(t.indices, t.log_probs[:, 1:]), {}, r"teacher.log_probs must have shape \[24, 9\]"),
        (lambda t, z: TopK(t.indices, t.log_probs, t.log_probs), {}, r"teacher.tail_log_prob must have shape \[24\]"),
        (lambda t, z: TopK(t.indices, t.log_probs, tail="clamp"), {}, "teacher.tail must be one of bucket"),
        (lambda t, z: t, {"temperature": 2.0}, "teacher_temperature must be 1.0, at which this TopK was captured"),
        (lambda t, z: TopK(t.indices, t.log_probs, tail="renormalise"), {"divergence": "reverse_kl"}, "infinite there"),
        (lambda t, z: Mixture([z, t], [0.5, 0.5]), {}, 'TopK must have tail="renormalise" in a mixture'),
        (lambda t, z: Mixture([z, z], [0.5, 0.6]), {}, "Mixture weights must sum to 1"),
        (lambda t, z: Mixture([z, z], [1.5, -0.5]), {}, "Mixture weights must be greater than 0"),
        (lambda t, z: Mixture([z], [0.5, 0.5]), {}, "one weight for each of its teachers"),
        (lambda t, z: Mixture([z, Labels()], [0.5, 0.5]), {}, r"Labels\(\) must come with target"),
        (lambda t, z: Mixture([z], [1.0], kind="mean"), {}, "Mixture kind must be one of linear, log_linear"),
        (lambda t, z: Mixture([Mixture([z], [1.0])], [1.0]), {}, "Multiply the weights out"),
        (lambda t, z: TeacherLogits(torch.cat([z, z], 1)), {}, f"give the teacher vocab_size={V}"),
        (lambda t, z: TeacherLogits(torch.cat([z, z], 1), vocab_size=7), {}, f"vocab_size must be the model's.* {V}"),
        (lambda t, z: TeacherLogits(z[:, 1:]), {}, rf"slice its head: weight\[:{V - 1}\]"),
        (lambda t, z: TeacherLogits(z[:, 1:], vocab_size=V), {}, f"at most the teacher's of {V - 1}"),
    ],
)  # fmt: skip
def test_wrong_teachers_are_refused(make: Any, options: dict[str, Any], said: str) -> None:
    hidden, weight, logits = problem(torch.float32)
    with pytest.raises((ValueError, TypeError), match=said):
        dft_kernels.linear_distribution_loss(hidden, weight, teacher=make(top_k(logits, K), logits), **options)


def test_a_mixture_reads_its_streams_once_and_to_their_end() -> None:
    hidden, weight, logits = problem(torch.float32)

    def mixture(*chunks: torch.Tensor) -> Mixture:
        return Mixture([LogitStream(iter(chunks)), logits], [0.3, 0.7])

    streamed = mixture(logits[:5], logits[5:])
    whole = dft_kernels.linear_distribution_loss(hidden, weight, teacher=streamed)
    torch.testing.assert_close(whole, dft_kernels.linear_distribution_loss(hidden, weight, teacher=logits))
    with pytest.raises(ValueError, match="must be an unread stream"):
        dft_kernels.linear_distribution_loss(hidden, weight, teacher=streamed)
    with pytest.raises(ValueError, match=r"reduction='none'"):
        dft_kernels.linear_distribution_loss(hidden, weight, teacher=mixture(logits), reduction="none")
    with pytest.raises(ValueError, match="source must end after 24 rows"):
        dft_kernels.linear_distribution_loss(hidden, weight, teacher=mixture(logits, logits))


def test_a_label_in_the_mixture_is_the_cross_entropy_of_forward_kl() -> None:
    hidden, weight, logits = problem()
    target = torch.arange(N)
    head = TeacherHead(torch.eye(N, dtype=torch.float64), logits.t().contiguous())
    mixed = dft_kernels.linear_distribution_loss(hidden, weight, target, Mixture([Labels(), head], [0.2, 0.8]))
    apart = dft_kernels.linear_distribution_loss(hidden, weight, target, head, hard_weight=0.2, soft_weight=0.8)
    for ours, other in zip(gradients(mixed, hidden, weight)[1:], gradients(apart, hidden, weight)[1:], strict=True):
        assert relative_error(ours, other) < 1e-11


def test_sparse_teachers_compile_into_one_graph() -> None:
    hidden, weight, logits = problem(torch.float32)
    teacher = top_k(logits, K)

    def step(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = dft_kernels.linear_distribution_loss(
            hidden, weight, teacher=teacher, divergence="reverse_kl"
        )
        return loss

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for ours, eager in zip(
        gradients(compiled(hidden, weight), hidden, weight),
        gradients(step(hidden, weight), hidden, weight),
        strict=True,
    ):
        torch.testing.assert_close(ours, eager)
