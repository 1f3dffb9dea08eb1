"""The tables of the pages, by the kind of CSV that they are made of: what bench/readme.py writes.

A kind is of what one script or command wrote; `KINDS` names it.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable
from pathlib import Path

from markdown_tables import Rows, markdown, where
from summaries_of_writing import effect_table, evaluation_table, floors_table, inference_table, target_table

from dft_kernels.benchmarks import tables
from dft_kernels.benchmarks.problems import LOSSES

RESULTS = Path(__file__).parent / "results"


def demo_table(models: Rows) -> str:
    """Of the demo's summary: a column a model."""
    first = models[0]
    rows: dict[str, Callable[[dict[str, str]], str]] = {
        "KL(teacher ‖ model), nats": lambda m: f"{float(m['kl']):.3f}",
        "perplexity": lambda m: f"{float(m['perplexity']):,.1f}",
        "entropy, nats": lambda m: f"{float(m['entropy']):.2f}",
        "next token right": lambda m: f"{100 * float(m['accuracy']):.1f} %",
        "distinct-1, -2 of continuations": lambda m: (
            f"{float(m['distinct_1']):.2f}, {float(m['distinct_2']):.2f}" if m["distinct_1"] else ""
        ),
        "s a step": lambda m: f"{float(m['step_s']):.2f}" if m["step_s"] else "",
    }
    head = [f"{first['steps']} steps of {first['tokens']} tokens, fp32", *(model["model"] for model in models)]
    assert sum(bool(model["step_s"]) for model in models) == 2
    caption = f"{where(models)}; captured at {float(first['capture_tokens_s']):,.0f} tokens/s"
    return markdown(head, ([name, *map(value, models)] for name, value in rows.items()), caption)


def stores_table(rows: Rows) -> str:
    """Of bench/teachers.py: a row a teacher. Empty: not measured for this teacher."""
    columns: dict[str, tuple[str, Callable[[float], str]]] = {
        "bytes a token": ("bytes_a_token", lambda x: f"{x:.0f}"),
        "captured, tokens/s": ("capture_tokens_s", lambda x: f"{x:.0f}"),
        "read, MB/s": ("read_mb_s", lambda x: f"{x:.0f}"),
        "loss, x CE": ("over_ce", lambda x: f"{x:.2f}"),
        "training step over CE's": ("step_over_ce", lambda x: f"{100 * x - 100:+.1f} %"),
        "teacher's mass outside": ("tail", lambda x: f"{100 * x:.1f} %"),
        "loss seen, of the exact KL": ("kl_seen", lambda x: f"{100 * x:.2f} %"),
        "error of the gradient": ("gradient_error", lambda x: f"{100 * x:.2f} %"),
        "curve apart": ("apart", lambda x: f"{x:.1e}"),
        "held-out KL": ("held_out_kl", lambda x: f"{x:.4f}"),
    }
    lines = (
        [row["teacher"], *(show(float(row[name])) if row[name] else "" for name, show in columns.values())]
        for row in rows
    )
    return markdown(["teacher", *columns], lines, f"{where(rows)}; {rows[0]['steps']} steps")


def longest_table(rows: Rows) -> str:
    """Of bench/longest.py: a row a way."""
    budget = f"{int(rows[0]['budget_bytes']) / (1 << 30):g} GiB"
    lines = []
    for way in dict.fromkeys(row["way"] for row in rows):
        mine = [row for row in rows if row["way"] == way]
        longest = next((f"{row['length']} tokens" for row in mine if row["longest"] == "1"), "none")
        peak = next(row["peak_bytes"] for row in mine if row["length"] == "1024")
        lines.append([way, longest, f"{int(peak) / (1 << 30):.2f} GiB" if peak else "not measured"])
    head = ["Gemma3-270M, batch 1", f"longest sequence within {budget}", "peak at 1024 tokens"]
    return markdown(head, lines, where(rows))


def terms_table(rows: Rows) -> str:
    """Of bench/terms.py: a row a term, a column a shape."""
    shapes = list(dict.fromkeys((row["n"], row["h"]) for row in rows))
    base, *names = dict.fromkeys(row["terms"] for row in rows)
    over = {(row["terms"], (row["n"], row["h"])): f"{100 * float(row['over_ce']) - 100:+.1f} %" for row in rows}
    ms = {(row["n"], row["h"]): f"{float(row['ms']):,.0f} ms" for row in rows if row["terms"] == base}
    head = ["beside cross-entropy, delayed", *(f"N {n}, H {h}" for n, h in shapes)]
    lines = [[f"{base} alone", *(ms[shape] for shape in shapes)]]
    lines += [[name, *(over[name, shape] for shape in shapes)] for name in names]
    first = rows[0]
    caption = f"V {first['v']}, bfloat16; {where(rows)}; medians of {first['rounds']} interleaved rounds"
    return markdown(head, lines, caption)


