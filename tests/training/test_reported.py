"""`--report_to`: what a training logs, in the files of those who show it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers.integrations
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import folder, run, texts  # noqa: F401 - a fixture among them
from tiny_models import tokenizer  # noqa: F401 - a fixture of it

from dft_kernels.commands import main as cli

pytestmark = pytest.mark.filterwarnings("ignore")  # Trainer's own


def test_tensorboard(folder: Path) -> None:  # noqa: F811
    """Of every log the loss, its parts, agreement, gaps of the terms and speed, at the step that they are of."""
    target = ["target", "build", "--tokenizer", str(folder / "student"), "--out", str(folder / "t.safetensors")]
    assert cli.main([*target, "--text", *texts(folder)]) == 0
    given = ["--teacher", str(folder / "teacher"), "--target", str(folder / "t.safetensors")]
    given += ["--terms", "token_l2=floor", "unigram_kl=0.5", "--report_to", "tensorboard"]
    assert run(folder, "--text", *texts(folder), *given)[0] == 0
    (written,) = (folder / "out" / "runs").iterdir()
    events = EventAccumulator(str(written))
    events.Reload()
    for name in (
        "loss", "soft_loss", "hard_loss", "entropy", "accuracy", "teacher_agreement", "tokens_per_second",
        "peak_memory_gb", "term_UnigramKL", "term_TokenL2", "term_TokenL2_over_bound", "term_TokenL2_dual",
    ):  # fmt: skip
        found = events.Scalars(f"train/{name}")
        assert [one.step for one in found] == [2, 4, 6], name
        assert all(one.value >= 0 for one in found), name
    soft, hard = ([one.value for one in events.Scalars(f"train/{name}_loss")] for name in ("soft", "hard"))
    losses = [s + 0.1 * h for s, h in zip(soft, hard, strict=True)]
    assert [one.value for one in events.Scalars("train/loss")] == pytest.approx(losses, rel=0.2)  # and the terms


def test_mistakes(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    def missing() -> Any:
        raise RuntimeError("WandbCallback requires wandb to be installed. Run `pip install wandb`.")

    monkeypatch.setitem(transformers.integrations.INTEGRATION_TO_CALLBACK, "wandb", missing)
    for names, said in {
        ("tensorbord",): "--report_to must be one of azure_ml, ",
        ("tensorboard", "tensorbord"): "got 'tensorbord'. Did you mean tensorboard?",
        (
            "wandb",
        ): "--report_to must be installed, got wandb: WandbCallback requires wandb to be installed. pip install",
    }.items():
        assert run(folder, "--text", *texts(folder), "--report_to", *names)[0] == 2
        assert said in capsys.readouterr().err
    assert not (folder / "out").exists()
