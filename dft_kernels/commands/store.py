"""`dft-kernels store`: what a teacher store holds, whether it is whole, and one store of several machines' shards."""

from __future__ import annotations

import argparse

from ..store.join import join
from ..store.manifest import Contents
from ..store.reader import Store
from .arguments import Parser, input_folder, output_folder
from .printing import progress


def parser() -> Parser:
    """The options of `dft-kernels store`."""
    made = Parser(prog="dft-kernels store", description="What a teacher store holds.")
    commands = made.add_subparsers(dest="what", required=True)
    for name, text in (("info", "contents and sizes"), ("verify", "contents and sizes, after all of it was read")):
        one = commands.add_parser(name, help=text, description=text)
        one.add_argument("folder", type=input_folder, help="what `dft-kernels capture --out` made")
    text = "one store of all shards of a capture: what one machine would have captured"
    about = f"{text}. Interrupted, the same command goes on."
    whole = commands.add_parser("join", help=text, description=about)
    whole.add_argument("out", type=output_folder, metavar="OUT", help="the store: new, or one to go on with")
    whole.add_argument(
        "shards", nargs="+", type=input_folder, metavar="DIR", help="what each `capture --shard I/N --out DIR` made"
    )
    return made


def run(options: argparse.Namespace) -> int:
    """Print what the store holds, after all of it was read or joined where asked for."""
    if options.what == "join":
        stores = [Store(folder, verify=False) for folder in options.shards]
        total = sum(store.bytes for store in stores) + _head_bytes(stores[0])
        with progress("joined", total, "bytes") as tick:
            store = join(options.out, options.shards, tick)
        print(describe(store), end="")
        print(f"joined of {len(stores)} shards; every checksum is as it was written")
        return 0
    store = Store(options.folder, verify=False)
    if options.what == "verify":
        with progress("checksums", store.bytes + _head_bytes(store), "bytes") as tick:
            store.check_sums(tick)
        store.check_values()
    print(describe(store), end="")
    if options.what == "verify":
        print("every checksum, shape and row is as it was written")
    return 0


def stopped(options: argparse.Namespace) -> str:
    """How an interrupted join goes on."""
    return f"the same command goes on in {options.out}" if options.what == "join" else ""


def of_model(held: Contents) -> str:
    """What tells a store's model from another of its name."""
    return f"served by {held.server}" if held.model_sha256 is None else f"sha256 {held.model_sha256[:16]}"


def describe(store: Store) -> str:
    """A few lines, one for each thing there is to know."""
    held, rows, share = store.contents, max(1, store.rows), store.share
    what = f"last hidden states, H {held.width}, and the head"
    if held.kind == "topk":
        what = f"the {held.width} likeliest tokens and the rest's mass, at temperature {held.temperature:g}"
    lines = {
        "store": store.folder,
        "kind": f"{held.kind}: {what}",
        "teacher": f"{held.model}, {of_model(held)}",
        "tokenizer": f"vocabulary {held.vocab_size}, sha256 {held.tokenizer_sha256[:16]}",
        "holds": f"{len(store):,} sequences, {store.rows:,} tokens in {len(store.parts)} files",
        "size": f"{store.bytes / 1e6:,.1f} MB, {store.bytes / rows:,.0f} bytes a token"
        + (f", head {store.head_part.bytes / 1e6:,.1f} MB" if store.head_part else ""),
    }
    if share is not None:
        lack = share.sequences - len(store)
        lines["shard"] = (
            f"{share.index}/{share.of}: sequences {share.first:,} to {share.first + share.sequences - 1:,} of "
            f"{share.whole:,}, {f'of which it lacks {lack:,}' if lack else 'all of them'}"
        )
    return "".join(f"{name:10} {text}\n" for name, text in lines.items())


def _head_bytes(store: Store) -> int:
    return 0 if store.head_part is None else store.head_part.bytes
