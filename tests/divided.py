"""A call over a vocabulary that is divided over processes: the arguments of this one, and results put together."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import CASES, PRESENT, differentiate, judged, leaves, make

import dft_kernels as dk
from dft_kernels.distributed.shards import gathered

RANK, COUNT = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
BACKENDS = [name for name in ("native", "reference") if name in PRESENT]
VOCAB_ROWS = ("weight", "bias", "features")  # [V, ...]


def sizes(vocab: int, how: str) -> list[int]:
    """even: as equal as can be; odd: very unlike, and of more than two processes one without any."""
    if how == "even":
        return [vocab // COUNT + (rank < vocab % COUNT) for rank in range(COUNT)]
    first = 2 * vocab // 3
    return (
        [first, vocab - first] if COUNT == 2 else [first // 2, 0, first - first // 2, vocab - first, *[0] * (COUNT - 4)]
    )


def own(vocab: int, how: str) -> slice:
    """The ids of this process."""
    before = sum(sizes(vocab, how)[:RANK])
    return slice(before, before + sizes(vocab, how)[RANK])


def divided(arguments: dict[str, Any], how: str) -> dict[str, Any]:
    """The arguments of this process."""
    mine = own(arguments["weight"].shape[0], how)
    out = {**arguments, "process_group": dist.group.WORLD}
    for name in VOCAB_ROWS:
        if name in arguments:
            part = arguments[name].detach()[mine].clone()
            out[name] = part.requires_grad_() if arguments[name].requires_grad else part
    if "potential" in arguments:
        out["potential"] = arguments["potential"][:, mine].contiguous()
    if "low_rank" in arguments:
        down, up = arguments["low_rank"]
        out["low_rank"] = (down, up.detach()[mine].clone().requires_grad_())
    return out


def whole(part: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """Parts of unequal sizes, put together."""
    parts: list[Any] = [None] * COUNT
    dist.all_gather_object(parts, part)
    return torch.cat(parts, dim)


def complete(arguments: dict[str, Any], results: list[torch.Tensor]) -> list[torch.Tensor]:
    """Loss and gradients, those of divided tensors put together."""
    of_rows = ["loss", "hidden", *([] if "low_rank" not in arguments else ["down"])]
    names = ["loss", *(n for n in ("hidden", "weight", "bias") if n in arguments)]
    names += ["down", "up"] if "low_rank" in arguments else []
    return [value if name in of_rows else whole(value) for name, value in zip(names, results, strict=True)]


def run(case: str, dtype: torch.dtype, backend: str, how: str, **options: Any) -> None:
    """One case: within the gate in every process, and of the same bits in all."""
    arguments = make(CASES[case], dtype)
    mine = divided(arguments, how)
    found = differentiate(dk.linear_distribution_loss(**{**mine, "backend": backend, **options}), leaves(mine))
    ours = complete(arguments, found)
    for value in found[:2]:
        every = gathered(value, dist.group.WORLD)
        assert all(torch.equal(every[0], one) or bool(one.isnan().any()) for one in every), case
    if list(CASES).index(case) % COUNT == RANK:  # one of them judges
        for one in judged(CASES[case], arguments, ours, options.get("chunk_size") == 1):
            assert one.error <= one.allowed, f"{case} {dtype} {backend} {one.name}: {one.error:.2e} {one.allowed:.2e}"


def close(ours: Any, theirs: torch.Tensor, name: str) -> None:
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5, msg=lambda text: f"{name}: {text}")


def refused(call: dict[str, Any], text: str, kind: type[Exception] = ValueError) -> None:
    with pytest.raises(kind, match=text):
        dk.linear_distribution_loss(**call)
