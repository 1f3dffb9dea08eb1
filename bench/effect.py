"""The study of docs/effect.md: python bench/effect.py STAGE [ARM ...] [--folder build/effect]

Stages, in this order; each keeps what it has done, and goes on where it was stopped. What was drawn and answered is
kept under bench/results/effect, so that it goes on on another machine too: models are made again where a run still
asks for them.

    prepare    the novels as files, their target, and the first of the test's prompts
    pilot      cross-entropy alone by each learning rate, from which RATE was chosen
    train      the arms, by dft-kernels train, in the order of ARMS, the first seed of all before the second of any
    validate   the first SFT by eight ways of sampling, on the validation novel
    test       texts of the arms that are trained, after prompts of the test novel; what they know; all metrics
    compare    the eight metrics of every arm beside its control: effect-cpu.csv; whether the bar is met
    cost       seconds and bytes of a step of the arms in turn, on a machine with nothing else to do

dft-kernels report build/effect/test/* shows what there is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from effect_arms import (
    ARMS,
    BATCH,
    BEST,
    BY_NAME,
    COUNT,
    HELD_OUT,
    LENGTH,
    NAMED,
    NOVELS,
    PILOT,
    PROMPT,
    QUESTIONS,
    RATE,
    RATES,
    SFT,
    WARMUP,
    Arm,
    bar,
)
from effect_expected import expected
from effect_records import FIRST, Record, Records, Shown, known, logged, losses
from effect_witness import chosen

from dft_kernels.benchmarks.runs import about
from dft_kernels.benchmarks.tables import write_csv
from dft_kernels.commands.printing import progress
from dft_kernels.evaluation import evaluate as room
from dft_kernels.evaluation.documents import Documents
from dft_kernels.evaluation.measure import measured
from dft_kernels.evaluation.metrics import METRICS, Sample
from dft_kernels.evaluation.paired import between_seeds, holm, paired
from dft_kernels.evaluation.people import People, cut, people
from dft_kernels.evaluation.results import FILE, Evaluated, load
from dft_kernels.evaluation.retention import right
from dft_kernels.evaluation.subject import Job, Model
from dft_kernels.files import replace_text
from dft_kernels.generation import samples
from dft_kernels.generation.sampling import Sampling
from dft_kernels.generation.settings import Settings, described
from dft_kernels.materials.encoders import embed, encoder
from dft_kernels.materials.models import cache_folder, gemma3
from dft_kernels.materials.sources import ABOUT, model_of, tokenizer_of
from dft_kernels.materials.texts import documents_of

PLAIN = Settings()
MADE = "made.json"  # in a folder: what it was made by


class Study:
    """The folder of a study, and what is in it."""

    def __init__(self, folder: Path, cache: Path, kept: Path) -> None:
        self.folder, self.cache, self.kept, self.records = folder, cache, kept, Records(kept)

    def texts(self, part: str) -> list[str]:
        """Files, or a text of the package, of what is trained on, validated or tested with."""
        named = {"lambada": "lambada", "witness": str(self.folder / "witness.jsonl")}
        if part in named:
            return [named[part]]
        return [str(self.folder / f"{name}.txt") for name, its in NOVELS.items() if its == part]

    def start(self, model: str) -> str:
        """What dft-kernels calls a model to begin with."""
        return str(self.folder / "gemma3") if model == "gemma3" else model

    def model(self, arm: Arm, seed: int) -> str:
        """What an arm's texts are drawn from."""
        if arm.of is not None:
            return self.model(BY_NAME[arm.of], seed)
        return self.start(arm.model) if arm.flags is None else str(self.folder / "models" / f"{arm.name}-{seed}")

    def log(self, name: str) -> Path:
        """Where a command says what it does."""
        return self.folder / "logs" / f"{name}.log"

    def command(self, *arguments: str, log: str) -> None:
        """Run dft-kernels; what it says goes into a log."""
        self.log(log).parent.mkdir(parents=True, exist_ok=True)
        with self.log(log).open("a") as out:
            words = [sys.executable, "-m", "dft_kernels.commands.main", *arguments]
            subprocess.run(words, check=True, stdout=out, stderr=subprocess.STDOUT)

    def made(self, folder: Path, by: dict[str, Any], done: bool) -> bool:
        """Whether what lies in a folder is done; what makes it is noted there. ValueError where that was another
        study, or this one before it was changed."""
        file, by = folder / MADE, json.loads(json.dumps(by))
        before = file.read_text() if file.exists() else "something unknown" if done else json.dumps(by)
        if before == "something unknown" or json.loads(before) != by:
            raise ValueError(f"effect: {folder} must be made by {by}, got {before}. Name another --folder.")
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(file, json.dumps(by, indent=1))
        return done

    def train(self, arm: Arm, seed: int, out: Path, rate: str, steps: int, *more: str, log: str | None = None) -> None:
        """One model, unless it is there."""
        assert arm.flags is not None
        about = out / ABOUT
        command = [
            "train", "--model", self.start(arm.model), "--text", *self.texts(arm.text), "--output_dir", str(out),
            "--max_length", str(LENGTH), "--per_device_train_batch_size", str(BATCH), "--max_steps", str(steps),
            "--learning_rate", rate, "--warmup_steps", str(WARMUP), "--held_out", str(HELD_OUT),
            "--use_cpu", "true", "--save_steps", "50", "--save_total_limit", "1", "--report_to", "none",
            "--seed", str(seed), *(flag.format(folder=self.folder) for flag in arm.flags), *more,
        ]  # fmt: skip
        if self.made(out, {"command": command}, about.exists() and "held_out" in json.loads(about.read_text())):
            return
        self.command(*command, "--cache", str(self.cache), log=log or out.name)
        for checkpoint in out.glob("checkpoint-*"):  # three times the model, of no use any more
            shutil.rmtree(checkpoint)

    def prepare(self) -> None:
        """Novels and their target."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, text in zip(NOVELS, documents_of("literary", self.cache)[1], strict=True):
            replace_text(self.folder / f"{name}.txt", text)
        self.target()
        first = self.people().reference[:FIRST]
        self.records.keep_shown(Shown([one.prompt for one in first], [one.text for one in first]))

    def people(self) -> People:
        """The test novel's passages: prompts, and what its author wrote."""
        those = [Path(file).read_text() for file in self.texts("test")]
        return people(those, self.tokenizer(), PROMPT, LENGTH, COUNT)

    @staticmethod
    def held_out(out: Path) -> float:
        """Cross-entropy on held-out sequences after training."""
        return float(json.loads((out / ABOUT).read_text())["held_out"]["after"]["cross_entropy"])

    def needed(self, arm: Arm) -> None:
        """Targets that an arm takes besides."""
        if arm.model == "gemma3":
            folder, part = self.folder / "gemma3", self.folder / "gemma3.part"
            if not folder.exists():
                for one in gemma3(self.cache):
                    one.save_pretrained(part)
                part.rename(folder)
            self.target("gemma3")
        if arm.witness is not None and not (out := Path(*self.texts("witness"))).exists():
            texts, kept = [Path(file).read_text() for file in self.texts("train")], arm.steps * BATCH + HELD_OUT
            model, tokenizer = model_of(self.model(BY_NAME[arm.witness], 0), self.cache, torch.float32)
            found = chosen(texts, model, tokenizer, self.encoder(), LENGTH, PROMPT, COUNT, kept)
            replace_text(out, "".join(json.dumps({"text": text}) + "\n" for text in found))
        beyond = self.folder / "beyond.safetensors"
        if arm.name == "beyond" and not beyond.exists():
            parts = (self.native(self.start("smollm2"), "native"), self.target())
            self.command("target", "blend", *parts, "--gamma", "1.5", "--out", str(beyond), log="target")

    def target(self, model: str = "smollm2") -> str:
        """Of the training novels, by a model's tokens."""
        out = self.folder / ("target.safetensors" if model == "smollm2" else f"target-{model}.safetensors")
        if not out.exists():
            self.command(
                "target", "build", "--text", *self.texts("train"), "--tokenizer", self.start(model), "--out", str(out),
                "--cache", str(self.cache), log="target",
            )  # fmt: skip
        return str(out)

    def native(self, model: str, name: str) -> str:
        """A model's own statistics, after prompts of the training novels."""
        out = self.folder / f"{name}.safetensors"
        if not out.exists():
            self.command(
                "gap", model, "--target", self.target(), "--text", *self.texts("train"),
                "--count", str(COUNT), "--prompt", str(PROMPT), "--length", str(LENGTH), "--own", str(out),
                "--cache", str(self.cache), log="native",
            )  # fmt: skip
        return str(out)

    def tokenizer(self) -> Any:
        """By whose tokens texts are cut and counted."""
        return tokenizer_of(self.start("smollm2"), self.cache)

    def expected(self, arm: Arm, model: str) -> dict[str, float]:
        """Of a model, on the validation novel."""
        (text,) = (Path(file).read_text() for file in self.texts("validation"))
        of = model_of(model, self.cache, torch.float32)
        return expected(*of, Path(self.target(arm.model)), text, LENGTH, COUNT)

    def encoder(self) -> Any:
        """Of MMD."""
        return encoder("minilm", self.cache)

    def written(self, part: str, name: str, model: str, settings: Settings = PLAIN, **more: Any) -> Evaluated:
        """Texts of a model, what it knows, all metrics: made unless they are there."""
        folder, trained = self.folder / part / name, Path(model) / MADE
        by = {"model": json.loads(trained.read_text()) if trained.exists() else model, **how(settings), **more}
        if not self.made(folder, by, (folder / FILE).exists()):
            those = [Path(file).read_text() for file in self.texts(part)]
            job = Job(
                human=self.texts(part), sampling=Sampling(length=LENGTH, count=COUNT), prompt=PROMPT, cache=self.cache,
                batch=50, encoder=self.encoder(), **more,
            )  # fmt: skip
            subject = Model(name, partial(model_of, model, self.cache, torch.float32), (settings,))
            room.evaluate(job, those, self.tokenizer(), [subject], folder, partial(progress, quiet=False))
        return load(folder).models[0]

    def settings(self, arm: Arm, seed: int) -> Settings:
        """How an arm's texts are drawn."""
        if arm.sampled:
            if (chosen := self.records.validation()) is None:
                raise ValueError(f"effect: {arm.name} must come after the sweep, got none. Run validate first.")
            return Settings(chosen.sampling.temperature, chosen.sampling.top_p, chosen.sampling.min_p)
        if not arm.refined:
            return PLAIN
        native = self.native(self.model(arm, seed), f"native-{arm.of}-{seed}")
        return Settings(refine=self.target(), bound=0.1, native=native)


