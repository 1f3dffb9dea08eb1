"""A training job, from its configuration to what is saved."""

from __future__ import annotations

import inspect
import itertools
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import Subset
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..evaluation.held_out import HeldOut, held_out
from ..files import replace_text
from ..loss.functional import shift_labels
from ..materials.encoders import encoder
from ..materials.models import read_texts
from ..materials.records import Faults
from ..materials.sources import ABOUT, check_model, documents_of, model_of, read_about, tokenizer_of
from ..models.correction import CORRECTION_FILE, add_correction, save_correction
from ..models.heads import check_ids, check_positions, output_layer
from ..store.reader import Store
from ..targets import target_file
from ..targets.target import Target
from ..teachers.served import ServedTeacher
from .card import Card
from .collators import PrinciplesCollator
from .config import Job
from .examples import Example, PackCollator, Packs, Sequences, check_packing, examples_of, shown
from .progress import TERMS_FILE
from .serving import naming
from .target_terms import HumanText, asks_for_text, asks_for_texts, terms_of
from .teaching import asked
from .text_features import written
from .trainer import DFTConfig, DFTTrainer


class CardTrainer(DFTTrainer):
    """DFTTrainer, whose `push_to_hub` takes the run's card along in place of Trainer's. card: None: Trainer's."""

    card: Card | None = None

    def create_model_card(self, *arguments: Any, **named: Any) -> None:
        """Trainer's arguments; they join the card."""
        if self.card is None:
            super().create_model_card(*arguments, **named)
        elif self.is_world_process_zero():
            self.card.write(**inspect.signature(super().create_model_card).bind(*arguments, **named).arguments)


def _keep_card(model: Any, out: Path) -> None:
    """PEFT writes into README.md of every folder that it saves to: not of the result, whose card is the run's."""
    write, own = model.create_or_update_model_card, out.resolve()
    model.create_or_update_model_card = lambda folder: None if Path(folder).resolve() == own else write(folder)


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
        if args.world_size > 1:  # all processes at one step, whichever got the signal
            told = torch.tensor(float(self.stopped), device=args.device)
            torch.distributed.all_reduce(told)
            self.stopped = bool(told)
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Give the signals back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Outcome:
    """What a run came to. before, after: of held-out text, None where it was not measured; stopped: at `step`, by a
    signal, with a checkpoint and nothing saved."""

    before: HeldOut | None
    after: HeldOut | None
    metrics: dict[str, float]
    history: list[Any]
    step: int
    stopped: bool


