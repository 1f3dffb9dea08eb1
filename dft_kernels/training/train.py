"""`dft-kernels train`: a model towards a teacher, from one configuration."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.data import Dataset, Subset

from ..evaluation.held_out import HeldOut, held_out
from ..loss.functional import shift_labels
from ..materials.models import read_texts
from ..materials.sources import ABOUT, model_of, read_about, texts_of
from ..models.correction import CORRECTION_FILE, add_correction, save_correction
from ..models.heads import output_layer
from ..store.reader import Store
from ..targets import target_file
from .capture import sequences_of
from .collators import PrinciplesCollator
from .config import Job, parse
from .target_terms import HumanText, asks_for_text, terms_of
from .teaching import asked
from .trainer import DFTConfig, DFTTrainer


class Sequences(Dataset[dict[str, list[int]]]):
    """Token sequences [L] as items of a Trainer."""

    def __init__(self, sequences: list[Tensor]) -> None:
        self.sequences = sequences

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        ids = self.sequences[number].tolist()
        return {"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)}


class StopOnInterrupt(transformers.TrainerCallback):
    """The first Ctrl-C (or SIGTERM) ends training after its step, with a checkpoint; the second at once."""

    def __init__(self) -> None:
        self.stopped = False
        self.before: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the signals."""

        def stop(number: int, frame: Any) -> None:
            if self.stopped:
                raise KeyboardInterrupt
            self.stopped = True
            print("\nstopping after this step, with a checkpoint; again to stop at once", file=sys.stderr)

        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, stop)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop, and save where the step was taken."""
        if args.world_size > 1:  # all of them at one step, whoever was told first
            told = torch.tensor(float(self.stopped), device=args.device)
            torch.distributed.all_reduce(told)
            self.stopped = bool(told)
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Give the signals back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    try:
        job, options, _ = parse(sys.argv[2:] if arguments is None else arguments)
        return run(job, options)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"dft-kernels {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("dft-kernels train: stopped; the same command goes on from its last checkpoint", file=sys.stderr)
        return 130


def run(job: Job, options: DFTConfig) -> int:
    """Train, measure, save; print what came out."""
    from rich.console import Console

    transformers.utils.logging.disable_progress_bar()  # of loading; Trainer's own stays
    console = Console()
    if options.world_size > 1:
        console.quiet = not options.should_log
    assert job.model is not None
    cache, out = Path(job.cache), Path(options.output_dir or "")
    resume = options.resume_from_checkpoint or _resumable(job, out)
    with console.status("model, text, teacher"):
        model, tokenizer = model_of(job.model, cache, getattr(torch, job.dtype))
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        teacher, training, kept, collate = _materials(job, tokenizer, cache)
    terms = _terms(job, options, tokenizer, model, training)
    model = _adapted(model, job)
    trainer = DFTTrainer(
        model,
        options,
        teacher,
        **terms,
        train_dataset=training,
        data_collator=collate,
        processing_class=tokenizer,
        callbacks=[stop := StopOnInterrupt()],
    )
    if options.should_save:
        _tell(job, out)
    batches = [collate([kept[number]]) for number in range(len(kept))]
    before = _measure(trainer, teacher, batches)
    if resume is not None:
        console.print(f"going on from {resume}", soft_wrap=True)
    found = trainer.train(resume_from_checkpoint=resume)
    if stop.stopped:
        where = f"stopped at step {trainer.state.global_step}; the same command goes on from its checkpoint"
        console.print(where, soft_wrap=True)
        return 130
    _save(trainer, job, out)
    after = None if trainer.is_fsdp_enabled else _measure(trainer, teacher, batches)  # its parts are not here
    if options.should_save:
        measured = {when: one and vars(one) for when, one in (("before", before), ("after", after))}
        _tell(job, out, held_out=measured)
    console.print(report(before, after, found.metrics, trainer.state.log_history))
    console.print(f"saved in {out}; dft-kernels sample {out} --prompt '...' puts it beside {job.model}", soft_wrap=True)
    return 0


def _materials(job: Job, tokenizer: Any, cache: Path) -> tuple[Any, Any, Any, Any]:
    """Teacher, training sequences, held-out ones, and what makes a batch of them."""
    teacher: Any = None
    data: Any
    if job.stored:
        assert job.teacher is not None
        teacher = data = Store(job.teacher, tokenizer)
        collate: Any = teacher.collate
    else:
        data = Sequences(sequences_of(texts_of(job.text or [], cache), tokenizer, job.length))
        if job.teacher is not None:
            teacher, _ = model_of(job.teacher, cache, flag="--teacher")
        collate = transformers.DataCollatorForSeq2Seq(tokenizer)
        if job.principles is not None:
            collate = PrinciplesCollator.from_text(read_texts([Path(job.principles)])[0], tokenizer)
    if len(data) <= job.held_out:
        raise ValueError(
            f"train: the texts must hold more than the {job.held_out} sequences that are held out, got {len(data)}. "
            "Give more text, or a smaller --held_out or --length."
        )
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()  # the same when resumed
    return teacher, Subset(data, order[job.held_out :]), Subset(data, order[: job.held_out]), collate


def _terms(job: Job, options: DFTConfig, tokenizer: Any, model: Any, training: Any) -> dict[str, Any]:
    """terms and rollout_terms of DFTTrainer. Noise floors are of as many rows as a running mean looks back on; gains
    are measured where the model is to be trained, if it fits there whole."""
    if job.target is None:
        return {}
    target, out = target_file.load(job.target, tokenizer), {}
    batch = options.per_device_train_batch_size * options.gradient_accumulation_steps * options.world_size
    steps = (1 + options.terms_decay) / (1 - options.terms_decay)
    for name, given, own in (("terms", job.terms, False), ("rollout_terms", job.rollout_terms, True)):
        if given is None:
            continue
        text = None
        if asks_for_text(given):
            if options.place_model_on_device and not options.fsdp:
                model.to(options.device)
            some = [torch.as_tensor(training[number]["input_ids"]) for number in range(min(len(training), 8192))]
            labels = torch.nn.utils.rnn.pad_sequence(some, True, -100)
            target_of = shift_labels(labels)
            rows = int((target_of != -100).sum())
            each = rows / len(some) if not own else options.rollout_samples * options.rollout_length
            text = HumanText(labels.clamp(min=0), target_of, max(1, min(rows // 2, int(batch * each * steps))))
        out[name] = terms_of(target, given, output_layer(model).weight.shape[0], text, own, model)
    return out


def _tell(job: Job, out: Path, **more: Any) -> None:
    """Leave what the folder's checkpoints and result are made of."""
    out.mkdir(parents=True, exist_ok=True)
    (out / ABOUT).write_text(
        json.dumps({"base": job.model, **more, "job": vars(job)}, indent=1) + "\n", encoding="utf-8"
    )


