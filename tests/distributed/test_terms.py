"""Distribution terms beside a head whose rows lie over two processes: those of a head that each has whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from divided import close, whole
from term_cases import TERMS, made
from two_processes import on_two

import dft_kernels as dk
from dft_kernels.terms import Delayed, exact

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo")
RUNNING = [name for name in TERMS if not name.startswith("renewal")]  # which are not linear in probabilities


def heads(weight: torch.Tensor) -> list[torch.Tensor]:
    """The whole, and its rows as a DTensor."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    rows = distribute_tensor(weight.detach(), init_device_mesh("cpu", (2,)), [Shard(0)])
    return [weight.detach().clone().requires_grad_(), rows.requires_grad_()]


def every_term(folder: Path) -> None:
    for name, (term, _) in TERMS.items():
        for cross_fit in (False, True):
            results = []
            for head in heads(made()["weight"]):
                given = made()
                loss = exact(**{**given, "weight": head}, term=0.3 * term, cross_fit=cross_fit).loss
                results.append((loss, *torch.autograd.grad(loss, (given["hidden"], head))))
            (loss, dhidden, dweight), (own, own_dhidden, own_dweight) = results
            close(own, loss.detach(), name)
            close(own_dhidden, dhidden, f"dhidden of {name}")
            close(whole(own_dweight.to_local()), dweight, f"dweight of {name}")


def running_means(folder: Path) -> None:
    results = []
    for number in range(2):
        first, *others = (0.3 * TERMS[name][0] for name in RUNNING)
        delayed = Delayed(sum(others, first))
        delayed.observe(**{**made(9), "weight": heads(made()["weight"])[number]})
        delayed.update()
        for step in range(3):
            given, head = made(step), heads(made()["weight"])[number]
            loss = delayed.loss(**{**given, "weight": head}).loss
            gradients = torch.autograd.grad(loss, (given["hidden"], head))
            delayed.update()
        results.append((loss.detach(), gradients[0], gradients[1] if number == 0 else whole(gradients[1].to_local())))
    for theirs, ours in zip(*results, strict=True):
        close(ours, theirs, "Delayed")


def refused(folder: Path) -> None:
    given, (term, _) = made(), next(iter(TERMS.values()))
    with pytest.raises(
        ValueError, match=r"exact: process_group must be left out with terms, got one\. Pass the head as"
    ):
        exact(**given, term=1.0 * term, process_group=dist.group.WORLD)
    given["weight"] = heads(given["weight"])[1]
    with pytest.raises(ValueError, match="gains: weight must be whole in this process, got a part of the vocabulary"):
        dk.terms.gains(1.0 * term, **given)


def test_terms_of_a_divided_head(tmp_path: Path) -> None:
    on_two(__file__, tmp_path, "every_term", "running_means", "refused")