def trainers_table(rows: Rows) -> str:
    """Of bench/trainers.py: a row a trainer and size of the model."""
    of = {(row["trainer"], row["layers"], row["way"]): row for row in rows}
    lines = []
    for name, layers in dict.fromkeys((row["trainer"], row["layers"]) for row in rows):
        own, fused = of[name, layers, "TRL"], of[name, layers, "fuse"]
        mb = [f"{int(row['peak_bytes']) / 1e6:,.0f} MB" for row in (own, fused)]
        spread = f"{float(fused['over_trl']):.2f} ({float(fused['least']):.2f} to {float(fused['most']):.2f})"
        seconds = [f"{float(row['cpu_s']):.1f} s" for row in (own, fused)]
        lines.append([f"{name}, {layers} layers", *seconds, spread, *mb])
    head = ["CPU seconds a step", "TRL", "fused", "fused / TRL (least to most)", "memory, TRL", "memory, fused"]
    rounds = " or ".join(dict.fromkeys(row["rounds"] for row in rows))
    size = f"SmolLM2, of 30 layers, or its first two, and its head, fp32; medians of {rounds} rounds"
    return markdown(head, lines, f"{size}; trl {rows[0]['trl']}; {where(rows)}")


def errors_table(rows: Rows, every: bool = False) -> str:
    """Of `dft-kernels bench --inputs`: a row for implementations of the same errors, a column a loss and distance;
    dhidden's error, or those of dhidden, dweight and the loss."""
    cases = list(dict.fromkeys((row["loss"], row["distance"]) for row in rows))
    kl = {(row["loss"], row["distance"]): float(row["teacher_kl"] or 0) for row in rows}
    of = {(row["implementation"], row["loss"], row["distance"]): row for row in rows if row["error_dhidden"]}

    def percent(text: str) -> str:
        error = float(text)
        if error < 1e-4:
            return f"{error:.0e}"
        return f"{100 * error:.{max(0, 1 - math.floor(math.log10(100 * error)))}f} %"

    def cell(name: str, case: tuple[str, str]) -> str:
        row = of.get((name, *case))
        if row is None:
            return ""
        errors = [row[f"error_{what}"] for what in (("dhidden", "dweight", "loss") if every else ("dhidden",))]
        return ", ".join(map(percent, errors))

    lines: dict[tuple[str, ...], list[str]] = {}
    for name in dict.fromkeys(row["implementation"] for row in rows):
        cells = tuple(cell(name, case) for case in cases)
        if any(cells):
            lines.setdefault(cells, []).append(name)
    titles = (
        LOSSES[loss].title + (f", KL {kl[loss, distance]:.2g}" if float(distance) else "") for loss, distance in cases
    )
    first = rows[0]
    what = "dhidden, dweight, loss" if every else "relative error of dhidden"
    caption = f"SmolLM2-135M, {first['n']} rows of text, {first['dtype']}, against float64; {where(rows)}"
    return markdown([what, *titles], ([", ".join(names), *cells] for cells, names in lines.items()), caption)


def every_error_table(rows: Rows) -> str:
    """The same with all three errors."""
    return errors_table(rows, every=True)


def sharded_table(rows: Rows) -> str:
    """A call over a divided vocabulary beside half of its work and its exchanges."""
    head = [
        "loss",
        "ms",
        "half of the work, ms",
        "exchanges alone, ms",
        "over both",
        "memory, MiB",
        "head, MiB",
        "sent",
    ]
    lines = []
    for row in rows:
        of_formula = "as by the formula" if row["sent"] == row["formula"] else f"{row['formula']} by the formula"
        lines.append([
            LOSSES[row["loss"]].title, row["divided_ms"], row["half_ms"], row["exchange_ms"],
            f"{row['ratio']} ({row['ratio_25']} to {row['ratio_75']})", f"{row['divided_mib']} for {row['whole_mib']}",
            f"{row['own_head_mib']} for {row['head_mib']}", f"{int(row['sent']):,} bytes, {of_formula}",
        ])  # fmt: skip
    first = rows[0]
    shape = f"N {first['n']}, H {first['h']}, V {first['v']}, bfloat16"
    return markdown(head, lines, f"{first['processes']} processes, a thread each, gloo; {shape}; {where(rows)}")


