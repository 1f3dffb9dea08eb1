"""`dft-kernels target`: statistics of human writing: build, list, show, blend, and the presets for a tokenizer."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..materials.records import Faults
from ..materials.sources import check_text, passages_of, tokenizer_of
from ..materials.texts import RECIPES, documents_of
from ..targets import corpus, target_file
from ..targets.blend import KINDS, blend, style_vector
from ..targets.comparison import between
from ..targets.punctuation import CLASSES
from ..targets.target import Target
from .arguments import Checked, Number, OutputFile, Parser, Whole, each_of, output_folder
from .flags import add_cache, add_only, add_seed, add_skip_bad, add_text
from .printing import console, progress

_TOKENIZER_HELP = "a folder or name for transformers, or smollm2, which pip brings"


def parser() -> Parser:
    """The options of `dft-kernels target`."""
    made = Parser(prog="dft-kernels target", description="Statistics of human writing.")
    commands = made.add_subparsers(dest="what", required=True)

    def command(name: str, text: str) -> Parser:
        one = commands.add_parser(name, help=text, description=text)
        add_cache(one)
        return one

    build = command("build", "compute a target from texts, in one pass")
    add_text(build, required=True)
    add_only(build, "is counted")
    add_skip_bad(build)
    build.add_argument("--limit", type=Whole(1), default=None, help="passages, the first ones, if not all")
    build.add_argument("--tokenizer", help=_TOKENIZER_HELP + "; without it, text statistics alone")
    build.add_argument("--out", required=True, type=OutputFile(), metavar="FILE")
    build.add_argument("--name", help="of the target; by default that of --out")
    build.add_argument("--source", help="what the texts are; by default their names")
    build.add_argument("--licence", default="not stated", help="of the texts")
    add_seed(build, "of the random halves")
    command("list", "the presets")
    show = command("show", "a target's statistics, and how far another lies from it")
    show.add_argument("target", type=Checked(target_file.load), help="a file or a preset")
    show.add_argument(
        "--against",
        type=Checked(_check_against),
        metavar="TARGET|TEXT",
        help="a file or preset, or what --text of build names",
    )
    show.add_argument(
        "--plot", type=OutputFile(".png"), metavar="FILE.png", help="frequencies, lengths, hazards, punctuation"
    )
    mix = command("blend", "several targets as one")
    mix.add_argument("targets", nargs="+", type=Checked(target_file.load), help="files or presets")
    how = mix.add_mutually_exclusive_group(required=True)
    how.add_argument("--weights", nargs="+", type=Number(), help="one each, of sum 1")
    how.add_argument(
        "--gamma", type=Number(), help="of two: (1 - gamma) the first + gamma the second, extrapolating outside 0..1"
    )
    mix.add_argument(
        "--max-clipped",
        type=Number(least=0, most=1),
        default=0.1,
        help="share of a statistic that gamma may push below 0",
    )
    mix.add_argument("--kind", choices=KINDS, default="linear", help="mixture, or normalised product")
    mix.add_argument("--out", required=True, type=OutputFile(), metavar="FILE")
    presets = command("presets", "the presets for a tokenizer, from their texts")
    presets.add_argument("names", **each_of(tuple(RECIPES)), help=f"of {', '.join(RECIPES)}; none: all")
    presets.add_argument("--tokenizer", required=True, help=_TOKENIZER_HELP)
    presets.add_argument("--out", required=True, type=output_folder, metavar="DIR")
    return made


def run(options: argparse.Namespace) -> int:
    """Run one of its commands."""
    _COMMANDS[options.what](options)
    return 0


def _build(options: argparse.Namespace) -> None:
    tokenizer = tokenizer_of(options.tokenizer, options.cache) if options.tokenizer else None
    faults = Faults(options.skip_bad)
    passages = passages_of(options.text, options.cache, only=options.only, faults=faults)
    target = _counted(
        itertools.islice(passages, options.limit),
        sum(Path(name).stat().st_size for name in options.text if Path(name).is_file()) or None,
        tokenizer,
        name=options.name or options.out.stem,
        source=options.source or ", ".join(Path(name).name for name in options.text),
        licence=options.licence,
        tokenizer_name=options.tokenizer,
        seed=options.seed,
    )
    for line in faults.said():
        print(line)
    _write(target, options.out)


def _presets(options: argparse.Namespace) -> None:
    tokenizer = tokenizer_of(options.tokenizer, options.cache)
    for name in options.names or RECIPES:
        source, documents = documents_of(name, options.cache)
        target = _counted(
            (part for text in documents for part in corpus.passages(text.splitlines(True))),
            sum(map(len, documents)),
            tokenizer,
            name=name,
            source=source,
            licence=RECIPES[name].licence,
            tokenizer_name=options.tokenizer,
        )
        _write(target, options.out / f"{name}.safetensors")


def _list(options: argparse.Namespace) -> None:
    from rich.table import Table

    table = Table("preset", "tokens", "tokenizer", "licence", "source")
    for name in target_file.presets():
        about = target_file.load(name).about
        source = about.source.split(" (Debian")[0]
        table.add_row(name, f"{about.tokens or 0:,}", about.tokenizer or "", about.licence, source)
    console().print(table)


def _show(options: argparse.Namespace) -> None:
    target = target_file.load(options.target)
    other = None if options.against is None else _other(options.against, target, options.cache)
    _describe(target)
    if other is not None:
        _describe_distances(target, other)
    if options.plot is not None:
        from ..targets.plots import plot

        plot(target, other, options.plot)
        print(options.plot)


def _is_target(name: str) -> bool:
    return name in target_file.presets() or Path(name).suffix == ".safetensors"


def _check_against(name: str) -> None:
    if _is_target(name):
        target_file.load(name)
    else:
        check_text(name)


def _other(name: str, target: Target, cache: Path) -> Target:
    """What `--against` names: a target, or a text that is counted here, with the target's tokenizer where that is
    known by its name."""
    if _is_target(name):
        return target_file.load(name)
    tokenizer = None
    if target.about.tokenizer is not None:
        try:
            tokenizer = tokenizer_of(target.about.tokenizer, cache)
            target_file.check_tokenizer(target.about.name, target, tokenizer)
        except ValueError as error:
            print(f"dft-kernels {error} Text statistics alone are compared.", file=sys.stderr)
            tokenizer = None
    size = Path(name).stat().st_size if Path(name).is_file() else None
    return _counted(passages_of([name], cache, "against"), size, tokenizer, name=Path(name).name)


def _blend(options: argparse.Namespace) -> None:
    parts = [target_file.load(name) for name in options.targets]
    if options.gamma is None:
        found = blend(parts, options.weights, options.kind, options.out.stem)
    elif len(parts) != 2 or options.kind != "linear":
        raise ValueError(
            f"target: --gamma must be of two targets, linear, got {len(parts)}, {options.kind}. Use --weights."
        )
    else:
        found = style_vector(parts[0], parts[1], options.gamma, options.max_clipped, options.out.stem)
    _write(found, options.out)


_COMMANDS = {"build": _build, "list": _list, "show": _show, "blend": _blend, "presets": _presets}


def _counted(passages: Iterator[str], total: int | None, tokenizer: Any, **about: Any) -> Target:
    with progress(about["name"], total, "characters") as tick:
        target = corpus.build(passages, tokenizer, tick=tick, **about)
    for text in target.warnings:
        print(f"dft-kernels target: {about['name']}: too small for {text}", file=sys.stderr)
    return target


def _write(target: Target, path: Path) -> None:
    target_file.save(target, path)
    about = target.about
    tokens = "" if about.tokens is None else f", {about.tokens:,} tokens"
    print(f"{path}: {about.words:,} words, {about.sentences:,} sentences{tokens}; {path.stat().st_size / 1e3:,.0f} kB")


def _describe(target: Target) -> None:
    from rich.table import Table

    about = target.about
    lines = {
        "target": about.name,
        "source": about.source,
        "licence": about.licence,
        "size": f"{about.documents:,} passages, {about.words:,} words, {about.sentences:,} sentences",
    }
    if about.tokens is not None:
        lines["tokens"] = f"{about.tokens:,} of {about.tokenizer}, sha256 {(about.tokenizer_sha256 or '')[:16]}"
    print("".join(f"{name:9}{text}\n" for name, text in lines.items()), end="")
    table = Table("statistic", "value", title="what it holds")
    for name, text in summary(target).items():
        table.add_row(name, text)
    console().print(table)
    if target.noise:
        floors = Table("distance", "noise floor", title="between random halves of the text itself")
        for name, value in target.noise.items():
            floors.add_row(name, f"{value:.4g}")
        console().print(floors)
    for text in target.warnings:
        print(f"too small for {text}")


def _describe_distances(target: Target, other: Target) -> None:
    from rich.table import Table

    names = (target.about.name, other.about.name)
    table = Table(
        "distance", "value", *(f"floor of {name}" for name in names), "value / floor", title=" against ".join(names)
    )
    for name, value in between(target, other).items():
        floors = [one.noise.get(name) for one in (target, other)]
        largest = max((floor for floor in floors if floor is not None), default=0.0)
        ratio = f"{value / largest:.1f}" if largest else ""
        table.add_row(name, f"{value:.4g}", *("" if floor is None else f"{floor:.3g}" for floor in floors), ratio)
    console().print(table)


def summary(target: Target) -> dict[str, str]:
    """A target's statistics as a few numbers each."""
    out = {}
    for name, unit in (("sentence_words", "words a sentence"), ("word_length", "letters a word")):
        if name in target:
            p = target[name].double()
            mean = float((p * _indices(len(p))).sum())
            sd = float((p * (_indices(len(p)) - mean).square()).sum()) ** 0.5
            out[unit] = f"{mean:.2f}, sd {sd:.2f}"
    if "sentence_words" in target:
        out["burstiness"] = f"{target.burstiness:.3f}"
    if "type_token_ratio" in target:
        out["different words in 50"] = f"{50 * float(target['type_token_ratio']):.1f}"
    if "punctuation_per_1000_words" in target:
        for kind, rate in zip(CLASSES, target["punctuation_per_1000_words"].tolist(), strict=True):
            out[f"{kind} per 1,000 words"] = f"{rate:.2f}"
    if "unigram" in target:
        out["different tokens"] = f"{int((target['unigram'] > 0).sum()):,} of {target.vocab_size:,}"
    if "ngram_starts" in target:
        contexts = target["ngram_contexts"][:, 0]
        out["tracked n-grams"] = (
            f"{len(target['ngram_completions']):,} after {int((contexts < 0).sum()):,} tokens and "
            f"{int((contexts >= 0).sum()):,} pairs"
        )
    if "hazard" in target:
        at = (4, 16, 64)
        out["hazard at " + ", ".join(map(str, at)) + " tokens"] = ", ".join(
            f"{float(target['hazard'][a]):.3f}" for a in at
        )
    if "entropy" in target:
        mean = float((target["entropy"] * target["entropy_weight"]).sum())
        out["next-token entropy"] = f"{mean:.2f} nats after {len(target['entropy'])} tokens"
    return out


def _indices(count: int) -> Any:
    import torch

    return torch.arange(count, dtype=torch.float64)