def how(settings: Settings) -> dict[str, Any]:
    """In what way a model draws."""
    given = {name: getattr(settings, name) for name in ("temperature", "top_p", "min_p")}
    return {"steps": described(settings), **given}


def seeds_first(names: Iterable[str]) -> list[tuple[Arm, int]]:
    """The arms' runs: the first seed of all, then the second."""
    named = set(names)
    arms = [arm for arm in ARMS if not named or arm.name in named]
    return [(arm, seed) for seed in range(3) for arm in arms if seed < arm.seeds]


def pilot(study: Study) -> None:
    """How far cross-entropy alone falls by each learning rate."""
    for rate in RATES:
        out = study.folder / "pilot" / rate
        study.train(BY_NAME[SFT], 0, out, rate, PILOT)
        print(f"{rate}: held-out cross-entropy {study.held_out(out):.4f}", flush=True)


def train(study: Study, names: list[str]) -> None:
    """Arms, unless they are trained, or all that is drawn from them is there."""
    for arm, seed in seeds_first(names):
        takers = [one for one in ARMS if one.tested and seed < one.seeds and arm.name in (one.name, *one.takes)]
        if arm.flags is not None and any(study.records.run(one, seed) is None for one in takers):
            study.needed(arm)
            out = study.folder / "models" / f"{arm.name}-{seed}"
            study.train(arm, seed, out, RATE, arm.steps)
            print(f"{arm.name}, seed {seed}: held-out cross-entropy {study.held_out(out):.4f}", flush=True)


