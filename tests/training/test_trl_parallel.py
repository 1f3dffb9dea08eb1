"""TRL's trainers with our kernels in two processes: DDP's own numbers."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from tiny_models import far
from trl_runs import assert_equal, loaded, make, run
from two_processes import on_two

from dft_kernels.training.trl import fuse

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = ("SFT completions", "DPO")


def trained(folder: Path) -> None:
    for name in NAMES:
        theirs = run(make(name, folder))
        gc.collect()
        assert_equal(run(fuse(make(name, folder))), theirs)


def taught(folder: Path) -> None:
    """A teacher's gradient reaches every process's parameters, which stay equal."""
    trainer = fuse(make("SFT completions", folder), far(hidden_size=24), hard_weight=0.3)
    assert trainer.accelerator.num_processes == 2
    run(trainer)
    for parameter in trainer.model.parameters():
        both = [torch.empty_like(parameter) for _ in range(2)]
        torch.distributed.all_gather(both, parameter.detach())
        assert torch.equal(*both)


@pytest.mark.full
def test_two_processes(tmp_path: Path) -> None:
    loaded(tmp_path / "model")
    on_two(__file__, tmp_path, "trained", "taught")
