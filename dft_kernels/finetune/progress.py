"""The progress bar of a training, with the loss's metrics in it."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

TERMS_FILE = "distribution_terms.pt"  # in a checkpoint
SHOWN = ("loss", "soft_loss", "hard_loss", "teacher_agreement")


class ProgressCallback(transformers.ProgressCallback):  # type: ignore[misc]
    """Trainer's, and behind its bar the last SHOWN that were logged."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        """Trainer's line, and the bar's end."""
        super().on_log(args, state, control, logs=logs, **more)
        shown = {name: f"{logs[name]:.4g}" for name in SHOWN if name in (logs or {})}
        if shown and self.training_bar is not None:  # which the first process alone has
            self.training_bar.set_postfix(shown)


class TermsCallback(transformers.TrainerCallback):  # type: ignore[misc]
    """The end of a step for its terms' running statistics, and their file in every checkpoint."""

    def __init__(self, terms: Any) -> None:
        self.terms = terms

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Where the step had them; the same steps have in every process."""
        if self.terms.pending is not None:
            self.terms.update()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """By the first process alone: the others' are equal."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            torch.save(self.terms.state_dict(), folder / TERMS_FILE)


def peak_memory_gb(device: torch.device) -> float:
    """The most this process has held of the device's memory, of the machine's where that is the CPU, in 10^9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def show_metrics(trainer: Any) -> None:
    """Put it in the place of Trainer's, where that is the one: not in notebooks, nor without a bar."""
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback) is transformers.ProgressCallback:
            trainer.remove_callback(callback)
            trainer.add_callback(ProgressCallback(callback.max_str_len))
