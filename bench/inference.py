"""What steps at inference do to a model's writing: python bench/inference.py [--count 200] [--csv FILE] [--folder DIR]

SmolLM2-135M goes on from passages of two novels of Jane Austen (from apt) that it was not shown in any other way; the
target is what the four others are like. Native statistics are of its own text after passages of those four. Arms:

    plain       by each of TEMPERATURES
    refined     at temperature 1, by an IterativeRefiner of each of two bounds, and without native statistics
    ...         by style, by diversity, by all of it

    python bench/inference.py --time    CPU time of each step beside a token's, at batch 1 and 16

Of each arm every metric of the evaluation room, with its floor; the perplexity of its texts under a second model,
Gemma3-270M; nats of KL a token. Texts are kept in --folder, an arm a file, and a run that was stopped goes on with the
next arm.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from dft_kernels.benchmarks.runs import about
from dft_kernels.benchmarks.tables import write_csv
from dft_kernels.evaluation import gap
from dft_kernels.evaluation.documents import Documents
from dft_kernels.evaluation.measure import measured, swept
from dft_kernels.evaluation.metrics import METRICS, Expectation, Sample
from dft_kernels.evaluation.people import People, people
from dft_kernels.evaluation.reading import read
from dft_kernels.files import replace_text
from dft_kernels.generation.refiner import IterativeRefiner
from dft_kernels.generation.sampling import continuations
from dft_kernels.generation.steps import Step, Watch, ordered, warpers
from dft_kernels.generation.style import StyleShift
from dft_kernels.generation.temperature import Diversity, EntropyTemperature
from dft_kernels.generation.truncation import TopNSigma
from dft_kernels.materials.models import cache_folder, gemma3, smollm2
from dft_kernels.materials.texts import documents_of
from dft_kernels.targets import corpus, passages
from dft_kernels.targets.target import Target
from dft_kernels.targets.target_file import load, save

HELD_OUT = 2  # novels, the last ones
PROMPT, BATCH = 32, 50
TEMPERATURES = (1.0, 0.85, 0.7, 1.15)
READ = 60  # texts that the second model reads
SEEDS = {"test": 0, "native": 1000}
Steps = Callable[[], list[Any]]


def arms(tokenizer: Any, target: Target, native: Target) -> dict[str, Steps]:
    """By name, what is drawn with."""

    def refined(bound: float, **more: Any) -> IterativeRefiner:
        return IterativeRefiner(target, tokenizer, native, bound=bound, **more)

    made: dict[str, Steps] = {}
    for temperature in TEMPERATURES:
        made[f"plain, T {temperature:g}"] = lambda temperature=temperature: warpers(temperature)
    for bound in (0.1, 0.02):
        made[f"refined, {bound:g} nats"] = lambda bound=bound: [refined(bound)]
    made["refined, 0.1 nats, by the text so far alone"] = lambda: [IterativeRefiner(target, tokenizer, bound=0.1)]
    made["style 0.5"] = lambda: [StyleShift(target, native, 0.5)]
    made["top-n-sigma 2, diversity +0.1"] = lambda: [TopNSigma(2.0), Diversity(0.1)]
    made["style 0.5, top-n-sigma 2, diversity +0.1, refined, 0.1 nats"] = lambda: [
        StyleShift(target, native, 0.5), TopNSigma(2.0), Diversity(0.1), refined(0.1)
    ]  # fmt: skip
    return made


def _name(step: Any) -> str:
    return repr(step) if isinstance(step, Step) else f"{type(step).__name__}({vars(step)})"


def drawn(model: Any, tokenizer: Any, those: People, steps: list[Any], length: int, file: Path) -> dict[str, Any]:
    """Texts after the prompts of the reference, and what was spent; from the file where it has them."""
    how = [len(those.reference), length, *map(_name, steps)]
    if file.exists():
        found = dict(json.loads(file.read_text()))
        if found["how"] != how:
            raise ValueError(f"{file} must be of {how}, got {found['how']}. Name another --folder.")
        return found
    prompts = [tokenizer(one.prompt, add_special_tokens=False)["input_ids"] for one in those.reference]
    watch, texts, tokens, seconds = Watch(), [], 0, 0.0
    for number, start in enumerate(range(0, len(prompts), BATCH)):
        some = prompts[start : start + BATCH]
        began = time.perf_counter()
        made = continuations(model, tokenizer, some, length, SEEDS["test"] + number, logits_processor=ordered(steps))
        seconds += time.perf_counter() - began
        tokens += sum(map(len, made))
        texts += [tokenizer.decode(ids) for ids in made]
    reports = [vars(step.report()) for step in steps if isinstance(step, IterativeRefiner)]
    made = continuations(model, tokenizer, prompts[:BATCH], length, 0, logits_processor=watch.around(ordered(steps)))
    live = [[at < len(ids) for ids in made] for at in range(len(watch.kl))]
    kl, entropy = (
        float(np.concatenate([one.numpy()[on] for one, on in zip(of, map(np.array, live), strict=True)]).mean())
        for of in (watch.kl, watch.entropy)
    )
    found = {"texts": texts, "tokens": tokens, "seconds": seconds, "kl": kl, "entropy": entropy,
             "how": how, "steps": [repr(step) for step in steps], "report": next(iter(reports), None)}  # fmt: skip
    replace_text(file, json.dumps(found))
    return found


def timed(model: Any, tokenizer: Any, cache: Path) -> None:
    """Print CPU milliseconds, the least of some runs: of a token of the model's, and of each step on its scores."""
    target, native = load("literary"), load("reference")
    steps = [
        StyleShift(target, native, 0.5), TopNSigma(2.0), Diversity(0.1), EntropyTemperature(1.0),
        IterativeRefiner(target, tokenizer, native, bound=0.1),
    ]  # fmt: skip

    def least(call: Callable[[], Any], runs: int) -> float:
        took = []
        for _ in range(runs):
            began = time.process_time()
            call()
            took.append(1000 * (time.process_time() - began))
        return min(took[1:])

    texts = next(iter(documents_of("literary", cache)[1])).split("\n\n")
    rows = [row for row in (tokenizer(text)["input_ids"][:100] for text in texts) if len(row) == 100]
    for batch in (1, 16):
        ids = torch.tensor(rows[:batch])
        with torch.no_grad():
            made = model(ids, use_cache=True)
            name = "cache" if "cache" in made else "past_key_values"
            kept = {name: made[name]}
            token = least(lambda ids=ids, kept=kept: model(ids[:, -1:], use_cache=True, **kept), 12)
        scores = made.logits[:, -1].float()
        drawn = least(lambda scores=scores: scores.softmax(-1).multinomial(1), 12)
        print(f"batch {batch}: a token {token:.2f} ms; its draw, softmax and multinomial, {drawn:.2f}", flush=True)
        for step in steps:
            took = least(lambda step=step, ids=ids, scores=scores: step(ids, scores), 30)
            print(f"  {step!r}: {took:.3f} ms, {100 * took / token:.2f} % of a token", flush=True)


