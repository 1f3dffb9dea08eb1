"""How processes agree on a call: mistakes of one, of which all hear; sizes that change; a process that dies."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import CASES, make
from divided import COUNT, RANK, close, divided, refused, sizes
from two_processes import on

import dft_kernels as dk
from dft_kernels.distributed import gather_rows
from dft_kernels.distributed import shards as shards_module
from dft_kernels.distributed.shards import together

needs_gloo = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo")


def mistakes(folder: Path) -> None:
    """Of one process: an error in all, at once, and the next call is right again."""
    arguments = make(CASES["forward_kl"], torch.float32)
    good = divided(arguments, "even")
    expected = dk.linear_distribution_loss(**good)
    other = RANK == COUNT - 1
    labels = good["target"].roll(1) if other else good["target"]
    refused(
        {**good, "target": labels},
        "process_group must be called with the same labels, groups and ids of a teacher in all of its",
    )
    rows = {name: good[name][:-2] if other else good[name] for name in ("hidden", "target")}
    teacher = dk.TeacherLogits(torch.zeros(len(rows["hidden"]), 101))
    refused(
        {**good, **rows, "teacher": teacher},
        f"the same rows in all of its processes, got 29 in rank 0 and 27 in rank {COUNT - 1}",
    )
    refused(
        {**good, "temperature": 2.0 if other else 1.0},
        "the same arguments in all of its processes, got temperature=1.0 in rank 0 and temperature=2.0",
    )
    refused(
        {**good, "chunk_size": 7 if other else 8},
        "the same arguments in all of its processes, got chunk_size=8 in rank 0 and chunk_size=7 in rank",
    )
    text = (
        "temperature must be greater than 0"
        if other
        else f"without error in all of its processes, got an error in rank {COUNT - 1}"
    )
    refused({**good, "temperature": -1.0 if other else 1.0}, text)
    text = "weight must have shape" if other else "without error in all of its processes"
    refused({**good, "weight": good["weight"][:, :-1] if other else good["weight"]}, text)
    refused(
        {**good, "weight": good["weight"][:0], "teacher": None},
        "weight must have a part of the vocabulary in one process at least, got none in any",
    )
    refused({**good, "target": torch.full_like(good["target"], 101)}, r"target must hold labels in 0\.\.100 or -100")
    refused({**good, "process_group": "tp"}, "process_group must be a ProcessGroup or a DeviceMesh", TypeError)
    alone = [dist.new_group([rank]) for rank in range(COUNT)]
    if COUNT > 1:
        group = alone[(RANK + 1) % COUNT]
        refused(
            {**good, "process_group": group},
            "process_group must (be a ProcessGroup|have this process as a member)",
            (ValueError, TypeError),
        )
    refused(
        {**good, "teacher": dk.TeacherLogits(torch.zeros(29, 60))},
        "the model's vocabulary of 101, or this process's part of it of",
    )
    with pytest.raises(ValueError, match=r"process_group must come without transforms of torch\.func"):
        torch.func.grad(lambda h: dk.linear_distribution_loss(**{**good, "hidden": h}))(good["hidden"].detach())
    close(dk.linear_distribution_loss(**good), expected, "afterwards")
    alone_loss = dk.linear_distribution_loss(**{**arguments, "process_group": alone[RANK]})
    close(alone_loss, dk.linear_distribution_loss(**arguments), "a group of one")


def more_mistakes(folder: Path) -> None:
    """What is not told by the types of arguments; values; what takes a gradient; and what differs without harm."""
    arguments = make(CASES["forward_kl"], torch.float32)
    good = divided(arguments, "even")
    other = RANK == COUNT - 1
    alike = "process_group must be called with the same arguments in all of its processes, got "
    good = {**good, "temperature": 1.0}
    divergences = [dk.divergences.jensen_shannon(beta) for beta in (0.3, 0.6)]
    refused({**good, "divergence": divergences[other]}, f"{alike}parameter=0.3 in rank 0 and parameter=0.6")
    tops = [
        dk.TopK(torch.arange(5).repeat(29, 1), torch.full((29, 5), 0.1).log(), tail=tail)
        for tail in ("bucket", "ignore")
    ]
    refused({**good, "teacher": tops[other]}, f"{alike}top_mode='bucket' in rank 0 and top_mode='ignore'")
    ids = [tops[0], dk.TopK(tops[0].indices.flip(1), tops[0].log_probs)]
    refused({**good, "teacher": ids[other]}, "the same labels, groups and ids of a teacher in all")
    names = [("correct",), ("entropy",)]
    refused({**good, "return_metrics": names[other]}, f"{alike}reported=")
    hidden = good["hidden"].detach() if other else good["hidden"]
    refused({**good, "hidden": hidden}, f"{alike}need_hidden=True in rank 0 and need_hidden=False")
    mixtures = [dk.Mixture([torch.zeros(29, 101), dk.Labels()], weights) for weights in ([0.5, 0.5], [0.4, 0.6])]
    refused({**good, "teacher": mixtures[other]}, f"{alike}teacher=Mixture")
    pair = (torch.zeros(29, 2), torch.zeros(good["weight"].shape[0], 2))
    low_rank = pair[0] if other else pair
    text = "low_rank must be two tensors" if other else "without error in all of its processes"
    refused({**good, "low_rank": low_rank}, text, (ValueError, TypeError))
    bias = torch.zeros(good["weight"].shape[0])
    bias = bias.requires_grad_() * 1 if other else torch.nn.Parameter(bias)
    close(
        dk.linear_distribution_loss(**{**good, "bias": bias}), dk.linear_distribution_loss(**good), "a slice and a leaf"
    )
    nothing = {**good, "teacher": None, "hard_weight": 0.0}
    assert float(dk.linear_distribution_loss(**nothing)) == 0.0
    logits = torch.randn(29, 100 * COUNT, generator=torch.Generator().manual_seed(0)).requires_grad_() * 1
    part = (
        logits[:, ::2][:, 50 * RANK : 50 * RANK + 50] if other else logits[:, 50 * RANK : 50 * RANK + 50].contiguous()
    )
    with pytest.raises(ValueError, match="contiguous=False" if other else "without error in all of its processes"):
        dk.cross_entropy(part, good["target"].clamp(max=9), inplace_gradient=True, process_group=dist.group.WORLD)
    mask = torch.zeros(101)
    mask[: good["weight"].shape[0]] = -torch.inf if RANK == 0 else 0.0
    dist.broadcast(mask, 0)
    raw = torch.randn(29, 101, generator=torch.Generator().manual_seed(1)) + mask
    before = sum(sizes(101, "even")[:RANK])
    own = raw[:, before : before + good["weight"].shape[0]]
    expected = dk.linear_distribution_loss(
        **{**arguments, "teacher": dk.LogitStream(lambda rows: raw[rows]), "temperature": 1.0}
    )
    for source in (raw, own):  # all of one process's columns masked
        found = dk.linear_distribution_loss(**{**good, "teacher": dk.LogitStream(lambda rows, of=source: of[rows])})
        close(found, expected, "a masked stream")
    seen = dk.linear_distribution_statistics(
        good["hidden"], good["weight"], good["target"], process_group=dist.group.WORLD
    )
    total = seen.entropy.sum() + (0.0 if other else seen.mean_probability.sum())
    torch.autograd.grad(total, good["hidden"])  # one process has no use for its columns
    with pytest.raises(ValueError, match="gather_rows: tensor must have one shape and dtype in all processes"):
        gather_rows(torch.zeros(3 + other, 2), dist.group.WORLD)
    with pytest.raises(ValueError, match=r"gather_rows: dim must be a dimension of \[3, 2\], got 5"):
        gather_rows(torch.zeros(3, 2), dist.group.WORLD, dim=5)


def meshes(folder: Path) -> None:
    """DTensors: of a mesh in another order, of data parallelism without labels, of a teacher over other processes."""
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    arguments = make(CASES["forward_kl"], torch.float32)
    weight = arguments["weight"].detach()
    order = DeviceMesh("cpu", list(range(COUNT))[::-1])
    refused(
        {**arguments, "weight": distribute_tensor(weight, order, [Shard(0)])}, "weight must be over a mesh of ascending"
    )
    mesh = init_device_mesh("cpu", (COUNT,))
    head = distribute_tensor(weight, mesh, [Shard(0)])
    call = {"weight": head, "teacher": torch.zeros(29, 101)}
    hidden = torch.randn(29, 12, generator=torch.Generator().manual_seed(RANK))
    refused(
        {**call, "hidden": hidden}, "process_group must be called with the same hidden states in all of its processes"
    )
    if COUNT == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        heads = [distribute_tensor(weight, square[name], [Shard(0)]) for name in ("tp", "dp")]
        teacher = dk.TeacherHead(arguments["hidden"].detach(), heads[1])
        given = {"hidden": arguments["hidden"], "target": arguments["target"], "weight": heads[0], "teacher": teacher}
        refused(given, "teacher.weight must be divided over the processes that the head is, got a DTensor")
    replicated = distribute_tensor(arguments["hidden"].detach(), mesh, [Replicate()])
    given = {**arguments, "hidden": replicated, "weight": head, "sum_hidden_gradient": False}
    refused(given, "hidden must be no DTensor with sum_hidden_gradient=False")
    part = torch.arange(RANK, 2 * RANK + 3).float()
    assert torch.equal(together(part, dist.group.WORLD), torch.cat([torch.arange(r, 2 * r + 3) for r in range(COUNT)]))


def other_sizes(folder: Path) -> None:
    """Heads of which this process has as many ids as before, and others have not."""
    for vocab in (40, 41, 40, 43):
        generator = torch.Generator().manual_seed(vocab)
        hidden, weight = torch.randn(9, 4, generator=generator), torch.randn(vocab, 4, generator=generator)
        target = torch.randint(0, vocab, (9,), generator=generator)
        first = 40 // COUNT
        mine = slice(first * RANK, first * (RANK + 1) if RANK < COUNT - 1 else vocab)
        found = dk.linear_distribution_loss(hidden, weight[mine], target, process_group=dist.group.WORLD)
        close(found, dk.linear_distribution_loss(hidden, weight, target), str(vocab))


@needs_gloo
@pytest.mark.parametrize("count", [2, 4])
def test_in_processes(count: int, tmp_path: Path) -> None:
    on(count, __file__, tmp_path, "mistakes", "more_mistakes", "meshes", "other_sizes")


def dies(folder: Path) -> None:
    """One process ends between two chunks; the others hear of it."""
    arguments = make(CASES["cross_entropy"], torch.float32)
    good = divided(arguments, "even")
    dk.linear_distribution_loss(**good)
    if RANK == COUNT - 1:
        real = shards_module.all_gather

        def last(*given: Any, **more: Any) -> Any:
            if given[1].dtype == torch.float32:
                os._exit(0)
            return real(*given, **more)

        shards_module.all_gather = last
    with pytest.raises(RuntimeError):
        dk.linear_distribution_loss(**good, chunk_size=5)
    os._exit(0)


@needs_gloo
def test_a_process_that_dies_ends_the_others(tmp_path: Path) -> None:
    on(3, __file__, tmp_path, "dies")


def test_without_torch_distributed() -> None:
    text = re.escape("process_group must come after torch.distributed is initialised, got none")
    with pytest.raises(ValueError, match=text):
        dk.linear_distribution_loss(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2).long(), process_group="x")
