"""Models whose head transformers' tensor parallel plan has divided: attach takes them as they are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import tiny
from two_processes import on_two

import dft_kernels as dk
from dft_kernels.terms import Delayed, TokenL2
from dft_kernels.training.attach import attach

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch without gloo"
    ),
]
RANK = int(os.environ.get("RANK", 0))
IDS = torch.arange(3, 23).view(2, 10) % 61
LABELS = IDS.masked_fill(torch.arange(10) < torch.tensor([[2], [5]]), -100)


def pair(folder: Path, tied: bool, name: str = "model") -> tuple[Any, Any]:
    """A model of one process, and the same by its tensor parallel plan."""
    kept = folder / f"{name}-{tied}"
    torch.manual_seed(len(name))
    plain = tiny(tie_word_embeddings=tied, vocab_size=62, num_key_value_heads=2)
    if RANK == 0:
        plain.save_pretrained(kept)
    torch.distributed.barrier()
    divided = transformers.AutoModelForCausalLM.from_pretrained(kept, tp_plan="auto", dtype=torch.float32)
    assert hasattr(divided.lm_head.weight, "placements")
    return plain.train(), divided.train()


def assert_gradients(divided: Any, plain: Any) -> None:
    for (name, ours), (_, theirs) in zip(divided.named_parameters(), plain.named_parameters(), strict=True):
        gradient = ours.grad.full_tensor() if hasattr(ours.grad, "full_tensor") else ours.grad
        torch.testing.assert_close(
            gradient, theirs.grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def attached(folder: Path) -> None:
    for tied in (True, False):
        plain, divided = (attach(model, hard_weight=0.3) for model in pair(folder, tied))
        teacher = torch.randn(2, 10, 62, generator=torch.Generator().manual_seed(1))
        head, parted = pair(folder, False, "teacher")
        whole = dk.TeacherHead(head.model(IDS).last_hidden_state.detach(), head.lm_head.weight.detach())
        for given in ({}, {"teacher": teacher}, {"teacher": whole}, {"teacher": of_model(parted)}):
            other = {"teacher": whole} if callable(given.get("teacher")) else given
            ours = {name: value(IDS) if callable(value) else value for name, value in given.items()}
            for model, more in ((plain, other), (divided, ours)):
                model.zero_grad()
                out = model(input_ids=IDS, labels=LABELS, **more)
                out.loss.backward()
                model.found = out
            torch.testing.assert_close(divided.found.loss, plain.found.loss)
            for name in ("hard_loss", "soft_loss", "entropy", "correct", "teacher_agreement"):
                torch.testing.assert_close(getattr(divided.found.metrics, name), getattr(plain.found.metrics, name))
            assert_gradients(divided, plain)
        divided.eval()
        assert divided.generate(IDS[:1], max_new_tokens=3, do_sample=False).shape == (1, 13)


def of_model(model: Any) -> Any:
    """A teacher whose head is divided too."""
    return lambda ids: dk.TeacherHead(model.model(ids).last_hidden_state.detach(), model.lm_head.weight.detach())


def with_terms(folder: Path) -> None:
    """A step of running means, by attach."""
    losses = []
    plain, divided = (attach(model) for model in pair(folder, False))
    for model in (plain, divided):
        delayed = Delayed(0.5 * TokenL2(torch.full((62,), 1 / 62)))
        for _ in range(2):
            model.zero_grad()
            out = model(input_ids=IDS, labels=LABELS, distribution_terms=delayed)
            out.loss.backward()
            delayed.update()
        losses.append(out.loss.detach())
    torch.testing.assert_close(*losses)
    assert_gradients(divided, plain)


def refused(folder: Path) -> None:
    """Adapters of a divided head."""
    _, divided = pair(folder, False)
    dk.add_correction(divided, rank=2)
    with pytest.raises(ValueError, match="a plain lm_head where that lies over several processes, got one with an ada"):
        attach(divided)


def test_the_plan_of_transformers(tmp_path: Path) -> None:
    on_two(__file__, tmp_path, "attached", "with_terms", "refused")