def validate(study: Study) -> None:
    """The first SFT by all ways of sampling."""
    if study.records.validation() is None:
        found = study.written("validation", f"{SFT}-0", study.model(BY_NAME[SFT], 0), sweep=room.GRID)
        study.records.keep_validation(found.sampling, found.sweep)
    print(f"best on the validation novel: {study.settings(BY_NAME[BEST], 0)}")


def test(study: Study, names: list[str]) -> None:
    """Texts and metrics of the arms that are trained, unless they are there."""
    tokenizer = study.tokenizer()
    for arm, seed in seeds_first(names):
        model, name = study.model(arm, seed), f"{arm.name}-{seed}"
        made = model == "smollm2" or (Path(model) / "config.json").exists()
        if not arm.tested or not made or study.records.run(arm, seed) is not None:
            continue
        settings, folder = study.settings(arm, seed), study.folder / "test" / name
        same = None if arm.of is None else study.records.run(BY_NAME[arm.of], seed)
        if same is not None and same.how == how(settings):  # validation may choose what its models draw by anyway
            its = {name: getattr(same, name) for name in ("how", "texts", "values", "cost")}
            study.records.keep(arm, seed, held_out=None, trained=[], expected={}, right={}, **its)
            print(f"{name}: as {arm.of}", flush=True)
            continue
        found = study.written("test", name, model, settings, tasks=arm.tasks, questions=QUESTIONS)
        (texts,) = (folder / "samples").glob("*.jsonl")
        marks: dict[str, dict[int, bool]] = {}
        for file in (folder / "answers").glob("*.jsonl"):
            marks |= right(arm.tasks, study.cache, file, QUESTIONS)
        trained = arm.flags is not None
        study.records.keep(
            arm, seed, how=how(settings), held_out=study.held_out(Path(model)) if trained else None,
            trained=losses(logged(study.log(name))) if trained else [],
            expected=study.expected(arm, model) if arm.of is None and seed == 0 else {},
            texts=[cut(text, tokenizer, LENGTH) for text in samples.read(texts).texts],
            right={task: "".join(str(int(mark)) for mark in its.values()) for task, its in marks.items()},
            values=found.values, cost=found.cost,
        )  # fmt: skip
        print(f"{name}: written", flush=True)


