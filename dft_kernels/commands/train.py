"""`dft-kernels train`: a model towards a teacher, from a YAML file, flags, or a file and flags over it."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.hf_argparser import string_to_bool
from transformers.integrations import INTEGRATION_TO_CALLBACK

from ..backends import BACKENDS
from ..evaluation.held_out import HeldOut
from ..files import shown
from ..materials.sources import check_text
from ..training.card import NAMES
from ..training.config import Job, as_flags, read
from ..training.progress import show
from ..training.train import finished, prepare
from ..training.trainer import DFTConfig
from .arguments import (
    SEED,
    Checked,
    Help,
    Number,
    Parser,
    UsageError,
    Whole,
    actions,
    check_name,
    each_of,
    input_file,
    input_folder,
    last_of,
    output_folder,
)
from .flags import add_quiet
from .printing import console, progress

GROUPS = {  # of the help
    "model and data": (
        "model", "text", "max_length", "assistant_only", "completion_only", "packing", "limit", "skip_bad", "held_out",
        "dtype", "cache",
    ),
    "teacher and loss": (
        "teacher", "served_model", "served_k", "principles", "divergence", "soft_weight", "hard_weight", "temperature",
        "teacher_temperature", "temperature_scaling", "matching_every", "matching_from", "matching_ramp",
        "loss_memory_budget", "loss_backend", "loss_gradient_error",
    ),
    "distribution terms": (
        "target", "terms", "terms_decay", "stop_at_floor", "rollout_terms", "rollout_every", "rollout_prompt",
        "rollout_length", "rollout_samples", "rollout_temperature", "rollout_biased_without_score",
    ),
    "adapters and result": ("lora_rank", "correction_rank", "output_dir", "resume_from_checkpoint", "quiet"),
    "steps (of transformers)": (
        "max_steps", "num_train_epochs", "learning_rate", "warmup_steps",
        "per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "use_cpu",
        "logging_steps", "save_steps", "save_total_limit", "report_to", "seed",
    ),
}  # fmt: skip
DEFAULTS = {  # other than Trainer's, for a command that a person watches
    "output_dir": "dft_out",
    "learning_rate": 2e-5,
    "num_train_epochs": 1.0,
    "logging_steps": 10,
    "save_total_limit": 2,
    "dataloader_pin_memory": torch.cuda.is_available(),
}


def _check_reporter(name: str) -> None:
    """That transformers knows it, and finds its package."""
    check_name(name, [*INTEGRATION_TO_CALLBACK, "all", "none"])
    try:
        INTEGRATION_TO_CALLBACK.get(name, object)()
    except (RuntimeError, ImportError) as error:
        why = str(error).split(". ")[0]
        raise ValueError(f"must be installed, got {name}: {why}. pip install {name}.") from error


_SHARE, _FROM_0, _FROM_1 = Number(least=0, below=1), Number(least=0), Whole(1)
TYPES: dict[str, Any] = {  # where neither Job nor DFTConfig checks
    "text": Checked(check_text),
    "principles": Checked(input_file),
    "cache": Checked(output_folder),
    "output_dir": Checked(output_folder),
    "resume_from_checkpoint": Checked(input_folder),
    "loss_backend": each_of(("auto", *BACKENDS))["type"],
    "loss_memory_budget": _FROM_1,
    "loss_gradient_error": Number(above=0, below=1),
    "terms_decay": _SHARE,
    "rollout_temperature": Number(above=0),
    "max_steps": Whole(-1),
    "report_to": Checked(_check_reporter),
    "seed": SEED,
    "data_seed": SEED,
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "dataloader_num_workers": Whole(0),
    "save_steps": Number(above=0),
    "ddp_timeout": _FROM_1,
    **dict.fromkeys(
        ("learning_rate", "num_train_epochs", "warmup_steps", "weight_decay", "adam_epsilon", "max_grad_norm",
         "logging_steps", "eval_steps", "eval_delay"),
        _FROM_0,
    ),
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
         "torch_empty_cache_steps", "eval_accumulation_steps", "save_total_limit", "dataloader_prefetch_factor",
         "ddp_bucket_cap_mb"),
        _FROM_1,
    ),
}  # fmt: skip


class _HelpAll(argparse.Action):
    """Print the help of transformers' own arguments too."""

    def __call__(self, parser: Any, *_: Any) -> None:
        print(argparse.ArgumentParser.format_help(parser), end="")
        parser.exit()