def main() -> None:
    """Draw, read, measure, write."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--count", type=int, default=200)
    made.add_argument("--length", type=int, default=128)
    made.add_argument("--only", nargs="+", default=[""], help="arms whose names begin with one of these")
    made.add_argument("--draw", action="store_true", help="no more: what others read and measure, arms side by side")
    made.add_argument("--folder", type=Path, default=Path("build/inference"))
    made.add_argument("--time", action="store_true", help="what the steps take, and nothing else")
    made.add_argument("--csv", type=Path)
    made.add_argument("--cache", type=Path, default=cache_folder())
    options = made.parse_args()
    transformers.utils.logging.disable_progress_bar()
    options.folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = smollm2(options.cache)
    if options.time:
        timed(model, tokenizer, options.cache)
        return
    novels = list(documents_of("literary", options.cache)[1])
    known, held = (
        [one for text in some for one in passages(text.splitlines(True))]
        for some in (novels[:-HELD_OUT], novels[-HELD_OUT:])
    )
    for name, build in {
        "target": lambda: corpus.build(known, tokenizer, name="four novels", tokenizer_name="smollm2"),
        "native": lambda: gap.native(
            model, tokenizer, gap.windows(known, tokenizer, PROMPT, options.length, options.count, SEEDS["native"]),
            PROMPT, seed=SEEDS["native"], batch=BATCH, name="smollm2",
        ),
    }.items():  # fmt: skip
        if not (options.folder / f"{name}.safetensors").exists():
            save(build(), options.folder / f"{name}.safetensors")
    target, native = (load(str(options.folder / f"{name}.safetensors")) for name in ("target", "native"))
    those = people(held, tokenizer, PROMPT, options.length, options.count, SEEDS["test"])
    every = arms(tokenizer, target, native)
    chosen = {name: of for name, of in every.items() if name.startswith(tuple(options.only))}
    found = {}
    for name, of in chosen.items():
        file = options.folder / f"arm-{list(every).index(name)}.json"
        found[name] = one = drawn(model, tokenizer, those, of(), options.length, file)
        print(f"{name}: {1000 * one['seconds'] / one['tokens']:.2f} ms a token, KL {one['kl']:.4f}", flush=True)
    if options.draw:
        return
    other, its = gemma3(options.cache)
    prompts = [one.prompt for one in those.reference[:READ]]
    for name, one in {**found, "people": {"texts": [passage.text for passage in those.reference]}}.items():
        file = options.folder / f"read-{name.replace(' ', '-')}.json"
        if not file.exists():
            of = read(other, its, prompts, one["texts"][:READ])
            replace_text(file, json.dumps([of.cross_entropy.tolist(), of.tokens.tolist()]))
        loss, count = json.loads(file.read_text())
        one["perplexity"] = math.exp(sum(loss) / sum(count))
        print(f"{name}: perplexity {one['perplexity']:.2f}", flush=True)
    rows = measured_rows(tokenizer, those, found)
    if options.csv is not None:
        write_csv(options.csv, [{**row, **about("cpu")} for row in rows])


def measured_rows(tokenizer: Any, those: People, found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row an arm and metric."""
    pool, prompts = [one.text for one in those.all], [one.prompt for one in those.all]
    at = {}
    for name, one in found.items():
        at[name] = np.arange(len(pool), len(pool) + len(one["texts"]))
        pool += one["texts"]
        prompts += [passage.prompt for passage in those.reference]
    documents = Documents(pool, np.arange(len(those.all)), tokenizer, None, prompts)
    metrics = [one for one in METRICS if not isinstance(one, Expectation)]
    samples = {name: Sample(documents, rows) for name, rows in at.items()}
    values = measured(samples, metrics=metrics)
    rows = []
    for name, these in values.items():
        mean, beyond = swept(these, samples[name])
        print(f"\n{name}: mean {mean}, {beyond} beyond their floor")
        for one in these:
            value = one.value
            if value.value is None or not value.floor:
                continue
            print(f"  {one.metric.name:30s} {value.value:9.4f} {value.value / value.floor:7.2f} floors")
            of = found[name]
            rows.append({
                "arm": name, "metric": one.metric.name, "value": value.value, "floor": value.floor, "low": value.low,
                "high": value.high, "perplexity": of.get("perplexity", ""), "kl": of["kl"], "entropy": of["entropy"],
                "beyond": beyond, "count": len(of["texts"]), "read": min(READ, len(of["texts"])),
            })  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
