"""The model card of a training: README.md beside the result, with what made it and what it came to."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import transformers
import yaml

from .. import __version__
from ..evaluation.held_out import HeldOut
from ..files import replace_text
from ..materials.sources import SMOLLM2
from ..store.reader import Store
from ..teachers.served import ServedTeacher
from .config import Job
from .markdown import code, plain, table, ticks
from .progress import term_logs
from .trainer import DFTConfig, DFTTrainer

MARK = "<!-- Written by dft-kernels train. Without this line the file is yours, and the next run writes another. -->"
NAMES = ("README.md", "MODEL_CARD.md")
MEASURED = {"cross-entropy": "cross_entropy", "perplexity": "perplexity", "entropy": "entropy",
            "next token right": "accuracy", "KL(teacher || model)": "kl"}  # fmt: skip


class Card:
    """The card of one run. data: lines about what it trains on; command: its arguments; before, after: once known.
    path: where it goes: a file of another hand is left as it is, and the card goes beside it."""

    def __init__(self, job: Job, trainer: DFTTrainer, teacher: Any, data: list[str], command: Sequence[str]) -> None:
        self.job, self.trainer, self.teacher, self.data, self.command = job, trainer, teacher, data, command
        self.before: HeldOut | None = None
        self.after: HeldOut | None = None
        out = Path(str(trainer.args.output_dir))
        names = (*NAMES, *(f"MODEL_CARD_{number}.md" for number in range(2, 1000)))
        self.path = next(out / name for name in names if not (out / name).exists() or _ours(out / name))

    def write(self, **asked: Any) -> None:
        """Write it, whole or not at all. asked: arguments of Trainer.create_model_card, which join it."""
        front = yaml.safe_dump(self.front(asked), sort_keys=False, allow_unicode=True)
        title = asked.get("model_name") or self.path.resolve().parent.name
        replace_text(self.path, f"---\n{front}---\n\n{MARK}\n\n# {plain(title)}\n\n{self.body()}")

    def front(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The metadata that a hub reads: names that it knows alone."""
        job = self.job
        library = "peft" if job.lora_rank else "dft-kernels" if job.correction_rank else "transformers"
        tags = ["dft-kernels", *(["lora"] if job.lora_rank else []), *_listed(asked.get("tags"))]
        texts = [text.split(":")[1] for text in job.text or () if text.startswith("hf:")]
        texts = [*filter(_on_hub, texts), *_listed(asked.get("dataset_tags"))]
        base = asked.get("finetuned_from") or job.model
        return {
            **{name: asked[name] for name in ("language", "license") if asked.get(name)},
            **({"base_model": base} if _on_hub(str(base)) else {}),
            "library_name": library,
            "pipeline_tag": "text-generation",
            "tags": list(dict.fromkeys(tags)),
            **({"datasets": list(dict.fromkeys(texts))} if texts else {}),
        }

    def body(self) -> str:
        """The card under its title."""
        job, args, state = self.job, self.trainer.args, self.trainer.state
        assert isinstance(args, DFTConfig)
        trained = f"LoRA of rank {job.lora_rank}" if job.lora_rank else "all weights"
        trained = f"CorrectionHead of rank {job.correction_rank}" if job.correction_rank else trained
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        made = {
            "base model": code(job.model),
            "trained": f"{trained}, {job.dtype}{', bf16 products' if args.bf16 else ''}",
            "teacher": self._teacher(),
            "its principles": code(job.principles) if job.principles else "",
            "data": self._texts(),
            "counted": "<br>".join(map(plain, self.data)),
            "loss": self._loss(args),
            "target": code(job.target) if job.target else "",
            "terms": ", ".join(map(code, job.terms or ())),
            "terms of its own text": ", ".join(map(code, job.rollout_terms or ())),
            "steps": f"{state.global_step:,} of {batch} rows, {state.epoch or 0:.4g} epochs, seed {args.seed}",
            "learning rate": f"{args.learning_rate:g}, {transformers.SchedulerType(args.lr_scheduler_type).value}",
        }
        parts = ["## Training", table(("", ""), [each for each in made.items() if each[1]])]
        if self.before is not None:
            both = [vars(one) | {"perplexity": one.perplexity} if one else {} for one in (self.before, self.after)]
            known = [(name, of) for name, of in MEASURED.items() if both[0][of] is not None]
            held = [(name, *(f"{one[of]:.4f}" if one else "" for one in both)) for name, of in known]
            about = f"{job.held_out} rows, {self.before.tokens:,} tokens that were not trained on."
            parts += [f"## Held-out text\n\n{about}", table(("nats a token", "before", "after"), held)]
        if logs := term_logs(self.trainer.delayed):
            about = "Running means of the last steps; over_bound: J in units of what human text of this size is off by."
            rows = table(("", ""), [(code(name), f"{value:.4g}") for name, value in logs.items()])
            parts += [f"## Distribution terms\n\n{about}", rows]
        used = ["torch", "transformers", *(["peft"] if job.lora_rank else [])]
        versions = [f"- {'PEFT' if name == 'peft' else name} {version(name)}" for name in used]
        parts += ["### Framework versions", "\n".join([f"- dft-kernels {__version__}", *versions])]
        if self.command:
            fence = "`" * max(3, 1 + ticks(line := shlex.join(self._again(args))))
            parts += ["## Again", f"{fence}\n{line}\n{fence}"]
        return "\n\n".join(parts) + "\n"

    def _texts(self) -> str:
        texts = self.job.text or [str(self.job.teacher)]
        more = f" and {len(texts) - 20} more" if len(texts) > 20 else ""
        return ", ".join(map(code, texts[:20])) + more

    def _teacher(self) -> str:
        if isinstance(self.teacher, ServedTeacher):
            about, rows = self.teacher.about, max(1, self.teacher.rows)
            flagged = f"tail below rounding in {100 * self.teacher.flagged / rows:.1f} % of rows"
            return f"{code(about.model)} served by {code(about.server)}, top {self.teacher.top_k}, {flagged}"
        if not isinstance(self.teacher, Store):
            return code(self.job.teacher) if self.job.teacher else "none: cross-entropy alone"
        held, what = self.teacher.contents, f"{len(self.teacher):,} sequences, {self.teacher.rows:,} rows"
        which = f"served by {code(held.server)}" if held.model_sha256 is None else f"sha256 `{held.model_sha256}`"
        return f"store {code(self.job.teacher)} ({held.kind}) of {code(held.model)}, {which}: {what}"

    def _loss(self, args: DFTConfig) -> str:
        if self.teacher is None:
            return "cross-entropy"
        names = ("soft_weight", "hard_weight", "temperature", "teacher_temperature", "temperature_scaling")
        given = [(name, getattr(args, name)) for name in (*names, "matching_every", "matching_from", "matching_ramp")]
        return f"`{args.divergence}`, {', '.join(f'{n} {v}' for n, v in given if v is not None)}"

    def _again(self, args: DFTConfig) -> list[str]:
        """The command line, without what is secret."""
        first = ["dft-kernels"]
        if args.world_size > 1:
            first = ["torchrun", f"--nproc_per_node={args.world_size}", "-m", "dft_kernels.commands.main"]
        secret, kept = False, []
        for word in self.command:
            secret = word.partition("=")[0].endswith("token") if word.startswith("--") else secret
            kept += [] if secret else [word]
        return [*first, "train", *kept]


def _ours(path: Path) -> bool:
    return path.is_file() and MARK.encode() in path.read_bytes()


def _on_hub(name: str) -> bool:
    """Whether a name can be a hub's; there, a metadata field with another is an error."""
    return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.A)) and name != SMOLLM2 and not os.path.exists(name)


def _listed(given: Iterable[str] | str | None) -> list[str]:
    return [given] if isinstance(given, str) else list(given or ())
