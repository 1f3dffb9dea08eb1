"""What terms of a preset do to a model's writing: python bench/targets.py [--steps 80] [--csv FILE] [--plot FILE]

SmolLM2-135M (from pip) is trained on LAMBADA, contemporary fiction (or, --text novels, on the novels behind the preset
`literary`, from apt), three times from the same start over the same batches:

    cross-entropy        alone
    terms                and terms of human prefixes, at running means (`Delayed`)
    terms and rollouts   and terms of the model's own text (`OnPolicy`, with its score term and a `ReferenceKL`)

Before and after each: `dft-kernels gap` on passages of the novels (held-out ones with --text novels), statistic by
statistic, with the floor that human writing of the same size has; cross-entropy on held-out text of the kind that is
trained on; seconds a step. Each term has the weight 0.5 / gain (`gains`).
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from dft_kernels import DFTConfig, DFTTrainer, detach, shift_labels, targets
from dft_kernels.benchmarks.runs import about
from dft_kernels.benchmarks.tables import write_csv
from dft_kernels.evaluation import gap
from dft_kernels.evaluation.held_out import held_out
from dft_kernels.materials.models import cache_folder, lambada, smollm2
from dft_kernels.materials.texts import documents_of
from dft_kernels.targets import passages
from dft_kernels.training.students import pack
from dft_kernels.training.target_terms import HumanText, terms_of

LENGTH, BATCH, HELD_OUT = 128, 4, 0.125
START, CE, TERMS, ROLLOUTS = "start", "cross-entropy", "terms", "terms and rollouts"
OF_TEXT = ("token_l2=0.5x", "sentence_length=0.5x", "punctuation_rate=0.5x", "punctuation_gap=0.5x", "calibration=0.5x")
OF_OWN = (*OF_TEXT[:-1], "reference_kl=0.02")


def texts_of(kind: str, cache: Path) -> tuple[list[str], list[str]]:
    """Passages to train on, and others."""
    found = lambada(cache)
    if kind == "novels":
        found = [one for text in documents_of("literary", cache)[1] for one in passages(text.splitlines(True))]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    kept = round(HELD_OUT * len(found))
    return [found[n] for n in order[kept:]], [found[n] for n in order[:kept]]


def trained(model: Any, way: str, ids: torch.Tensor, target: Any, end: Any, options: Any) -> tuple[Any, DFTTrainer]:
    """A copy of the model after its steps, and who trained it."""
    vocab = model.get_output_embeddings().weight.shape[0]
    more: dict[str, Any] = {}
    text = HumanText(ids, shift_labels(ids), 1)
    if way != CE:
        more["terms"] = terms_of(target, OF_TEXT, vocab, text, model=model)
    if way == ROLLOUTS:
        more["rollout_terms"] = terms_of(target, OF_OWN, vocab, text, own_text=True, model=model)
    for name, terms in more.items():
        print(name, {label: f"{by:.3g}" for label, (by, _) in zip(terms.names, terms.parts, strict=True)}, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        config = DFTConfig(
            output_dir=folder, max_steps=options.steps, per_device_train_batch_size=BATCH, learning_rate=2e-5,
            warmup_steps=5, lr_scheduler_type="constant_with_warmup", logging_steps=5, save_strategy="no", report_to=[],
            use_cpu=True, disable_tqdm=True, seed=0, rollout_every=options.every,
            rollout_samples=options.samples,
        )  # fmt: skip
        items = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]
        trainer = DFTTrainer(copy.deepcopy(model), config, None, train_dataset=items, processing_class=end, **more)
        trainer.train()
    return detach(trainer.model), trainer


def main(arguments: list[str] | None = None) -> int:
    """Train, measure, write."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    made.add_argument("--steps", type=int, default=80)
    made.add_argument("--text", choices=("lambada", "novels"), default="lambada", help="what is trained on")
    made.add_argument("--every", type=int, default=2, help="one of so many steps has rollouts")
    made.add_argument("--samples", type=int, default=4, help="rollouts of each of a batch's 4 texts")
    made.add_argument("--count", type=int, default=96, help="passages of the gap")
    made.add_argument("--length", type=int, default=128, help="tokens that the model writes after each")
    made.add_argument("--csv", type=Path, default=None)
    made.add_argument("--plot", type=Path, default=None)
    made.add_argument("--cache", type=Path, default=cache_folder())
    options = made.parse_args(arguments)
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = smollm2(options.cache)
    model = model.float()
    target = targets.load("literary", tokenizer)
    ours, others = texts_of(options.text, options.cache)
    ids = pack(ours, tokenizer, LENGTH)
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))[: BATCH * options.steps]]
    human = gap.windows(texts_of("novels", options.cache)[1], tokenizer, 32, options.length, options.count)
    unseen = pack(others, tokenizer, LENGTH)[:64]
    batches = [{"input_ids": some, "labels": some, "attention_mask": torch.ones_like(some)} for some in unseen.split(8)]
    rows: list[dict[str, Any]] = []
    shared = {**about("cpu"), "text": options.text, "steps": options.steps, "tokens": BATCH * LENGTH}
    for way in (START, CE, TERMS, ROLLOUTS):
        begun, after, trainer = time.perf_counter(), model, None
        if way != START:
            after, trainer = trained(model, way, ids, target, tokenizer, options)
        step = (time.perf_counter() - begun) / options.steps if trainer else math.nan
        logs = [] if trainer is None else trainer.state.log_history
        cosines = [entry["rollout_cosine"] for entry in logs if "rollout_cosine" in entry]
        cosine = sum(cosines) / len(cosines) if cosines else math.nan
        found = held_out(after, batches)
        print(f"{way}: {found}, {step:.2f} s a step, cosine of halves {cosine:.3f}", flush=True)
        run = {"step_s": step, "cosine": cosine, "cross_entropy": found.cross_entropy, "entropy": found.entropy,
               "count": options.count, "length": options.length, **shared}  # fmt: skip
        for entry in logs:
            print({name: round(value, 4) for name, value in entry.items() if name.startswith(("term_", "rollout_"))})
        own = gap.native(after, tokenizer, human, 32, batch=32)
        gaps = gap.human_prefixes(after, target, human) + gap.own_text(own, tokenizer, target, human, 32)
        for one in gaps:
            print(f"  {one.reading:14s} {one.statistic:32s} {one.value:8.4f}  {one.ratio:6.2f} floors", flush=True)
            rows.append({"model": way, **vars(one), "ratio": one.ratio, **run})
    if options.csv is not None:
        write_csv(options.csv, rows)
    if options.plot is not None:
        plot(rows, options.plot)
    return 0


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Every statistic's distance in floors, of every model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 6), width_ratios=(1, 1))
    for axis, reading in zip(axes, (gap.FORCED, gap.OWN), strict=True):
        names = list(dict.fromkeys(row["statistic"] for row in rows if row["reading"] == reading))
        for number, way in enumerate(dict.fromkeys(row["model"] for row in rows)):
            ratio = {row["statistic"]: row["ratio"] for row in rows if (row["model"], row["reading"]) == (way, reading)}
            axis.barh(
                [n + 0.2 * number for n in range(len(names))],
                [ratio.get(name) or math.nan for name in names],
                0.2,
                label=way,
            )
        axis.set_yticks([n + 0.3 for n in range(len(names))], names)
        axis.axvline(1.0, color="black", linestyle=":")
        axis.set(title=reading, xlabel="distance / what human writing of this size is off by", xscale="log")
        axis.invert_yaxis()
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