def _resumable(job: Job, out: Path) -> str | None:
    """The last checkpoint of this job; ValueError where the folder's are another's, which would be gone on with."""
    found = last_checkpoint(out)
    if found is None:
        return None
    _, before = read_about("train", out)
    apart = [name for name, value in vars(job).items() if name != "cache" and before.get(name) != value]
    if apart:
        got = ", ".join(f"{name} {before.get(name)!r} for {getattr(job, name)!r}" for name in apart[:3])
        raise ValueError(
            f"train: output_dir must be new, or hold checkpoints of this job, got {out} with {got}. Name another "
            "--output_dir, or --resume_from_checkpoint."
        )
    return found


def _adapted(model: Any, job: Job) -> Any:
    if job.correction_rank:
        add_correction(model, job.correction_rank)
    if not job.lora_rank:
        return model
    try:
        import peft
    except ImportError as error:
        raise ValueError("train: lora_rank needs PEFT, got none. pip install peft.") from error
    config = peft.LoraConfig(r=job.lora_rank, lora_alpha=2 * job.lora_rank, target_modules="all-linear")
    return peft.get_peft_model(model, config)


def _measure(trainer: DFTTrainer, teacher: Any, batches: list[dict[str, Tensor]]) -> HeldOut | None:
    if not batches:
        return None
    model = trainer.accelerator.unwrap_model(trainer.model)
    return held_out(model, batches, asked(teacher, trainer.args.device))


def _save(trainer: DFTTrainer, job: Job, out: Path) -> None:
    """The result, in whole or what was trained of it, and the tokenizer."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if job.correction_rank:
        if trainer.args.should_save:
            save_correction(model, out / CORRECTION_FILE)
            trainer.processing_class.save_pretrained(out)
    else:
        trainer.save_model(str(out))


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


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint in a folder of results, None without any."""
    from transformers.trainer_utils import get_last_checkpoint

    found: str | None = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    return found
