"""What `fuse` changes in a step of TRL's trainers: python bench/trainers.py [--layers 2] [--rounds 5] [--csv FILE]

The first --layers layers of SmolLM2 (pip brings it), whose head is as wide as the whole model's; LAMBADA passages,
fp32, AdamW, on a CPU. Each round trains every trainer twice, with and without `fuse`, each in a process of its own and
in turned order: a step that does not count, then --steps that do. A step has everything in it: drawing completions,
backbone, reference model, optimiser.

    step_s, drawn_s          medians of a step's seconds, and of those in the model's generate, which `fuse` leaves
    cpu_s                    of its seconds on all cores, which other work on the machine disturbs less
    over_trl, least, most    the median, least and largest of the rounds' ratios of these
    peak_bytes               resident memory of the steps above that before them
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import transformers

from dft_kernels.benchmarks.measure import give_back
from dft_kernels.benchmarks.runs import about
from dft_kernels.benchmarks.tables import write_csv
from dft_kernels.materials.models import cache_folder, lambada, smollm2
from dft_kernels.training.trl import fuse

LENGTH, PROMPT, DRAWN = 256, 24, 32  # tokens of a sequence at most, words of a prompt, tokens of a completion
WAYS = ("TRL", "fuse")
COLUMNS = {"step": "seconds", "drawn": "drawn", "cpu": "cpu"}


class Trainee(NamedTuple):
    """A trainer of TRL, sequences a step and its own settings."""

    kind: str
    batch: int
    settings: dict[str, Any]


_DRAWS = {"num_generations": 4, "max_completion_length": DRAWN, "beta": 0.04}
TRAINEES = {
    "SFT": Trainee("SFT", 4, {"max_length": LENGTH}),
    "DPO": Trainee("DPO", 2, {"max_length": LENGTH}),
    "KTO": Trainee("KTO", 4, {"max_length": LENGTH}),
    "GRPO": Trainee("GRPO", 8, _DRAWS),
    "RLOO": Trainee("RLOO", 8, _DRAWS),
    "distillation": Trainee("Distillation", 8, {"max_completion_length": DRAWN, "beta": 0.5}),
}


# ---- a training, in a process of its own ----


def reward(completions: list[str], **_: Any) -> list[float]:
    """Something that differs."""
    return [-len("".join(words)) / max(1, len(words)) for words in map(str.split, completions)]


def columns(kind: str, texts: list[str]) -> dict[str, list[Any]]:
    """The data that a trainer takes."""
    if kind == "SFT":
        return {"text": texts}
    words = [text.split() for text in texts]
    prompts, rest = ([" ".join(w[:PROMPT]) for w in words], [" " + " ".join(w[PROMPT:]) for w in words])
    if kind == "DPO":
        return {"prompt": prompts, "chosen": rest, "rejected": [*rest[1:], rest[0]]}
    if kind == "KTO":
        return {"prompt": prompts, "completion": rest, "label": [n % 2 == 0 for n in range(len(rest))]}
    return {"prompt": prompts}


class Watch(transformers.TrainerCallback):  # type: ignore[misc]
    """Seconds of every step but the first, those of them in generate, and the memory of the rest."""

    def __init__(self, model: Any) -> None:
        self.steps: dict[str, list[float]] = {"seconds": [], "cpu": [], "drawn": []}
        self.drawing, self.began, self.before = 0.0, (0.0, 0.0), 0
        generate = type(model).generate

        def timed(*arguments: Any, **named: Any) -> Any:
            begun = time.perf_counter()
            out = generate(*arguments, **named)
            self.drawing += time.perf_counter() - begun
            return out

        type(model).generate = timed

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            give_back()
            Path("/proc/self/clear_refs").write_text("5")
            self.before = resident("VmRSS")
        self.drawing, self.began = 0.0, (time.perf_counter(), time.process_time())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step > 1:
            now = time.perf_counter(), time.process_time(), self.drawing
            for values, end, begun in zip(self.steps.values(), now, (*self.began, 0.0), strict=True):
                values.append(end - begun)


def resident(field: str) -> int:
    """Bytes of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def train(folder: str, name: str, way: str, steps: int, cache: Path) -> dict[str, Any]:
    """Seconds and bytes of the steps of one trainer."""
    import trl
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar

    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bar()
    trainee = TRAINEES[name]
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, tokenizer = load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as out:
        args = getattr(trl, f"{trainee.kind}Config")(
            out, max_steps=1 + steps, per_device_train_batch_size=trainee.batch, learning_rate=1e-6, use_cpu=True,
            bf16=False, gradient_checkpointing=False, logging_steps=1000, save_strategy="no", report_to=[],
            disable_tqdm=True, seed=0, **trainee.settings,
        )  # fmt: skip
        more: dict[str, Any] = {"reward_funcs": reward} if trainee.kind in ("GRPO", "RLOO") else {}
        more |= {"teacher_model": load(folder)} if trainee.kind == "Distillation" else {}
        texts = lambada(cache)[: trainee.batch * (2 + steps)]
        data = Dataset.from_dict(columns(trainee.kind, texts))
        trainer = getattr(trl, f"{trainee.kind}Trainer")(
            model, args=args, train_dataset=data, processing_class=tokenizer, callbacks=[watch := Watch(model)], **more
        )
        if way == "fuse":
            fuse(trainer)
        trainer.train()
    return {**watch.steps, "peak": resident("VmHWM") - watch.before}