class TrainParser(Parser, transformers.HfArgumentParser):
    """Every field of `Job` and `DFTConfig` as a flag; a YAML file of the same names may come before the flags."""

    file: Path | None = None
    flags: list[str]
    given: dict[str, Any]

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """`job`, a `Job`, `training`, a `DFTConfig`, `quiet`, and `command`: flags that say the same without a file."""
        self.flags, self.given, self.file = list(sys.argv[1:] if args is None else args), {}, None
        arguments = self.flags
        known = {kind: [one.name for one in fields(kind) if one.init] for kind in (Job, DFTConfig)}
        try:
            if self.flags and not self.flags[0].startswith("-"):
                self.file, self.flags = Path(self.flags[0]), self.flags[1:]
                self.given = read(self.file, [name for names in known.values() for name in names])
                self.check_lists()
                arguments = [*as_flags(self.given), *self.flags]
            found = vars(super().parse_args(arguments, namespace))
            job, training = (kind(**{name: found[name] for name in names}) for kind, names in known.items())
        except UsageError:
            raise
        except ValueError as error:
            raise UsageError(self.named(str(error))) from error
        return argparse.Namespace(job=job, training=training, quiet=found["quiet"], command=arguments)

    def check_lists(self) -> None:
        """Refuse a list in the file where a flag takes one value."""
        takes = {action.dest: action.nargs in ("+", "*") for action in actions(self)}
        for name, value in self.given.items():
            if isinstance(value, list) and not takes[name]:
                raise UsageError(f"{self.file}: {name} must be one value, got {shown(value)}. Write NAME: VALUE.")

    def shown(self, action: argparse.Action) -> str:
        """The name of an argument as it was typed, or as a key of the file."""
        flag = last_of(action.option_strings, self.flags)
        if flag is None and action.dest in self.given:
            return f"{self.file}: {action.dest}"
        return flag or super().shown(action)

    def format_help(self) -> str:
        """Ours and the most used by group, the others by name."""
        by_name: dict[str, argparse.Action] = {}
        for action in actions(self):
            by_name.setdefault(action.dest, action)
        help = self.formatter_class(prog=self.prog)
        help.add_usage(self.usage, (), ())
        help.add_text(self.description)
        for title, names in GROUPS.items():
            help.start_section(title)
            help.add_arguments([by_name.pop(name) for name in names if name in by_name])
            help.end_section()
        help.start_section("other arguments of transformers.TrainingArguments, explained by --help-all")
        help.add_text(", ".join(f"--{name}" for name in by_name if name not in ("help", "help_all")))
        help.end_section()
        return help.format_help()


def parser() -> TrainParser:
    """The options of `dft-kernels train`."""
    made = TrainParser(  # type: ignore[misc]
        [Job, DFTConfig],  # type: ignore[arg-type]
        prog="dft-kernels train",
        usage="dft-kernels train [CONFIG.yaml] [--model NAME] [--text FILE ...] [--teacher STORE|MODEL|URL] [options]",
        description="Train a causal LM towards a teacher's distributions, or by cross-entropy alone. CONFIG.yaml holds "
        "the same names; a flag, written with _ or -, goes before it. Stopped at any moment, the same command goes on "
        "from its checkpoint.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    made.add_argument("--help-all", action=_HelpAll, nargs=0, help="all arguments, those of transformers explained too")
    add_quiet(made)
    made.set_defaults(**DEFAULTS)
    kinds: dict[Any, Any] = {int: Whole(), float: Number()}
    letters: dict[Any, str] = {int: "N", float: "X", string_to_bool: "true|false"}
    for action in actions(made):
        action.metavar = action.metavar or letters.get(action.type)
        action.type = TYPES.get(action.dest, kinds.get(action.type, action.type))
        action.nargs = "+" if action.dest == "report_to" else action.nargs
    return made


def run(options: argparse.Namespace) -> int:
    """Train, measure, save; print what came out."""
    job, training = options.job, options.training
    transformers.utils.logging.disable_progress_bar()  # of loading; Trainer's own stays
    out = console(quiet=options.quiet or (training.world_size > 1 and not training.should_log))
    if (steps := finished(job, training)) is not None:
        out.print(
            f"nothing to do: {training.output_dir} holds all {steps} steps of this job. More of --max_steps or "
            "--num_train_epochs trains on; another --output_dir trains anew.",
            soft_wrap=True,
        )
        return 0
    with out.status("model, text, teacher"):
        ready = prepare(job, training, options.command)
    for line in ready.about:
        out.print(line, soft_wrap=True, highlight=False, markup=False)
    if ready.resume is not None:
        out.print(f"going on from {ready.resume}", soft_wrap=True)
    with progress("training", None, "steps", quiet=out.quiet) as bar:
        show(ready.trainer, None if options.quiet else bar)
        found = ready.train()
    if found.stopped:
        out.print(f"stopped at step {found.step}; the same command goes on from its checkpoint", soft_wrap=True)
        return 130
    saved = training.output_dir
    out.print(report(found.before, found.after, found.metrics, found.history))
    written = ready.card.path
    if written.name != NAMES[0]:
        out.print(f"{NAMES[0]} is yours and stays; the model card is {written}", soft_wrap=True, markup=False)
    out.print(f"saved in {saved}; dft-kernels sample {saved} --prompt '...' puts it beside {job.model}", soft_wrap=True)
    return 0


def stopped(options: argparse.Namespace) -> str:
    """How an interrupted command goes on."""
    return "the same command goes on from its last checkpoint"


def report(before: HeldOut | None, after: HeldOut | None, metrics: dict[str, float], history: list[Any]) -> Any:
    """The run as a table."""
    from rich.table import Table

    table = Table(title=f"{history[-1]['step'] if history else 0} steps, {metrics.get('train_runtime', 0):,.0f} s")
    for heading in ("held-out text, nats a token", "before", "after"):
        table.add_column(heading, justify="left" if heading.startswith("held") else "right")
    if before is not None and after is not None:
        rows = {"cross-entropy": "cross_entropy", "perplexity": "perplexity", "entropy": "entropy",
                "next token right": "accuracy", "KL(teacher || model)": "kl"}  # fmt: skip
        for name, attribute in rows.items():
            values = [getattr(one, attribute) for one in (before, after)]
            if None not in values:
                table.add_row(name, *(f"{value:.4f}" for value in values))
    speed = [entry["tokens_per_second"] for entry in history if "tokens_per_second" in entry]
    memory = [entry["peak_memory_gb"] for entry in history if "peak_memory_gb" in entry]
    if speed:
        table.caption = f"{sorted(speed)[len(speed) // 2]:,.0f} tokens/s, peak memory {max(memory):.2f} GB"
    return table