class Run:
    """A job with everything loaded. resume: the checkpoint that it goes on from, None at its beginning; about: what it
    trains on, for a reader; card: what says so beside the result."""

    def __init__(
        self,
        job: Job,
        trainer: CardTrainer,
        kept: Any,
        teacher: Any,
        resume: str | None,
        stop: StopOnInterrupt,
        about: list[str],
        card: Card,
    ) -> None:
        self.about, self.card = about, card
        self.job, self.trainer, self.teacher, self.resume, self.stop = job, trainer, teacher, resume, stop
        self.out = Path(trainer.args.output_dir)
        self.batches = [trainer.data_collator([kept[number]]) for number in range(len(kept))]

    def train(self) -> Outcome:
        """Measure, train, save, measure; the folder says from the beginning what its checkpoints are of."""
        trainer, writes = self.trainer, self.trainer.args.should_save
        if writes:
            _tell(self.job, self.out)
        before = self.card.before = self._measure()
        after = None
        found = trainer.train(resume_from_checkpoint=self.resume)
        if not self.stop.stopped:
            # before what is saved is pushed, its card with it; under FSDP the model's parts are not here
            after = self.card.after = None if trainer.is_fsdp_enabled else self._measure()
            trainer.card = self.card
            self._save()
            if writes:
                self.card.write()
                measured = {when: one and vars(one) for when, one in (("before", before), ("after", after))}
                _tell(self.job, self.out, held_out=measured)
        state = trainer.state
        return Outcome(before, after, found.metrics, state.log_history, state.global_step, self.stop.stopped)

    def _measure(self) -> HeldOut | None:
        if not self.batches:
            return None
        # as it is saved, and as it was before the first step: not in mixed precision
        model = self.trainer.accelerator.unwrap_model(self.trainer.model, keep_fp32_wrapper=False)
        return held_out(model, self.batches, asked(self.teacher, self.trainer.args.device))

    def _save(self) -> None:
        """The result, in whole or what was trained of it, and the tokenizer."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        if self.job.lora_rank:
            _keep_card(model, self.out)
        if not self.job.correction_rank:
            self.trainer.save_model(str(self.out))
        elif self.trainer.args.should_save:
            save_correction(model, self.out / CORRECTION_FILE)
            self.trainer.processing_class.save_pretrained(self.out)


def finished(job: Job, options: DFTConfig) -> int | None:
    """The steps of a job whose result lies in its folder, where no more are asked for, else None: a Trainer that goes
    on from the last step would take one more."""
    out = Path(options.output_dir or "")
    found = None if options.resume_from_checkpoint else _resumable(job, out)
    if found is None or "held_out" not in json.loads((out / ABOUT).read_text(encoding="utf-8")):
        return None
    state = json.loads((Path(found) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    steps: int = state["global_step"]
    if options.max_steps > 0:
        return steps if steps >= options.max_steps else None
    whole = steps >= state["max_steps"] and state["num_train_epochs"] >= options.num_train_epochs
    return steps if whole else None


def prepare(job: Job, options: DFTConfig, command: Sequence[str] = ()) -> Run:
    """Load a job's parts, small ones first: ValueError for what is wrong with any, before a model is loaded where that
    can be known, and before anything is written. command: arguments that make this job again, for its card."""
    assert job.model is not None
    cache = Path(job.cache)
    resume = options.resume_from_checkpoint or _resumable(job, Path(options.output_dir or ""))
    if job.correction_rank and options.push_to_hub:
        raise ValueError(
            "train: push_to_hub must be false with correction_rank, got true, which would push the whole model. Upload "
            f"{options.output_dir} when it is done."
        )
    if options.rollout_biased_without_score and asks_for_texts(job.rollout_terms or ()):
        raise ValueError(
            "train: rollout_biased_without_score must be false with text_mmd, which is all score, got true. Leave one "
            "of them out."
        )
    check_model(job.model)
    teacher: Any = None
    if job.stored:
        try:
            teacher = Store(str(job.teacher))
        except ValueError as error:
            raise ValueError(f"train: teacher: {str(error).removeprefix('store: ')}") from error
        if teacher.share is not None:
            raise ValueError(
                f"train: teacher must be a whole store, got {job.teacher}, {teacher.share} of one. Join all of its "
                "shards by dft-kernels store join."
            )
    elif job.served:
        with naming("train", "teacher"):
            teacher = ServedTeacher(str(job.teacher), job.served_k, model=job.served_model)
            _ = teacher.about
    elif job.teacher is not None:
        check_model(job.teacher, "teacher")
    target = None if job.target is None else target_file.load(job.target)
    principles = None if job.principles is None else read_texts([job.principles], "principles")[0]

    tokenizer = tokenizer_of(job.model, cache)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if target is not None and target.about.tokenizer_sha256 is not None:
        target_file.check_tokenizer(str(job.target), target, tokenizer)
    data: Any = teacher
    collate: Any = transformers.DataCollatorForSeq2Seq(tokenizer)
    examples: list[Example] = []
    counted: list[str] = []
    left_out: list[str] = []
    if job.stored:
        teacher.check_tokenizer(tokenizer)
        collate = teacher.collate
        first = [_stored(teacher, number) for number in range(min(3, len(teacher)))]
        counted = [f"{len(teacher):,} rows, {teacher.rows:,} tokens, of the store"]
    else:
        faults = Faults(job.skip_bad)
        documents = itertools.islice(documents_of(job.text or [], cache, faults), job.limit)
        examples, tally = examples_of(documents, tokenizer, job.max_length, faults, job.only)
        counted, left_out = tally.said(examples, faults), faults.said()
        data = Sequences(examples)
        if job.packing:
            data, collate = Packs(examples, job.max_length), PackCollator(tokenizer.pad_token_id or 0)
            counted.insert(1, f"packed into {len(data):,} rows of up to {job.max_length:,} tokens")
        elif principles is not None:
            collate = PrinciplesCollator.from_text(principles, tokenizer)
        first = examples[:3]
    about = [*counted, "the first ones; what is in [brackets] is read and not learned:"]
    about += [f"{n}. {shown(e, tokenizer)}" for n, e in enumerate(first, 1)]
    if len(data) <= job.held_out:
        got = "; ".join([f"{len(data)}", *left_out])
        raise ValueError(
            f"train: text must hold more than the {job.held_out} sequences that are held out, got {got}. Give more "
            "text, or a smaller --held_out or --max_length."
        )
    model, _ = model_of(job.model, cache, getattr(torch, job.dtype))
    if job.stored:
        longest = max(int(starts.diff().max()) for starts in teacher.starts)
        check_positions(model, longest, "train", "teacher", "hold sequences of", "Capture with a smaller --max_length")
        check_ids(model, teacher.contents.vocab_size - 1, "train", "teacher")
    longest = max((len(one.ids) for one in examples), default=0)
    highest = max((int(one.ids.max()) for one in examples), default=0)
    check_ids(model, highest, "train", "text")
    check_positions(model, longest, "train", "max_length", "be", "Lower it: longer ones are cut")
    if isinstance(data, Packs):
        for number in range(min(8, len(data))):
            check_packing(model, data[number])
    if job.served:
        with naming("train", "teacher"):
            teacher.check(tokenizer, output_layer(model).weight.shape[0])
    elif not job.stored and job.teacher is not None:
        teacher, _ = model_of(job.teacher, cache, argument="teacher")
        told = len(collate.principles) if isinstance(collate, PrinciplesCollator) else 0
        check_ids(teacher, highest, "train", "text", "teacher")
        check_positions(teacher, told + longest, "train", "teacher", "take", "Lower --max_length: longer ones are cut")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()  # the same when resumed
    training, kept = Subset(data, order[job.held_out :]), Subset(data, order[: job.held_out])
    terms = {} if target is None else _terms(target, job, options, model, training, tokenizer)
    trainer = CardTrainer(
        _adapted(model, job), options, teacher, **terms, train_dataset=training, data_collator=collate,
        processing_class=tokenizer, callbacks=[stop := StopOnInterrupt()],
    )  # fmt: skip
    card = Card(job, trainer, teacher, counted, command)
    return Run(job, trainer, kept, teacher, resume, stop, about, card)


def _stored(store: Store, number: int) -> Example:
    """A sequence of a store, for a reader."""
    batch = store.batch([number])
    counts = batch["labels"][0] != -100
    counts[:1] = False  # nothing predicts the first
    return Example(batch["input_ids"][0], counts)


def _terms(target: Target, job: Job, options: DFTConfig, model: Any, training: Any, tokenizer: Any) -> dict[str, Any]:
    """terms and rollout_terms of DFTTrainer. Noise floors are of as many rows as a running mean looks back on; gains
    are measured where the model is to be trained, if it fits there whole."""
    out = {}
    batch = options.per_device_train_batch_size * options.gradient_accumulation_steps * options.world_size
    steps = (1 + options.terms_decay) / (1 - options.terms_decay)
    for name, given, own in (("terms", job.terms, False), ("rollout_terms", job.rollout_terms, True)):
        if given is None:
            continue
        text = people = None
        if asks_for_texts(given):
            reader = encoder("minilm", Path(job.cache))
            reader.model.to(options.device)
            texts = [torch.as_tensor(training[at]["input_ids"]).tolist() for at in range(min(len(training), 1024))]
            people = written(reader, model, tokenizer, texts, options)
        if asks_for_text(given):
            if options.place_model_on_device and not options.fsdp:
                model.to(options.device)
            some = [torch.as_tensor(training[number]["input_ids"]) for number in range(min(len(training), 8192))]
            labels = torch.nn.utils.rnn.pad_sequence(some, True, -100)
            target_of = shift_labels(labels)
            rows = int((target_of != -100).sum())
            each = rows / len(some) if not own else options.rollout_samples * options.rollout_length
            text = HumanText(labels.clamp(min=0), target_of, max(1, min(rows // 2, int(batch * each * steps))))
        out[name] = terms_of(target, given, output_layer(model).weight.shape[0], text, own, model, people)
    return out


def _tell(job: Job, out: Path, **more: Any) -> None:
    """Leave what the folder's checkpoints and result are made of."""
    out.mkdir(parents=True, exist_ok=True)
    replace_text(out / ABOUT, json.dumps({"base": job.model, **more, "job": vars(job)}, indent=1) + "\n")