def active_table(rows: Rows) -> str:
    """Of bench/active.py: a row a loss and an error."""
    head = ["loss", "gradient_error", "time over the floor (quartiles)", "dropped", "columns", "dhidden", "dweight"]
    lines = []
    for row in rows:
        of = LOSSES[row["loss"]].title + (f", KL {row['kl']}" if float(row["kl"]) else "")
        ratio = f"{row['ratio']} ({row['ratio_25']} to {row['ratio_75']})"
        share = f"{100 * float(row['active']):.0f} %" if row["active"] else "all"
        dropped = f"{float(row['dropped']):.2g}" if row["dropped"] else "0"
        errors = [f"{100 * float(row[name]):.2f} %" for name in ("dhidden_error", "dweight_error")]
        lines.append([of, row["gradient_error"] or "none", ratio, dropped, share, *errors])
    first = rows[0]
    return markdown(head, lines, f"N {first['n']}, H {first['h']}, V {first['v']}, {first['dtype']}; {where(rows)}")


def active_training_table(rows: Rows) -> str:
    """Of bench/active.py --train: KL(teacher || student) on held-out text, a row a look, a column a run."""
    runs = sorted(dict.fromkeys((row["gradient_error"], row["seed"]) for row in rows))
    of = {(row["gradient_error"], row["seed"], row["step"]): row["kl"] for row in rows}
    head = ["step", *(f"{'within ' + error if error else 'exact'}, seed {seed}" for error, seed in runs)]
    steps = list(dict.fromkeys(row["step"] for row in rows))
    lines = ([step, *(f"{float(of[(*run, step)]):.3f}" for run in runs)] for step in steps)
    return markdown(head, lines, f"KL(teacher || student) on held-out text, nats; {where(rows)}")


def threads_table(rows: Rows) -> str:
    """Of bench/threads.py: a row a number of threads and a setting, a column a number of busy processes."""
    crowds = list(dict.fromkeys(row["busy"] for row in rows))
    of = {(row["threads"], row["setting"], row["busy"]): row for row in rows}

    def cell(row: dict[str, str]) -> str:
        ratios = [f"{float(row[name]):.2f}" for name in ("over_eager", "over_low", "over_high")]
        return f"{float(row['ours_ms']):,.0f} ms, {ratios[0]} ({ratios[1]} to {ratios[2]})"

    lines = []
    for threads, setting in dict.fromkeys((row["threads"], row["setting"]) for row in rows):
        name = f"{threads} threads".replace("1 threads", "1 thread") + (f", {setting}" if setting else "")
        lines.append([name, *(cell(of[threads, setting, busy]) for busy in crowds)])
    head = ["ours, and over eager (least to most)"]
    head += ["alone" if busy == "0" else f"beside {busy} busy processes" for busy in crowds]
    first = rows[0]
    what = f"{LOSSES[first['loss']].title}, {first['shape']}, {first['dtype']}; medians of {first['rounds']} rounds"
    return markdown(head, lines, f"{what}; load average before: {first['load']}; {where(rows)}")


def edges_table(rows: Rows) -> str:
    """Of the preset edges: a row a size, a column a loss: ours, eager and its compiled form, ms and MB."""
    losses = list(dict.fromkeys(row["loss"] for row in rows))
    who = ("dft_kernels native", "eager", "torch.compile(eager)")
    of = {(row["n"], row["h"], row["v"], row["loss"], row["implementation"]): row for row in rows}

    def cell(key: tuple[str, ...], quantity: str, by: float) -> str:
        values = [float(of[(*key, name)][quantity]) / by for name in who]
        return " / ".join(f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values)

    lines = []
    for shape in dict.fromkeys((row["n"], row["h"], row["v"]) for row in rows):
        sizes = ", ".join(f"{int(size):,}" for size in shape)
        lines.append(
            [sizes, *(cell((*shape, loss), *what) for loss in losses for what in (("ms", 1), ("peak_bytes", 1e6)))]
        )
    head = ["N, H, V"]
    for loss in losses:
        head += [f"{LOSSES[loss].title}, ms", "MB"]
    return markdown(head, lines, f"Ours / {who[1]} / {who[2]}, {rows[0]['dtype']}; {where(rows)}")


