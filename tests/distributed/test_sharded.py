"""The vocabulary over several processes: every result against one process, and what travels."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import CASES, differentiate, leaves, make
from divided import BACKENDS, COUNT, RANK, close, divided, own, refused, sizes, whole
from two_processes import on

import dft_kernels as dk
from dft_kernels.distributed import count_labels, gather_rows, shift_labels
from dft_kernels.distributed import shards as shards_module
from dft_kernels.distributed import sums as sums_module

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo")
SCALE = str(Path(__file__).parents[2] / "bench" / "scale.py")


@contextmanager
def sent() -> Iterator[list[int]]:
    """Bytes that this process gives to each collective: what each of the others is sent, n - 1 times."""
    found: list[int] = []

    def all_gather(out: torch.Tensor, mine: torch.Tensor, **more: Any) -> Any:
        found.append((COUNT - 1) * mine.numel() * mine.element_size())
        return gather(out, mine, **more)

    def all_to_all(out: torch.Tensor, mine: torch.Tensor, **more: Any) -> Any:
        found.append((COUNT - 1) * mine.numel() * mine.element_size() // COUNT)
        return exchange(out, mine, **more)

    gather, exchange = shards_module.all_gather, dist.all_to_all_single
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards_module, "all_gather", all_gather)
        patch.setattr(sums_module, "all_gather", all_gather)
        patch.setattr(dist, "all_to_all_single", all_to_all)
        yield found


def travels(folder: Path) -> None:
    """What docs/scale.md says (bench/scale.py), and an agreement of 9 numbers a call; nothing of size V."""
    n, h, v, rows = 92, 15, 4096, 32
    collectives, generator = runpy.run_path(SCALE)["collectives"], torch.Generator().manual_seed(0)
    hidden = torch.randn(n, h, generator=generator, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(v, h, generator=generator, dtype=torch.bfloat16)[own(v, "even")].clone().requires_grad_()
    target = torch.randint(0, v, (n,), generator=generator)
    index = torch.stack([torch.randperm(v, generator=generator)[:5] for _ in range(n)])
    top = dk.TopK(index, torch.full((n, 5), 0.1).log(), torch.full((n,), 0.5).log())
    teacher = torch.randn(n, v, generator=generator)
    agreement = (COUNT - 1) * 9 * 8
    for given, statistics in (
        ({}, (3,)),  # LOG_PROB, LSE and its low part
        ({"teacher": teacher}, (6, 2)),  # three log-sum-exps; DIVERGENCE and SLOPE
        ({"teacher": teacher, "hard_weight": 0.5}, (7, 2)),
        ({"teacher": top}, (4 + 5 + 2,)),  # of k tokens and of the tail
    ):
        call = {"hidden": hidden, "weight": weight, "target": target, "process_group": dist.group.WORLD, **given}
        dk.linear_distribution_loss(**call)  # sizes are known after it
        with sent() as found:
            dk.linear_distribution_loss(**call, chunk_size=rows).backward()
        expected = collectives(COUNT, n, h, rows, statistics)
        assert sum(found) == agreement + sum(one.leaves for one in expected), (given.keys(), found)
        assert len(found) == 1 + sum(one.calls for one in expected), (given.keys(), found)
        assert max(found) < v * 2  # less than a row of logits
    with sent() as found:  # nothing of hidden states, whose gradient nobody asks for
        dk.linear_distribution_loss(hidden.detach(), weight, target, process_group=dist.group.WORLD, chunk_size=rows)
    assert sum(found) == agreement + (COUNT - 1) * n * 4 * 3, found
    hidden = hidden.detach()[RANK * (n // COUNT) : (RANK + 1) * (n // COUNT)].clone().requires_grad_()
    call = {"weight": weight, "target": target, "process_group": dist.group.WORLD, "sum_hidden_gradient": False}
    with sent() as found:
        every = gather_rows(hidden, dist.group.WORLD)
        dk.linear_distribution_loss(every, **call, chunk_size=rows).backward()
    expected = collectives(COUNT, n, h, rows, (3,), sequence=True)
    agreement += (COUNT - 1) * 8  # of shapes, for gather_rows
    assert sum(found) == agreement + sum(one.leaves for one in expected), found


def statistics(folder: Path) -> None:
    """Statistics, their gradients, token statistics, metrics: as in one process, of parts in each."""
    cases = (("every_statistic", "odd"), ("topk_everything", "even"), ("every_statistic_rows", "odd"))
    for (case, how), backend in product(cases, BACKENDS):
        arguments = {**make(CASES[case], torch.float32), "backend": backend}
        mine = divided(arguments, how)
        loss, metrics = dk.linear_distribution_loss(**{**mine, "return_metrics": True})
        exact, expected = dk.linear_distribution_loss(**{**arguments, "return_metrics": True})
        close(loss, exact, case)
        for name in (
            "hard_loss",
            "soft_loss",
            "entropy",
            "lse",
            "correct",
            "teacher_agreement",
            "log_prob",
            "features",
        ):
            if getattr(expected, name) is not None:
                close(getattr(metrics, name), getattr(expected, name), name)
        if expected.mean_probability is not None:
            close(whole(metrics.mean_probability, 1), expected.mean_probability, "mean_probability")
        taken = {"hidden", "weight", "target", "teacher", "bias", "group", "num_groups", "features", "row_weight"}
        taken |= {
            "temperature",
            "teacher_temperature",
            "divergence",
            "softcap",
            "logit_scale",
            *("process_group", "backend"),
            "backend",
        }
        gradients = []
        for given in (arguments, mine):
            found = dk.linear_distribution_statistics(**{k: v for k, v in given.items() if k in taken})
            part = own(arguments["weight"].shape[0], how) if given is mine else slice(None)
            pull = torch.linspace(-1, 1, arguments["weight"].shape[0])[part]
            total = (found.mean_probability @ pull).sum()
            if given is mine:  # the sum over all columns, as each of them has it
                total = total + (whole(found.mean_probability.detach() @ pull, -1).sum() - total.detach())
            total = total + found.entropy.square().sum() + (found.divergence * 0.3).sum() + found.lse.sum()
            total = total + (0 if found.features is None else found.features.sin().sum())
            gradients.append([found, torch.autograd.grad(total, [given["hidden"], given["weight"]])])
        (expected, (dhidden, dweight)), (found, (own_dhidden, own_dweight)) = gradients
        for name in ("log_prob", "entropy", "lse", "divergence"):
            close(getattr(found, name), getattr(expected, name), name)
        close(whole(found.mean_probability, 1), expected.mean_probability, "mean_probability")
        close(own_dhidden, dhidden, f"dhidden of statistics, {case}")
        close(whole(own_dweight), dweight, "dweight of statistics")
    arguments = make(CASES["cross_entropy_bias"], torch.float32)
    outputs = ("log_prob", "entropy", "lse", "log_sum_sq_probs", "mean_logits", "is_top1")
    expected, found = (
        dk.token_statistics(**given, outputs=outputs, temperature=0.7)
        for given in (arguments, divided(arguments, "odd"))
    )
    for name in outputs:
        close(getattr(found, name), getattr(expected, name), name)


def narrow(folder: Path) -> None:
    """Logits in the input dtype: as in one process, but for the sum of two parts of dhidden."""
    for case in ("everything", "topk_everything"):
        arguments = make(CASES[case], torch.bfloat16)
        mine = divided(arguments, "odd")
        for backend in BACKENDS:
            more = {"backend": backend, "logits_dtype": torch.bfloat16}
            exact, found = (
                differentiate(dk.linear_distribution_loss(**given, **more), leaves(given))
                for given in (arguments, mine)
            )
            found[2] = whole(found[2])
            for ours, theirs in zip(found[:3], exact[:3], strict=True):
                assert dk.testing.relative_error(ours, theirs) < 0.005


def maxima(folder: Path) -> None:
    """correct and teacher_agreement where maxima are in other parts, and equal ones in several."""
    n, v = 64, 12
    generator = torch.Generator().manual_seed(3)
    logits = torch.randint(0, 3, (n, v), generator=generator).float()  # ties everywhere
    teacher = torch.randint(0, 3, (n, v), generator=generator).float()
    target = torch.randint(0, v, (n,), generator=generator)
    names = {"correct", "teacher_agreement", "log_prob", "soft_loss"}
    _, expected = dk.distribution_loss(logits, target, teacher, return_metrics=names)
    assert 0 < expected.correct.sum() < n
    assert 0 < expected.teacher_agreement.sum() < n
    for how in ("even", "odd"):
        part = logits[:, own(v, how)].contiguous()
        for backend in BACKENDS:
            _, found = dk.distribution_loss(
                part, target, teacher, return_metrics=names, process_group=dist.group.WORLD, backend=backend
            )
            for name in names:
                close(getattr(found, name), getattr(expected, name), f"{name} {how} {backend}")


def given_logits(folder: Path) -> None:
    """Functions of logits that are there, in parts; cross_entropy with class weights and in place."""
    arguments = make(CASES["jensen_shannon"], torch.float32)
    logits = (arguments["hidden"] @ arguments["weight"].t()).detach().requires_grad_()
    mine = own(logits.shape[1], "odd")
    part = logits.detach()[:, mine].clone().requires_grad_()
    options = {"target": arguments["target"], "teacher": arguments["teacher"], "divergence": "jensen_shannon"}
    expected, found = (
        dk.distribution_loss(logits, **options),
        dk.distribution_loss(part, **options, process_group=dist.group.WORLD),
    )
    close(found, expected, "loss")
    gradient, own_gradient = torch.autograd.grad(expected, logits)[0], torch.autograd.grad(found, part)[0]
    close(own_gradient, gradient[:, mine], "dlogits")
    weight = torch.rand(logits.shape[1], generator=torch.Generator().manual_seed(1))
    expected = dk.cross_entropy(logits, arguments["target"], weight=weight)
    (gradient,) = torch.autograd.grad(expected, logits)
    spent = (part * 1).contiguous()
    found = dk.cross_entropy(
        spent, arguments["target"], weight=weight, inplace_gradient=True, process_group=dist.group.WORLD
    )
    close(found, expected, "cross_entropy")
    close(torch.autograd.grad(found, part)[0], gradient[:, mine], "gradient in place")


def teachers(folder: Path) -> None:
    """Teachers that are whole, divided as the model is, or longer; a padded vocabulary cut by its last processes."""
    arguments = make(CASES["forward_kl"], torch.float32)
    head, v = arguments["teacher"], arguments["weight"].shape[0]
    expected = dk.linear_distribution_loss(**arguments)
    mine = own(v, "odd")
    constants = (head.logit_scale, head.softcap)
    parted = dk.TeacherHead(head.hidden, head.weight[mine], head.bias[mine], *constants)
    padded = torch.cat([head.weight, torch.ones(3, head.weight.shape[1])]), torch.cat([head.bias, torch.ones(3)])
    longer = dk.TeacherHead(head.hidden, *padded, *constants, vocab_size=v)
    raw = head.logit_scale * torch.nn.functional.linear(head.hidden, head.weight, head.bias)
    logits = head.softcap * torch.tanh(raw / head.softcap)
    for teacher in (head, parted, longer, logits, logits[:, mine], dk.TeacherLogits(logits),
                    dk.LogitStream(lambda rows: logits[rows]), dk.LogitStream(lambda rows: logits[rows][:, mine]),
                    dk.LogitStream(iter(logits.split(5)))):  # fmt: skip
        found = dk.linear_distribution_loss(**{**divided(arguments, "odd"), "teacher": teacher})
        close(found, expected, type(teacher).__name__)
    padded = {**arguments, "weight": torch.cat([arguments["weight"].detach(), torch.ones(27, 12)])}
    cut = divided(padded, "even")
    keep = max(0, min(v - own(v + 27, "even").start, cut["weight"].shape[0]))
    cut["weight"] = cut["weight"][:keep]
    close(dk.linear_distribution_loss(**cut), expected, "padded")


def masked(folder: Path) -> None:
    """-inf logits: over all of a process's columns, and of a label."""
    arguments = make(CASES["every_statistic"], torch.float32)
    arguments.pop("num_groups"), arguments.pop("group")
    arguments["potential"] = arguments["potential"][:1]
    mine = sizes(101, "even")
    bias = torch.zeros(101)
    bias[: mine[0]] = -torch.inf
    arguments["teacher"] = dk.TeacherLogits(torch.randn(29, 101, generator=torch.Generator().manual_seed(1)) + bias)
    arguments["target"] = arguments["target"].clamp(max=100)
    arguments["target"][arguments["target"] >= 0] = 100
    for label in (100, 0):
        arguments["target"][0] = label  # 0: log q_y = -inf
        given = {**arguments, "bias": bias, "hard_weight": 1.0}
        names = {"log_prob", "entropy", "soft_loss", "features", "correct", "teacher_agreement"}
        expected, metrics = dk.linear_distribution_loss(**given, return_metrics=names)
        for backend in BACKENDS:
            found, ours = dk.linear_distribution_loss(**divided(given, "even"), return_metrics=names, backend=backend)
            close(found, expected, f"{backend} {label}")
            for name in names:
                close(getattr(ours, name), getattr(metrics, name), f"{name} {backend}")


