"""token_statistics beside dense PyTorch in float64, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import PRESENT, Case, leaves, make, present
from torch.nn.functional import linear

import dft_kernels as dk
from dft_kernels.testing import allowance, conditions, one_after_the_other, record_allocations, relative_error

CASES = {
    case.name: case
    for case in (
        Case("at 1"),
        Case("hot", options={"temperature": 1.7}, tensors=("bias",)),
        Case("cold", options={"temperature": 0.6, "chunk_size": 5}, target="all_valid"),
        Case("capped", options={"temperature": 0.7, "softcap": 3.0, "logit_scale": 0.5}, tensors=("bias",)),
        Case("low rank", options={"temperature": 0.7, "softcap": 5.0}, tensors=("low_rank",)),
        Case("not compacted", options={"temperature": 0.7, "compact": False}),
        Case("negative scale", options={"temperature": 2.0, "logit_scale": -0.5}),
        Case("all ignored", options={"temperature": 0.7}, target="all_ignored"),
        Case("no rows", shape=(0, 7, 13), options={"temperature": 0.7}),
        Case("one class", shape=(5, 3, 1)),
        Case("wide", shape=(7, 64, 5003), options={"temperature": 0.7}),
    )
}
DIFFERENTIABLE, DETACHED = ("log_prob", "entropy", "lse"), ("log_sum_sq_probs", "mean_logits", "is_top1")
ALL = (*DIFFERENTIABLE, *DETACHED)


def dense(arguments: dict[str, Any]) -> list[torch.Tensor]:
    """Every float output, and the gradients of a weighted sum of the differentiable ones."""
    wide = {k: v.detach().double().requires_grad_() if k in ("hidden", "weight", "bias") else v
            for k, v in arguments.items()}  # fmt: skip
    if "low_rank" in wide:
        wide["low_rank"] = tuple(part.detach().double().requires_grad_() for part in wide["low_rank"])
    z = linear(wide["hidden"], wide["weight"], wide.get("bias"))
    if "low_rank" in wide:
        z = z + linear(*wide["low_rank"])
    z = z * wide.get("logit_scale", 1.0)
    if "softcap" in wide:
        z = wide["softcap"] * torch.tanh(z / wide["softcap"])
    z = z / wide.get("temperature", 1.0)
    target = wide["target"]
    valid, log_q = target != -100, z.log_softmax(-1)
    out = [
        log_q.gather(1, target.clamp(min=0)[:, None])[:, 0],
        -(log_q.exp() * log_q).sum(-1),
        z.logsumexp(-1),
        (2 * log_q).logsumexp(-1),
        z.mean(-1),
    ]
    out = [torch.where(valid, one, 0.0) for one in out]
    return [*(one.detach() for one in out), *torch.autograd.grad(weighed(out[:3]), leaves(wide))]


def weighed(rows: list[torch.Tensor]) -> torch.Tensor:
    parts = (torch.linspace(0.5 + n, 1.5, len(row), dtype=row.dtype) * row for n, row in enumerate(rows))
    return sum(part.sum() for part in parts)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [(dtype, one) for dtype in (torch.float32, torch.bfloat16, torch.float64) for one in present(dtype)],
)
@pytest.mark.parametrize("name", list(CASES))
def test_values_and_gradients(dtype: torch.dtype, backend: str, name: str) -> None:
    """Within the error gate of a loss: the products, the exponentials, and the sums over rows of the gradients."""
    case = CASES[name]
    arguments = make(case, dtype)
    found = dk.token_statistics(**arguments, outputs=ALL, backend=backend)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows = [getattr(found, one) for one in (*DIFFERENTIABLE, *DETACHED[:2])]
    assert all(row.dtype == wide and row.shape == (case.shape[0],) for row in rows)
    ours = [*rows, *torch.autograd.grad(weighed(rows[:3]), leaves(arguments))]
    plain = {key: value for key, value in arguments.items() if key not in ("compact", "chunk_size")}
    exact = dense(plain)
    n, h, v = case.shape
    condition = conditions(dense, plain, exact)
    for row in (3, 4):  # differences of log-sum-exps, or with one, each of which is rounded
        condition[row] *= max(1.0, 4 * float(exact[2].norm() / exact[row].norm().clamp(min=1e-3)))
    over_vocab = one_after_the_other(v) if 1 in (n, arguments.get("chunk_size")) else v
    last = [v, v, v, v, v, over_vocab, *([n] * (len(exact) - 6))]
    for value, truth, by, length in zip(ours, exact, condition, last, strict=True):
        gate = allowance(truth, value.dtype, by, (h, v, length))
        assert relative_error(value, truth) <= (max(gate, 1e-12) if dtype == torch.float64 else gate)


@pytest.mark.parametrize("backend", PRESENT)
def test_top_1_and_shapes(backend: str) -> None:
    """Of [B, T] tokens; an earlier token of the same logit comes first, and an ignored one is none."""
    weight = torch.eye(3)[[0, 1, 1, 2]]
    hidden = torch.eye(3).expand(2, 3, 3)
    target = torch.tensor([[0, 1, 3], [1, 2, -100]])
    found = dk.token_statistics(hidden, weight, target, outputs=ALL, temperature=0.5, backend=backend)
    assert found.is_top1.tolist() == [[True, True, True], [False, False, False]]
    assert found.is_top1.dtype == torch.bool
    for name in ALL:
        assert getattr(found, name).shape == (2, 3)
        assert float(getattr(found, name)[1, 2]) == 0.0


@pytest.mark.parametrize("backend", present(torch.float64))
def test_gradcheck(backend: str) -> None:
    arguments = make(Case("", (4, 3, 7), {"temperature": 0.7, "softcap": 3.0}, tensors=("bias",)), torch.float64)

    def function(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
        found = dk.token_statistics(
            **{**arguments, "hidden": hidden, "weight": weight, "bias": bias}, outputs=DIFFERENTIABLE, backend=backend
        )
        return found.log_prob, found.entropy, found.lse

    assert torch.autograd.gradcheck(function, leaves(arguments))


def test_only_what_was_asked() -> None:
    arguments = make(Case(""), torch.float32)
    for name in ALL:
        found = dk.token_statistics(**arguments, outputs=(name,))
        assert [one for one in ALL if getattr(found, one) is not None] == [name]
        assert getattr(found, name).requires_grad == (name in DIFFERENTIABLE)
    some = dk.token_statistics(**arguments)
    assert [one for one in ALL if getattr(some, one) is not None] == ["log_prob", "entropy"]
    with torch.no_grad():
        assert not dk.token_statistics(**arguments).log_prob.requires_grad


def test_masked_logits() -> None:
    """A token that a bias of -inf forbids."""
    arguments = make(Case("", options={"temperature": 0.7}, tensors=("bias",)), torch.float32)
    with torch.no_grad():
        arguments["bias"][3] = -torch.inf
    arguments["target"].clamp_(max=2)
    found = dk.token_statistics(**arguments, outputs=ALL)
    kept = [n for n in range(101) if n != 3]
    less = {**arguments, "weight": arguments["weight"][kept], "bias": arguments["bias"][kept]}
    same = dk.token_statistics(**less, outputs=ALL)
    for name in (*DIFFERENTIABLE, "log_sum_sq_probs"):
        assert relative_error(getattr(found, name), getattr(same, name)) < 1e-5, name
    assert torch.equal(found.is_top1, same.is_top1)
    assert bool((found.mean_logits[arguments["target"] != -100] == -torch.inf).all())


def test_it_compiles() -> None:
    arguments = make(CASES["capped"], torch.float32)

    def function(hidden: torch.Tensor) -> torch.Tensor:
        found = dk.token_statistics(**{**arguments, "hidden": hidden}, outputs=ALL)
        return found.log_prob.sum() + found.entropy.sum() + found.log_sum_sq_probs.sum() + found.is_top1.sum()

    torch.compiler.reset()
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    results = [one(arguments["hidden"]) for one in (function, compiled)]
    gradients = [torch.autograd.grad(one, arguments["hidden"])[0] for one in results]
    assert torch.equal(*results)
    assert torch.equal(*gradients)


def test_no_logits_are_held() -> None:
    """64 chunks: a few of them, and not the [N, V] logits, at any time."""
    arguments = make(Case("", (1024, 16, 4000), {"temperature": 0.7, "chunk_size": 16}), torch.float32)
    with record_allocations() as seen:
        found = dk.token_statistics(**arguments, outputs=ALL)
        (found.log_prob.sum() + found.entropy.sum()).backward()
    assert seen.peak < 1024 * 4000 * 4 / 8


WRONG = {
    "outputs must be some of log_prob, entropy, lse, log_sum_sq_probs, mean_logits, is_top1, got 'logits'": {
        "outputs": ("log_prob", "logits")
    },
    "outputs must be some of log_prob, .*, got 'entropy'": {"outputs": "entropy"},
    "outputs must be some of log_prob, .*, got None": {"outputs": None},
    "temperature must be greater than 0, got 0": {"temperature": 0},
    "temperature must be greater than 0, got inf": {"temperature": float("inf")},
    r"target must have shape \[29\]": {"target": torch.zeros(3, dtype=torch.int64)},
    "target must be a tensor of labels, got NoneType": {"target": None},
    "target must hold labels in 0..100 or -100": {"target": torch.full((29,), 101)},
    "softcap must be greater than 0 or None": {"softcap": -1.0},
    r"low_rank must be two tensors \(down \[..., r\], up \[V, r\]\)": {"low_rank": torch.zeros(2)},
    "teacher must be a keyword that it takes": {"teacher": torch.zeros(29, 101)},
    "reduction must be a keyword that it takes": {"reduction": "mean"},
    "temprature must be a keyword that it takes, got one that it does not. Did you mean temperature": {
        "temprature": 1.0
    },
}


@pytest.mark.parametrize("message", list(WRONG))
def test_wrong_arguments(message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"(token_statistics|dft_kernels): {message}"):
        dk.token_statistics(**{**make(Case(""), torch.float32), **WRONG[message]})
