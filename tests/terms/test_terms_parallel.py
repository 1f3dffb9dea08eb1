"""Distribution terms on two processes: running state and gradients are those of one process over the whole batch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from term_cases import ENDS, HAZARD, MARKS, RATE, TRACKED, B, P, V, close, gradients, made, of_loss
from two_processes import on_two

from dft_kernels.terms import Delayed, Entropy, NGrams, PunctuationRate, SentenceLength, TokenL2, exact

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch without gloo"
)
RANK = int(os.environ.get("RANK", 0))
OURS = slice(0, 1) if RANK == 0 else slice(1, B)  # uneven


def terms() -> Any:
    return (
        0.5 * TokenL2(P)
        + SentenceLength(ENDS, HAZARD)
        + PunctuationRate(MARKS, RATE)
        + NGrams(**TRACKED, vocab_size=V)
        + Entropy(calibration=True)
    )


def given(rows: slice) -> dict[str, Any]:
    everything = made()
    items = float(torch.where(everything["target"] != -100, everything["row_weight"], 0.0).sum())
    hidden = everything["hidden"].detach()[rows].requires_grad_()
    rest = {name: everything[name][rows] for name in ("target", "input_ids", "row_weight")}
    return {"hidden": hidden, "weight": everything["weight"], **rest, "num_items": items}


def called(of: dict[str, Any]) -> dict[str, Any]:
    return of_loss(of, num_items=of["num_items"])


def steps(rows: slice) -> tuple[Delayed, list[Any]]:
    """Two steps; the gradients of the second."""
    delayed, batch = Delayed(terms(), decay=0.7), given(rows)
    for _ in range(2):
        found = gradients(delayed.loss(**called(batch)).loss, batch)
        delayed.update()
    return delayed, list(found)


def summed(gradient: torch.Tensor) -> torch.Tensor:
    torch.distributed.all_reduce(gradient)
    return gradient


def running_state_and_gradients(folder: Path) -> None:
    want_state, hidden, weight = torch.load(folder / "delayed.pt")
    delayed, found = steps(OURS)
    close([delayed.running], [want_state])
    close([found[0], summed(found[1])], [hidden[OURS], weight])


def statistics_of_all(folder: Path) -> None:
    hidden, weight = torch.load(folder / "exact.pt")
    batch = given(OURS)
    found = gradients(exact(**called(batch), term=terms()).loss, batch)
    close([found[0], summed(found[1])], [hidden[OURS], weight])


def a_process_without_rows(folder: Path) -> None:
    delayed, batch = Delayed(terms()), given(slice(0, B))
    delayed.loss(**called(batch))
    delayed.update()
    before = delayed.running
    if RANK == 0:
        delayed.loss(**called(batch))
    delayed.update()
    close([delayed.running], [0.9 * before + before / 2])


def test_two_processes_are_one(tmp_path: Path) -> None:
    delayed, found = steps(slice(0, B))
    torch.save([delayed.running, *found], tmp_path / "delayed.pt")
    batch = given(slice(0, B))
    torch.save([*gradients(exact(**called(batch), term=terms()).loss, batch)], tmp_path / "exact.pt")
    on_two(__file__, tmp_path, "running_state_and_gradients", "statistics_of_all", "a_process_without_rows")