def compare(study: Study) -> None:
    """The named metrics of every arm that was tested, beside its control; whether the bar is met."""
    tokenizer, those = study.tokenizer(), study.people()
    pool, prompts = [one.text for one in those.all], [one.prompt for one in those.all]
    rows: dict[tuple[str, int], Any] = {}
    records: dict[str, list[Record]] = {}
    for arm, seed in seeds_first([]):
        record = study.records.run(arm, seed) if arm.tested else None
        if record is not None:
            records.setdefault(arm.name, []).append(record)
            rows[arm.name, seed] = np.arange(len(pool), len(pool) + len(record.texts))
            pool += record.texts
            prompts += [one.prompt for one in those.reference]
    its = study.encoder()
    vectors = None if its is None else embed(its, pool).double().numpy()
    documents = Documents(pool, np.arange(len(those.all)), tokenizer, vectors, prompts)
    metrics = [next(metric for metric in METRICS if metric.name == name) for name in NAMED]
    found = measured({f"{name}-{seed}": Sample(documents, at) for (name, seed), at in rows.items()}, metrics=metrics)
    of = {arm: [found[f"{arm}-{seed}"] for name, seed in rows if name == arm] for arm, _ in rows}
    seeds = between_seeds(list(of.values()))
    noises = {one.metric.name: np.abs(one.noise) for one in next(iter(found.values()))}  # of people from people
    people = {name: float(np.median(noise)) if len(noise) else "" for name, noise in noises.items()}
    out = []
    for control in dict.fromkeys(arm.beside for arm in ARMS if arm.beside in of):
        arms = [arm for arm in ARMS if arm.beside == control and arm.name in of]
        tried = {arm.name: paired(of[control], of[arm.name], seeds) for arm in arms}
        family = iter(holm([one for arm in arms if arm.tried for one in tried[arm.name]]))
        for arm in arms:
            knows = known(records[arm.name], records.get(BY_NAME[control].of or control, []))
            for one in tried[arm.name]:
                one = next(family) if arm.tried else one
                out.append({
                    "arm": arm.name, "seeds": len(of[arm.name]), "beside": control, "tried": int(arm.tried),
                    **vars(one), "closer": int(arm.tried and one.closer), "halved": int(arm.tried and one.halved),
                    "people": people[one.metric],
                    **knows, **about("cpu"),
                })  # fmt: skip
    write_csv(study.kept.parent / "effect-cpu.csv", out)
    print(json.dumps(bar(out, study.records.costs()), indent=1))


def cost(study: Study) -> None:
    """Seconds and bytes of a step, the arms in turn, three rounds: step_s, the median, is of a step without rollouts;
    mean_s is of all of two rounds of four."""
    rows = []
    for turn in range(3):
        for name in (SFT, "terms", "constraint", "distilled", "rollouts"):
            out = study.folder / "cost" / f"{name}-{turn}"
            arm = replace(BY_NAME[name], steps=12)
            log, more = f"cost-{out.name}", ("--logging_steps", "1", "--save_strategy", "no")
            study.train(arm, 0, out, RATE, arm.steps, *more, log=log)
            logs = logged(study.log(log))[-8:]
            seconds = [BATCH * LENGTH / one["tokens_per_second"] for one in logs]
            rows.append({
                "arm": name, "round": turn, "step_s": statistics.median(seconds), "mean_s": statistics.fmean(seconds),
                "peak_gb": max(one["peak_memory_gb"] for one in logs), **about("cpu"),
            })  # fmt: skip
            print(rows[-1], flush=True)
            write_csv(study.kept / "cost.csv", rows)


def main() -> None:
    """One stage."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("stage", choices=("prepare", "pilot", "train", "validate", "test", "compare", "cost"))
    made.add_argument("arms", nargs="*", choices=[*BY_NAME, []], help="by name; all of them without")
    made.add_argument("--folder", type=Path, default=Path("build/effect"))
    made.add_argument("--kept", type=Path, default=Path(__file__).parent / "results" / "effect")
    made.add_argument("--cache", type=Path, default=cache_folder())
    options = made.parse_args()
    transformers.utils.logging.disable_progress_bar()
    study = Study(options.folder, options.cache, options.kept)
    if options.stage == "prepare":
        study.prepare()
    elif options.stage in ("train", "test"):
        {"train": train, "test": test}[options.stage](study, options.arms)
    else:
        {"pilot": pilot, "validate": validate, "compare": compare, "cost": cost}[options.stage](study)


if __name__ == "__main__":
    main()