def _resumable(job: Job, out: Path) -> str | None:
    """The last checkpoint of this job; ValueError where the folder's are another's, which would be gone on with."""
    found = last_checkpoint(out, job.target is not None)
    if found is None:
        return None
    _, before = read_about("train", out)
    known = {one.name: before.get(one.name, one.default) for one in fields(Job)}  # an older one has fewer
    apart = [name for name, value in vars(job).items() if name != "cache" and known[name] != value]
    if apart:
        got = ", ".join(f"{name}={known[name]!r} in place of {getattr(job, name)!r}" for name in apart[:3])
        raise ValueError(
            f"train: output_dir must be new, or hold checkpoints of this job, got {out} of one with {got}. Name "
            "another --output_dir, or --resume_from_checkpoint."
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


def last_checkpoint(folder: Path, terms: bool = False) -> str | None:
    """The newest whole checkpoint in a folder of results, None without any: Trainer writes into a checkpoint's folder
    itself, its state last, and the running statistics of terms come after that."""
    start = f"{PREFIX_CHECKPOINT_DIR}-"
    numbers = [path.name.removeprefix(start) for path in folder.glob(f"{start}*")]
    for number in sorted((int(one) for one in numbers if one.isdecimal()), reverse=True):
        found = folder / f"{start}{number}"
        if _is_whole(found / TRAINER_STATE_NAME) and (not terms or (found / TERMS_FILE).exists()):
            return str(found)
    return None


def _is_whole(state: Path) -> bool:
    try:
        return isinstance(json.loads(state.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False
