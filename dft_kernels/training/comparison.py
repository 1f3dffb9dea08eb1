"""The same student trained by cross-entropy (SFT) and towards its teacher's distributions (DFT), and both measured.

The student is every second layer of the teacher. The teacher's distributions are captured into a store, and two copies
of the student see the same batches: one their tokens alone, one the store's distributions too.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch.utils.data import Subset

from ..backends import extension
from ..evaluation.held_out import HeldOut, distinct, held_out
from ..generation.sampling import continuations
from ..store.reader import Store
from .attach import detach
from .capture import capture
from .students import every_second_layer, pack
from .trainer import DFTConfig, DFTTrainer

HARD_WEIGHT = 0.1  # DFT's loss: KL(teacher || student) + 0.1 cross-entropy
LEARNING_RATE = 5e-4
WARMUP = 5  # steps
HELD_OUT = 16  # sequences
LOOKS = 6  # times that a run is measured on them
PROMPT, NEW = 24, 48  # tokens of a continuation
WAYS = ("SFT", "DFT")


@dataclass(frozen=True)
class Sizes:
    """Of a comparison: steps of each run, sequences a step, tokens a sequence; seed: which sequences, in what order."""

    steps: int
    batch: int
    length: int
    seed: int = 0

    @property
    def sequences(self) -> int:
        """How many the texts must hold."""
        return self.steps * self.batch + HELD_OUT


@dataclass(frozen=True)
class Comparison:
    """What was found, by the name of the model: WAYS, "teacher", "student before", or of writing "the text itself"."""

    capture_tokens_s: float
    curves: dict[str, list[tuple[int, HeldOut]]]  # of WAYS: step, and what the model was after it
    held_out: dict[str, HeldOut]
    distinct: dict[str, list[float]]  # distinct-1, -2, -3 of what was written
    seconds: dict[str, float]  # of WAYS: a step, the median
    prompts: list[str]
    written: dict[str, list[str]]  # the continuation of each prompt


def compare(
    teacher: Any,
    tokenizer: Any,
    texts: list[str],
    sizes: Sizes,
    folder: Path,
    *,
    say: Callable[[str], None] = print,
    tick: Callable[[int], None] | None = None,
) -> Comparison:
    """Capture, train twice, measure. folder: made if it is not there, for files that last as long as this. tick: told
    of tokens as the teacher has read them. ValueError, with nothing written, where the texts are too short."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    packed = pack(texts, tokenizer, sizes.length)
    if len(packed) < sizes.sequences:
        raise ValueError(
            f"compare: texts must hold {sizes.sequences} sequences of {sizes.length} tokens, got {len(packed)}. Pass "
            "more --text, or smaller --steps, --batch or --length."
        )
    order = torch.randperm(len(packed), generator=torch.Generator().manual_seed(sizes.seed))[: sizes.sequences]
    sequences = list(packed[order])
    folder.mkdir(parents=True, exist_ok=True)
    teacher = teacher.to(device).eval().requires_grad_(False)
    student = every_second_layer(teacher).requires_grad_(True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        began = time.perf_counter()
        model = copy.deepcopy(teacher).bfloat16() if _multiplies_bf16(device) else teacher
        store = capture(model, tokenizer, sequences, Path(scratch) / "teacher", name="teacher", tick=tick)
        captured = time.perf_counter() - began
        starts = range(0, HELD_OUT, sizes.batch)
        batches = [store.batch(range(n, min(n + sizes.batch, HELD_OUT))) for n in starts]
        plain = [{name: b[name] for name in ("input_ids", "attention_mask", "labels")} for b in batches]

        def look(model: Any) -> HeldOut:
            rows = iter(batches)
            return held_out(model, plain, lambda _: store.teacher(next(rows), device))

        prompts = [ids[:PROMPT].tolist() for ids in sequences[:HELD_OUT]]
        curves, models, seconds = {}, {"teacher": teacher}, {}
        start = look(student)
        for way in WAYS:
            say(f"{way}: {sizes.steps} steps of {sizes.batch * sizes.length} tokens")
            run = trained(student, store, look, sizes, Path(scratch) / way, matches=way == "DFT")
            models[way], seconds[way], curves[way] = run.model, run.seconds, [(0, start), *run.curve]
        written = {
            name: continuations(models[name], tokenizer, prompts, NEW, sizes.seed) for name in (*WAYS, "teacher")
        }
        of_teacher = look(teacher)
    written["the text itself"] = [ids[PROMPT : PROMPT + NEW].tolist() for ids in sequences[:HELD_OUT]]
    return Comparison(
        capture_tokens_s=sum(map(len, sequences)) / captured,
        curves=curves,
        held_out={"student before": start, **{way: curves[way][-1][1] for way in WAYS}, "teacher": of_teacher},
        distinct={name: [distinct(ids, n) for n in (1, 2, 3)] for name, ids in written.items()},
        seconds=seconds,
        prompts=[tokenizer.decode(ids) for ids in prompts],
        written={name: [tokenizer.decode(ids) for ids in rows] for name, rows in written.items()},
    )


class Trained(NamedTuple):
    """model: trained; curve: step, and what it was after that; seconds: a step, the median; log: Trainer's."""

    model: Any
    curve: list[tuple[int, HeldOut]]
    seconds: float
    log: list[dict[str, float]]


def trained(
    student: Any,
    store: Store,
    look: Callable[[Any], HeldOut],
    sizes: Sizes,
    folder: Path,
    *,
    matches: bool,
    **more: Any,
) -> Trained:
    """A copy of the student, trained on the sequences of `store` that are not held out. matches: towards its
    distributions, or on its tokens alone; more: of `DFTConfig`; folder: Trainer's."""
    curve: list[tuple[int, HeldOut]] = []
    times: list[float] = []
    every = max(1, sizes.steps // LOOKS)

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            times.append(-time.perf_counter())

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            times[-1] += time.perf_counter()
            if state.global_step % every == 0 or state.global_step == sizes.steps:
                curve.append((state.global_step, look(model)))

    config = DFTConfig(
        output_dir=str(folder), max_steps=sizes.steps, per_device_train_batch_size=sizes.batch,
        hard_weight=HARD_WEIGHT, learning_rate=LEARNING_RATE, warmup_steps=WARMUP,
        lr_scheduler_type="constant_with_warmup", weight_decay=0.0, adam_epsilon=1e-5, logging_steps=5,
        save_strategy="no", report_to=[], seed=sizes.seed, dataloader_pin_memory=torch.cuda.is_available(), **more,
    )  # fmt: skip
    trainer = DFTTrainer(
        copy.deepcopy(student),
        config,
        store if matches else None,
        train_dataset=Subset(store, range(HELD_OUT, len(store))),
        data_collator=store.collate,
        callbacks=[Watch()],
    )
    trainer.train()
    model = detach(trainer.accelerator.unwrap_model(trainer.model))
    return Trained(model, curve, statistics.median(times), trainer.state.log_history)


def _multiplies_bf16(device: torch.device) -> bool:
    return device.type == "cuda" or (extension.MODULE is not None and extension.MODULE.multiplies_bf16())
