"""`dft-kernels store`: what a teacher store holds, and whether it is whole."""

from __future__ import annotations

import argparse

from ..store.manifest import Contents
from ..store.reader import Store
from .arguments import Parser, input_folder
from .printing import progress


def parser() -> Parser:
    """The options of `dft-kernels store`."""
    made = Parser(prog="dft-kernels store", description="What a teacher store holds.")
    made.add_argument("what", choices=("info", "verify"), help="info: contents and sizes; verify: read all of it")
    made.add_argument("folder", type=input_folder, help="what `dft-kernels capture --out` made")
    return made


def run(options: argparse.Namespace) -> int:
    """Print what the store holds, after all of it was read where asked for."""
    store = Store(options.folder, verify=False)
    if options.what == "verify":
        total = store.bytes + (store.head_part.bytes if store.head_part else 0)
        with progress("checksums", total, "bytes") as tick:
            store.check_sums(tick)
        store.check_values()
    print(describe(store), end="")
    if options.what == "verify":
        print("every checksum, shape and row is as it was written")
    return 0


def of_model(held: Contents) -> str:
    """What tells a store's model from another of its name."""
    return f"served by {held.server}" if held.model_sha256 is None else f"sha256 {held.model_sha256[:16]}"


def describe(store: Store) -> str:
    """A few lines, one for each thing there is to know."""
    held, rows = store.contents, max(1, store.rows)
    what = f"last hidden states, H {held.width}, and the head"
    if held.kind == "topk":
        what = f"the {held.width} likeliest tokens and the rest's mass, at temperature {held.temperature:g}"
    lines = {
        "store": store.folder,
        "kind": f"{held.kind}: {what}",
        "teacher": f"{held.model}, {of_model(held)}",
        "tokenizer": f"vocabulary {held.vocab_size}, sha256 {held.tokenizer_sha256[:16]}",
        "holds": f"{len(store):,} sequences, {store.rows:,} tokens in {len(store.parts)} shards",
        "size": f"{store.bytes / 1e6:,.1f} MB, {store.bytes / rows:,.0f} bytes a token"
        + (f", head {store.head_part.bytes / 1e6:,.1f} MB" if store.head_part else ""),
    }
    return "".join(f"{name:10} {text}\n" for name, text in lines.items())
