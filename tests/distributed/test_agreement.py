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
from divided import COUNT, RANK, close, divided, refused
from two_processes import on

import dft_kernels as dk
from dft_kernels.distributed import shards as shards_module

needs_gloo = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo")


def mistakes(folder: Path) -> None:
    """Of one process: an error in all, at once, and the next call is right again."""
    arguments = make(CASES["forward_kl"], torch.float32)
    good = divided(arguments, "even")
    expected = dk.linear_distribution_loss(**good)
    other = RANK == COUNT - 1
    labels = good["target"].roll(1) if other else good["target"]
    refused({**good, "target": labels}, "process_group must be called with the same labels in all of its processes")
    rows = {name: good[name][:-2] if other else good[name] for name in ("hidden", "target")}
    teacher = dk.TeacherLogits(torch.zeros(len(rows["hidden"]), 101))
    refused(
        {**good, **rows, "teacher": teacher},
        f"the same rows in all of its processes, got 29 in rank 0 and 27 in rank {COUNT - 1}",
    )
    refused({**good, "temperature": 2.0 if other else 1.0}, "called with the same options, dtypes and kind of teacher")
    refused({**good, "chunk_size": 7 if other else 8}, "called with the same options")
    text = (
        "temperature must be greater than 0"
        if other
        else f"without error in all of its processes, got an error in rank {COUNT - 1}"
    )
    refused({**good, "temperature": -1.0 if other else 1.0}, text)
    text = "weight must have shape" if other else "without error in all of its processes"
    refused({**good, "weight": good["weight"][:, :-1] if other else good["weight"]}, text)
    refused({**good, "weight": good["weight"][:0], "teacher": None}, "weight must have at least one row in one process")
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
    on(count, __file__, tmp_path, "mistakes", "other_sizes")


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
