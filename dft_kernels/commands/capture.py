"""`dft-kernels capture`: a teacher over texts, into a store."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ..materials.models import cache_folder
from ..materials.sources import MODEL_HELP, TEXT_HELP, model_of, texts_of
from ..store.manifest import KINDS, SHARD_ROWS
from .store import describe

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def parser() -> argparse.ArgumentParser:
    """The options of `dft-kernels capture`."""
    made = argparse.ArgumentParser(
        prog="dft-kernels capture",
        description="Run a teacher over texts and store its distributions. Interrupted, it goes on where it was.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = made.add_argument
    add("--model", required=True, help=MODEL_HELP)
    add("--text", required=True, nargs="+", help=TEXT_HELP)
    add("--out", required=True, type=Path, metavar="DIR", help="the store: new, or one to go on with")
    add("--kind", choices=KINDS, default="hidden", help="last hidden states and the head, or the likeliest tokens")
    add("--k", type=int, default=128, help="tokens a row of topk")
    add("--temperature", type=float, default=1.0, help="of topk's distributions")
    add("--length", type=int, default=1024, help="tokens a sequence at most; longer texts are cut")
    add("--limit", type=int, default=None, help="sequences, the first ones, if not all")
    add("--batch-tokens", type=int, default=4096, help="tokens a batch, padding included")
    add("--shard-rows", type=int, default=SHARD_ROWS, help="tokens a file: what an interruption costs at most")
    add("--vocab-size", type=int, default=None, help="of a padded head, the ids that are real")
    add("--dtype", choices=tuple(_DTYPES), default="bfloat16", help="the teacher runs in")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="the teacher runs on")
    add("--cache", type=Path, default=cache_folder(), metavar="DIR", help="where models and texts of pip are kept")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    options = parser().parse_args(arguments)
    try:
        for name in ("k", "length", "limit", "batch_tokens", "shard_rows"):
            value = getattr(options, name)
            if value is not None and value < (2 if name == "length" else 1):
                raise ValueError(f"capture: --{name.replace('_', '-')} must be positive, got {value}. Raise it.")
        if not options.temperature > 0:
            raise ValueError(f"capture: --temperature must be above 0, got {options.temperature}. Raise it.")
        texts = texts_of(options.text, options.cache)
        model, tokenizer = model_of(options.model, options.cache)
        return _run(options, texts, model, tokenizer)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"dft-kernels {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"dft-kernels capture: stopped; the same command goes on in {options.out}", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace, texts: list[str], model: Any, tokenizer: Any) -> int:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from ..training.capture import capture, sequences_of

    sequences = sequences_of(texts, tokenizer, options.length)[: options.limit]
    if not sequences:
        raise ValueError("capture: --text must hold at least two tokens, got none. Name texts.")
    model = model.to(options.device, _DTYPES[options.dtype])
    total, begun, first = sum(map(len, sequences)), time.perf_counter(), [0]
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(TextColumn("tokens"), *columns) as bar:
        task = bar.add_task("", total=total)
        seen: list[int] = []

        def tick(tokens: int) -> None:
            if not seen:
                first[0] = tokens  # stored before
            seen.append(tokens)
            bar.advance(task, tokens)

        store = capture(
            model,
            tokenizer,
            sequences,
            options.out,
            options.kind,
            k=options.k,
            temperature=options.temperature,
            vocab_size=options.vocab_size,
            batch_tokens=options.batch_tokens,
            shard_rows=options.shard_rows,
            name=options.model,
            tick=tick,
        )
    seconds = time.perf_counter() - begun
    print(describe(store), end="")
    if total > first[0]:
        print(f"{'speed':10} {(total - first[0]) / seconds:,.0f} tokens/s")
    return 0