def dtensors(folder: Path) -> None:
    """A head that is a DTensor, of parts that torch makes unequal; no process_group is named."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (COUNT,))
    for case in ("everything", "low_rank_topk", "cross_entropy"):
        arguments = make(CASES[case], torch.float32)
        exact = differentiate(dk.linear_distribution_loss(**arguments), leaves(arguments))
        given = dict(arguments)
        for name in ("weight", "bias"):
            if name in arguments:
                given[name] = distribute_tensor(arguments[name].detach(), mesh, [Shard(0)]).requires_grad_()
        lengths = [len(part) for part in torch.empty(101).chunk(COUNT)]
        part = slice(sum(lengths[:RANK]), sum(lengths[: RANK + 1]))
        if "potential" in arguments:
            given["potential"] = arguments["potential"][:, part].contiguous()
        if "low_rank" in arguments:
            down, up = arguments["low_rank"]
            given["low_rank"] = (down, distribute_tensor(up.detach(), mesh, [Shard(0)]).requires_grad_())
        given["hidden"] = DTensor.from_local(arguments["hidden"].detach(), mesh, [Replicate()]).requires_grad_()
        loss = dk.linear_distribution_loss(**given)
        found = [loss, *torch.autograd.grad(loss, leaves(given), torch.tensor(0.5))]
        assert all(isinstance(g, DTensor) for g in found[1:3])
        for ours, theirs in zip(found, exact, strict=True):
            close(ours.full_tensor() if isinstance(ours, DTensor) else ours, theirs, case)
    weight = distribute_tensor(arguments["weight"].detach(), mesh, [Shard(1)])
    refused({**arguments, "weight": weight}, r"weight must be \[Shard\(0\)\] over one mesh dimension, got a DTensor")
    weight = distribute_tensor(arguments["weight"].detach(), mesh, [Shard(0)])
    hidden = distribute_tensor(arguments["hidden"].detach(), mesh, [Shard(0)])
    refused({**arguments, "weight": weight, "hidden": hidden}, "hidden must be replicated, or a tensor of this process")


def compiled(folder: Path) -> None:
    """torch.compile leaves the call out of its graph."""
    arguments = make(CASES["cross_entropy"], torch.float32)
    mine = divided(arguments, "even")

    def step(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (
            dk.linear_distribution_loss(hidden * 1.5, weight, mine["target"], process_group=mine["process_group"]) * 2
        )

    expected = step(mine["hidden"], mine["weight"])
    found = torch.compile(step, backend="eager")(mine["hidden"], mine["weight"])
    close(found, expected, "compiled")
    close(
        torch.autograd.grad(found, mine["hidden"])[0], torch.autograd.grad(expected, mine["hidden"])[0], "its gradient"
    )


def sequences(folder: Path) -> None:
    """Context parallelism: labels over boundaries, one mean; and all rows of a divided sequence."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 50, (3, 4 * COUNT + 1), generator=generator)
    labels[1, 5:] = -100
    ends = [4 * rank for rank in range(COUNT)] + [4 * COUNT + 1]
    mine = slice(ends[RANK], ends[RANK + 1])
    shifted = shift_labels(labels[:, mine], dist.group.WORLD)
    assert torch.equal(shifted, dk.shift_labels(labels)[:, mine])
    items = count_labels(shifted, dist.group.WORLD)
    assert int(items) == int((dk.shift_labels(labels) != -100).sum())
    hidden = torch.randn(3, 4 * COUNT + 1, 8, generator=generator, requires_grad=True)
    weight = torch.randn(50, 8, generator=generator, requires_grad=True)
    expected = dk.linear_distribution_loss(hidden, weight, dk.shift_labels(labels))
    part = dk.linear_distribution_loss(hidden[:, mine], weight, shifted, num_items=items)
    total, gradients = part.detach().clone(), list(torch.autograd.grad(part, [hidden, weight]))
    for tensor in (total, *gradients):
        dist.all_reduce(tensor)
    for ours, theirs in zip(
        (total, *gradients), (expected, *torch.autograd.grad(expected, [hidden, weight])), strict=True
    ):
        close(ours, theirs, "context parallel")
    states = torch.randn(2, 3 * COUNT, 8, generator=generator)
    mine = slice(3 * RANK, 3 * RANK + 3)
    local = states[:, mine].clone().requires_grad_()
    rows = gather_rows(local, dist.group.WORLD, dim=1)
    assert torch.equal(rows, states)
    target = torch.randint(0, 50, (2, 3 * COUNT), generator=generator)
    part = {"weight": weight.detach()[own(50, "even")], "process_group": dist.group.WORLD}
    loss = dk.linear_distribution_loss(rows, target=target, **part, sum_hidden_gradient=False)
    (gradient,) = torch.autograd.grad(loss, local)
    states.requires_grad_()
    (exact,) = torch.autograd.grad(dk.linear_distribution_loss(states, weight.detach(), target), states)
    close(gradient, exact[:, mine], "sequence parallel")
    with pytest.raises(ValueError, match=r"shift_labels: labels must be a tensor \[\.\.\., T\] with T >= 1"):
        shift_labels(labels[:, :0], dist.group.WORLD)


CHECKS = (travels, statistics, narrow, maxima, given_logits, teachers, masked, dtensors, sequences)


@pytest.mark.parametrize("count", [2, 4])
def test_in_processes(count: int, tmp_path: Path) -> None:
    checks = (*CHECKS, compiled) if count == 2 else CHECKS
    on(count, __file__, tmp_path, *(check.__name__ for check in checks))
