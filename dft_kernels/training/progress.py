"""The progress bar of a training, with the loss's metrics in it."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from tqdm.auto import tqdm

from ..files import Source

TERMS_FILE = "distribution_terms.pt"  # in a checkpoint
SHOWN = ("loss", "soft_loss", "hard_loss", "teacher_agreement")


class ProgressCallback(transformers.ProgressCallback):  # type: ignore[misc]
    """Trainer's progress bar, followed by the last logged values of SHOWN."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        """Print Trainer's log line and update the end of the bar."""
        super().on_log(args, state, control, logs=logs, **more)
        shown = {name: f"{logs[name]:.4g}" for name in SHOWN if name in (logs or {})}
        if shown and self.training_bar is not None:  # which the first process alone has
            self.training_bar.set_postfix(shown)


class Bar(Protocol):
    """What shows a command's progress."""

    def begin(self, total: int | None, done: int = 0) -> None:
        """At its beginning."""

    def say(self, text: str) -> None:
        """Beside it."""

    def __call__(self, done: int) -> None:
        """So much more is done."""


class BarCallback(ProgressCallback):
    """Trainer's log lines, and a bar of one's own for its steps, with tokens a second and the values of SHOWN."""

    def __init__(self, bar: Bar, max_str_len: int = 100) -> None:
        super().__init__(max_str_len)
        self.bar = bar

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Begin, or go on."""
        self.training_bar = tqdm(disable=True) if state.is_world_process_zero else None  # which writes lines
        self.current_step = state.global_step
        self.bar.begin(state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """A step more."""
        self.bar(state.global_step - self.current_step)
        self.current_step = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        """Print Trainer's log line, and say its values."""
        super().on_log(args, state, control, logs=logs, **more)
        if "tokens_per_second" in (logs or {}):
            shown = [f"{name} {logs[name]:.4g}" for name in SHOWN if name in logs]
            self.bar.say(", ".join([f"{logs['tokens_per_second']:,.0f} tokens/s", *shown]))


class TermsCallback(transformers.TrainerCallback):  # type: ignore[misc]
    """Updates the running statistics of terms (`Delayed`, by name) after each step, saves them in every checkpoint, and
    stops the training where asked once all constraints among them hold."""

    def __init__(self, terms: dict[str, Any]) -> None:
        self.terms = terms

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Update the terms that this step had; every process has them in the same steps."""
        for delayed in self.terms.values():
            if delayed.pending is not None:
                delayed.update()
        bounded = [term for delayed in self.terms.values() for term in delayed.bounded.values()]
        # every term was seen, and no running mean is of fewer steps than it looks back on
        old = all(delayed.settled for delayed in self.terms.values() if delayed.bounded)
        if (
            getattr(args, "stop_at_floor", False)
            and old
            and all(term.ratio is not None and term.ratio <= 1 for term in bounded)
        ):
            control.should_training_stop = control.should_log = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save from the first process: all processes hold equal statistics."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            part = folder / f"{TERMS_FILE}.part"
            torch.save({name: delayed.state_dict() for name, delayed in self.terms.items()}, part)
            part.replace(folder / TERMS_FILE)


def load_terms(folder: str, terms: dict[str, Any]) -> None:
    """Take up what `TermsCallback` left in a checkpoint."""
    file = Source("DFTTrainer", Path(folder) / TERMS_FILE, "Resume from another checkpoint, or start anew")
    found: Any = {}
    if file.path.exists():
        file.size()
        try:
            found = torch.load(file.path, weights_only=True)
        except Exception as error:  # the unpickler of a damaged file raises almost any
            file.fail("the file", "be readable by torch.load(weights_only=True)", f"{type(error).__name__}: {error}")
        file.typed("the file", found, dict)
    if found.keys() != terms.keys():
        got = f"{', '.join(map(str, found)) or 'none'} for {', '.join(terms)}"
        raise ValueError(
            f"DFTTrainer: {folder} must hold {TERMS_FILE} of the same kinds of terms to go on with, got {got}. Resume "
            "with the terms that it was made with, or start anew."
        )
    for name, delayed in terms.items():
        delayed.load_state_dict(found[name])


def term_logs(terms: dict[str, Any]) -> dict[str, float]:
    """What is logged of them: term_NAME, rollout_NAME: weight J; of constraints J / bound and the dual weight."""
    out: dict[str, float] = {}
    for kind, delayed in terms.items():
        out |= {f"{kind}_{name}": float(value) for name, value in delayed.values().items()}
        for name, term in delayed.bounded.items():
            if term.ratio is not None:
                out |= {f"{kind}_{name}_over_bound": term.ratio, f"{kind}_{name}_dual": term.dual}
    return out


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


def show(trainer: Any, bar: Bar | None) -> None:
    """Have a trainer of `show_metrics` with this bar in the place of its own; None: with nothing for what it logs."""
    for callback in list(trainer.callback_handler.callbacks):
        if bar is None and isinstance(callback, (transformers.ProgressCallback, transformers.PrinterCallback)):
            trainer.remove_callback(callback)
        elif bar is not None and isinstance(callback, ProgressCallback):
            trainer.remove_callback(callback)
            trainer.add_callback(BarCallback(bar, callback.max_str_len))
