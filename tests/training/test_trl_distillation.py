"""TRL's DistillationTrainer with our divergence gives TRL's own numbers, and calls none of its kernels."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import far
from trl_runs import DISTILLATION, assert_equal, make, run

from dft_kernels.testing import relative_error
from dft_kernels.training.trl import fuse
from dft_kernels.training.trl_distillation import divergence_loss

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def module() -> Any:
    return pytest.importorskip("trl.trainer.distillation_trainer")


@pytest.mark.kept(where=lambda name: "0.3" in name)
@pytest.mark.parametrize("name", list(DISTILLATION))
def test_a_trainers_own_numbers(name: str, tmp_path: Path, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own, calls = module._chunked_divergence_loss, list[float]()

    @functools.wraps(own)
    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments[5])
        return own(*arguments, **named)

    monkeypatch.setattr(module, "_chunked_divergence_loss", counted)
    theirs, seen = run(make(name, tmp_path)), len(calls)
    assert seen > 0
    fused = run(fuse(make(name, tmp_path)))
    assert len(calls) == seen
    assert_equal(fused, theirs)
    run(make(name, tmp_path))  # one that is not fused is TRL's own still
    assert len(calls) == 2 * seen


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("items", [None, 5, torch.tensor(9)])
def test_the_function(beta: float, items: Any, module: Any) -> None:
    """Heads of two widths with bias, scale and cap, of which some positions count, or none."""
    theirs = module._chunked_divergence_loss
    assert list(inspect.signature(theirs).parameters) == list(inspect.signature(divergence_loss).parameters)
    student = [torch.randn(3, 5, 8), torch.randn(31, 8), torch.randn(31)]
    teacher = [torch.randn(3, 5, 6), torch.randn(31, 6), torch.randn(31)]
    for one in student:
        one.requires_grad_()
    for mask in (torch.rand(3, 5) < 0.6, torch.zeros(3, 5)):
        arguments = {
            **{"student_hidden_states": student[0], "teacher_hidden_states": teacher[0], "beta": beta},
            **{"student_lm_head_weight": student[1], "teacher_lm_head_weight": teacher[1], "completion_mask": mask},
            **{"student_lm_head_bias": student[2], "teacher_lm_head_bias": teacher[2], "num_items_in_batch": items},
            **{"student_logit_scale": 0.7, "teacher_logit_scale": 1.3, "teacher_final_logit_softcapping": 4.0},
            **{"student_final_logit_softcapping": 3.0, "temperature": 0.8},
        }
        found = []
        for function in (divergence_loss, theirs):
            loss, entropy, count = function(**arguments)
            assert int(count) == int(mask.sum())
            found.append([loss, entropy, *torch.autograd.grad(loss, student)])
        for mine, own in zip(*found, strict=True):
            assert relative_error(mine, own) < 1e-5


def test_errors(tmp_path: Path, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = fuse(make("distillation at 0.3", tmp_path))
    with pytest.raises(ValueError, match="fuse: trainer must be fused once, got one that is fused"):
        fuse(trainer)
    with pytest.raises(ValueError, match="trainer must be an SFTTrainer where there is a teacher or terms, got Distil"):
        fuse(make("distillation at 0.3", tmp_path), far())
    monkeypatch.setattr(module, "_chunked_divergence_loss", lambda student, teacher: None)
    with pytest.raises(
        ValueError, match=r"trl must have the divergence of a version that was tried \(1\.15\.0, 1\.16\.0\)"
    ):
        fuse(make("distillation at 0.3", tmp_path))
