"""`dft-kernels capture`: a teacher over texts, into a store."""

from __future__ import annotations

import argparse
import time

import torch
import transformers

from ..materials.records import Faults
from ..materials.sources import MODEL_HELP, check_model, documents_of, model_of, tokenizer_of
from ..store.manifest import KINDS, SHARD_ROWS
from ..teachers.served import ServedTeacher
from ..teachers.served_client import checked_url
from ..training.capture import capture
from ..training.examples import examples_of
from ..training.shares import share_range
from .arguments import Checked, Help, Number, Parser, Whole, device, output_folder, shard
from .flags import add_cache, add_only, add_quiet, add_skip_bad, add_text
from .printing import console, progress
from .store import describe

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def parser() -> Parser:
    """The options of `dft-kernels capture`."""
    made = Parser(
        prog="dft-kernels capture",
        description="Run a teacher over texts and store its distributions. Interrupted, it goes on where it was.",
        formatter_class=Help,
    )
    add = made.add_argument
    add("--model", required=True, help=f"{MODEL_HELP}; with --served its tokenizer alone is read, which must be theirs")
    add(
        "--served",
        type=Checked(checked_url),
        metavar="URL",
        help="ask a server of the teacher: vLLM, SGLang, TRL's; its key, if it has one, in DFT_KERNELS_API_KEY",
    )
    add("--served-model", metavar="NAME", help="which of the server's models, if it has several")
    add_text(made, required=True)
    add("--out", required=True, type=output_folder, metavar="DIR", help="the store: new, or one to go on with")
    add(
        "--kind",
        choices=KINDS,
        help="hidden: last hidden states and the head; topk: the likeliest tokens (default: hidden, or topk "
        "of a server)",
    )
    add("--k", type=Whole(1), default=128, help="tokens a row of topk")
    add("--temperature", type=Number(above=0), default=1.0, help="of topk's distributions")
    add("--max-length", "--length", type=Whole(2), default=1024, help="tokens a sequence at most; longer ones are cut")
    add_only(made, "is labels, when training from the store")
    add_skip_bad(made)
    add("--limit", type=Whole(1), default=None, help="sequences, the first ones, if not all")
    add("--batch-tokens", type=Whole(1), default=4096, help="tokens a batch, padding included")
    add("--shard-rows", type=Whole(1), default=SHARD_ROWS, help="tokens a file: what an interruption costs at most")
    add(
        "--shard",
        type=shard,
        metavar="I/N",
        help="of N machines that run this command, each into its own folder, this is number I, from 0: it captures its "
        "part alone; dft-kernels store join makes one store of them",
    )
    add("--vocab-size", type=Whole(1), default=None, help="of a padded head, the ids that are real")
    add("--dtype", choices=tuple(_DTYPES), default="bfloat16", help="the teacher runs in")
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="the teacher runs on")
    add_cache(made)
    add_quiet(made)
    return made


def run(options: argparse.Namespace) -> int:
    """Capture, and print what the store holds."""
    transformers.utils.logging.disable_progress_bar()
    check_model(options.model)
    tokenizer, faults = tokenizer_of(options.model, options.cache), Faults(options.skip_bad)
    documents = documents_of(options.text, options.cache, faults)
    examples, tally = examples_of(documents, tokenizer, options.max_length, faults, options.only)
    examples = examples[: options.limit]
    if not examples:
        got = "; ".join(["none", *faults.said()])
        raise ValueError(f"capture: text must hold at least two tokens, got {got}. Name texts.")
    out = console(quiet=options.quiet)
    for line in tally.said(examples, faults):
        out.print(line, highlight=False, markup=False)
    sequences = [example.ids for example in examples]
    lengths = [len(ids) for ids in sequences]
    total = sum(lengths)
    if options.shard is not None:
        mine, _ = share_range(lengths, options.shard_rows, options.shard)
        total = sum(lengths[mine.start : mine.stop])
        out.print(f"shard {options.shard[0]}/{options.shard[1]}: {len(mine):,} rows, {total:,} tokens", highlight=False)
    if options.served is None:
        model = model_of(options.model, options.cache)[0].to(options.device, _DTYPES[options.dtype])
    else:
        model = ServedTeacher(options.served, options.k, model=options.served_model, vocab_size=options.vocab_size)
    begun, told = time.perf_counter(), []
    with progress("the teacher", total, "tokens", quiet=options.quiet) as advance:

        def tick(tokens: int) -> None:
            told.append(tokens)  # those stored before come first
            advance(tokens)

        store = capture(
            model,
            tokenizer,
            sequences,
            options.out,
            options.kind or ("hidden" if options.served is None else "topk"),
            counts=None if options.only is None else [example.counts for example in examples],
            k=options.k,
            temperature=options.temperature,
            vocab_size=options.vocab_size,
            batch_tokens=options.batch_tokens,
            shard_rows=options.shard_rows,
            shard=options.shard,
            name=options.model,
            tick=tick,
        )
    seconds = time.perf_counter() - begun
    if options.quiet:
        return 0
    print(describe(store), end="")
    if len(told) > 1:
        print(f"{'speed':10} {sum(told[1:]) / seconds:,.0f} tokens/s")
    return 0


def stopped(options: argparse.Namespace) -> str:
    """How an interrupted command goes on."""
    return f"the same command goes on in {options.out}"
