"""examples/vocabulary_parallel.py, in one process and in two."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_models import WORDS, tiny, word_tokenizer
from two_processes import on

import dft_kernels

EXAMPLE = Path(dft_kernels.__file__).parent.parent / "examples" / "vocabulary_parallel.py"
pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo")


def trained(folder: Path) -> None:
    """Keep the losses of this number of processes."""
    flags = ["--length", "8", "--steps", "8", "--learning-rate", "0.02", "--text", str(folder / "words.txt")]
    losses = runpy.run_path(str(EXAMPLE))["main"](["--model", str(folder / "model"), *flags])
    if os.environ["RANK"] == "0":
        torch.save(losses, folder / f"losses-{os.environ['WORLD_SIZE']}.pt")


@pytest.mark.filterwarnings("ignore")
def test_vocabulary_parallel(tmp_path: Path) -> None:
    tiny(vocab_size=101).save_pretrained(tmp_path / "model")
    word_tokenizer(["<pad>", "<s>", "</s>", "<unk>", *WORDS]).save_pretrained(tmp_path / "model")
    (tmp_path / "words.txt").write_text(" ".join(WORDS[(3 * k * k) % 7] for k in range(200)))
    for count in (1, 2):
        (tmp_path / str(count)).mkdir()
        for name in ("model", "words.txt"):
            (tmp_path / str(count) / name).symlink_to(tmp_path / name)
        on(count, __file__, tmp_path / str(count), "trained")
    alone, divided = (torch.load(tmp_path / str(count) / f"losses-{count}.pt") for count in (1, 2))
    assert divided[-1] < divided[0] - 0.2
    assert divided == pytest.approx(alone, rel=1e-4)