# ---- its parent ----


def measure(folder: Path, name: str, way: str, options: argparse.Namespace) -> dict[str, Any]:
    """One training in a fresh process."""
    command = [sys.executable, __file__, "--train", str(folder), name, way]
    command += ["--steps", str(options.steps), "--cache", str(options.cache)]
    waiting = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}  # threads that spin would count as work
    done = subprocess.run(command, capture_output=True, text=True, env=waiting)
    if done.returncode:
        raise RuntimeError(f"bench: {name} by {way} must end, got {done.stderr.strip().splitlines()[-1:]}. See above.")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    made.add_argument("--trainers", nargs="+", choices=TRAINEES, default=list(TRAINEES))
    made.add_argument("--layers", type=int, default=2, help="of SmolLM2, the first; 30 are all")
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--steps", type=int, default=3)
    made.add_argument("--csv", type=Path, default=None)
    made.add_argument("--cache", type=Path, default=cache_folder())
    made.add_argument("--train", nargs=3, metavar=("FOLDER", "TRAINER", "WAY"), help=argparse.SUPPRESS)
    options = made.parse_args(arguments)
    if options.train:
        print(json.dumps(train(*options.train, options.steps, options.cache)))
        return 0
    seen: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = smollm2(options.cache)
        model.base_model.layers = model.base_model.layers[: options.layers]
        model.config.num_hidden_layers = len(model.base_model.layers)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for number in range(options.rounds):
            for name in options.trainers:
                for way in WAYS[:: 1 if number % 2 else -1]:
                    seen.setdefault((name, way), []).append(measure(Path(folder), name, way, options))
                    print(f"round {number}: {name}, {way}: {seen[name, way][-1]}", file=sys.stderr, flush=True)
    rows = []
    for name in options.trainers:
        of = {way: [statistics.median(run["cpu"]) for run in seen[name, way]] for way in WAYS}
        ratios = [fused / own for fused, own in zip(of["fuse"], of["TRL"], strict=True)]
        for way in WAYS:
            runs = seen[name, way]
            middle = {key: statistics.median(x for run in runs for x in run[key]) for key in COLUMNS.values()}
            rows.append({
                "trainer": name, "way": way, "layers": len(model.base_model.layers), "sequences": TRAINEES[name].batch,
                **{f"{title}_s": round(middle[key], 3) for title, key in COLUMNS.items()},
                "peak_bytes": int(statistics.median(run["peak"] for run in runs)),
                "over_trl": round(statistics.median(ratios), 3) if way == "fuse" else 1.0,
                "least": round(min(ratios), 3) if way == "fuse" else 1.0,
                "most": round(max(ratios), 3) if way == "fuse" else 1.0,
                "rounds": options.rounds, "steps": options.steps, "trl": version("trl"), **about("cpu"),
            })  # fmt: skip
            print({k: v for k, v in rows[-1].items() if k not in about("cpu")}, flush=True)
    if options.csv is not None:
        write_csv(options.csv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