def front_table(rows: Rows) -> str:
    """The README's one table: of cpu.csv, h100.csv and errors-cpu.csv what a reader asks first. A cell is of the first
    of a line's names that was measured there."""
    lines = {
        "dft_kernels": ("dft_kernels native", "dft_kernels triton"),
        "torch.compile of the eager loss": ("torch.compile(eager)",),
        "eager PyTorch": ("eager",),
        "Liger-Kernel": ("Liger chunked, compiled", "Liger FLCE"),
        "TRL `chunked_divergence`": ("TRL chunked_divergence",),
        "Cut Cross-Entropy": ("CCE", "CCE torch_compile"),
        "`F.linear_cross_entropy`": ("F.linear_cross_entropy",),
    }
    losses, shape = ("cross_entropy", "forward_kl"), ("4096", "576", "49152", "bfloat16", "both")
    here = [row for row in rows if tuple(row[of] for of in ("n", "h", "v", "dtype", "part")) == shape]
    here = [row for row in here if row["status"] == "ok" and row["loss"] in losses]
    cpu = {(row["implementation"], row["loss"]): row for row in here}
    with (RESULTS / "h100.csv").open(newline="") as file:
        gpu = {next(iter(row.values())): row for row in csv.DictReader(file)}
    with (RESULTS / "errors-cpu.csv").open(newline="") as file:
        near = [row for row in csv.DictReader(file) if row["loss"] == "forward_kl" and row["error_dhidden"]]
    kl = min({float(row["teacher_kl"]) for row in near}, key=lambda value: abs(value - 0.01))
    error = {row["implementation"]: float(row["error_dhidden"]) for row in near if float(row["teacher_kl"]) == kl}

    def on_cpu(names: Iterable[str], loss: str) -> str:
        row = next((cpu[name, loss] for name in names if (name, loss) in cpu), None)
        return f"{float(row['over_floor']):.2f}, {tables.megabytes(float(row['peak_bytes']))} MB" if row else ""

    def on_gpu(names: Iterable[str], column: str) -> str:
        return next((gpu[name][column] for name in names if name in gpu and gpu[name][column]), "")

    def far(names: Iterable[str]) -> str:
        return next((f"{100 * error[name]:.2g} %" for name in names if name in error), "")

    columns = ("cross-entropy", "forward KL, teacher's head")
    head = ["", *(f"CPU: {LOSSES[loss].title}" for loss in losses), "H100: cross-entropy", "H100: forward KL"]
    head.append(f"error of the gradient, KL {kl:.2g}")
    body = [
        [line, *(on_cpu(names, loss) for loss in losses), *(on_gpu(names, column) for column in columns), far(names)]
        for line, names in lines.items()
    ]
    versions = dict.fromkeys(row["package"] for row in here if not row["package"].startswith(("dft-", "torch")))
    commits, dates = (", ".join(dict.fromkeys(row[of] for row in here)) for of in ("commit", "date"))
    here_on = f"{here[0]['machine']}; torch {here[0]['torch']}, {', '.join(versions)}; commit {commits}; {dates}"
    errors = (
        f"the gradient of SmolLM2-135M's hidden states, against float64, forward KL to a teacher {kl:.2g} nats away"
    )
    about = (
        f"CPU: N 4096, H 576, V 49152, bfloat16; {here_on}. H100: {next(iter(gpu.values()))['about']}. Error: {errors}"
    )
    return markdown(head, body, about)


def summary_table(rows: Rows) -> str:
    """Of a CSV that is the table already: its cells as they stand; its last column, `about`, is the caption."""
    head = [name for name in rows[0] if name != "about"]
    return markdown(head, ([row[name] for name in head] for row in rows), rows[0]["about"])


KINDS: dict[str, Callable[[Rows], str]] = {
    "demo": demo_table,
    "stores": stores_table,  # bench/teachers.py
    "longest": longest_table,  # bench/longest.py
    "terms": terms_table,  # bench/terms.py
    "target": target_table,  # bench/targets.py
    "trainers": trainers_table,  # bench/trainers.py
    "sharded": sharded_table,  # bench/sharded.py
    "active": active_table,  # bench/active.py
    "active-training": active_training_table,
    "threads": threads_table,  # bench/threads.py
    "edges": edges_table,  # dft-kernels bench --preset edges
    "inference": inference_table,  # bench/inference.py
    "effect": effect_table,  # bench/effect.py
    "floors": floors_table,  # bench/evaluation.py
    "evaluation": evaluation_table,  # dft-kernels evaluate
    "errors": errors_table,  # dft-kernels bench --inputs
    "every-error": every_error_table,
    "front": front_table,
    "summary": summary_table,  # written by hand from the runs that its last column names
}
