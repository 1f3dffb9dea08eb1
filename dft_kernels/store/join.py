"""One store of the shards that several machines captured (manifest.py has the format)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from ..errors import fail
from .manifest import MANIFEST, Manifest, Part, Share, differences, digest, manifest_text, source, sync, write_manifest
from .reader import Store
from .writer import lock

Shard = tuple[Share, Store]
_OF_THE_WHOLE = ("of", "whole", "shard_rows", "sha256")  # what all shares of a capture have alike


def join(out: Path, folders: Sequence[Path], tick: Callable[[int], None] | None = None) -> Store:
    """Make one store of all shards of a capture: the store, byte for byte, that one machine would have written.

    out: new, empty, or what a join of these that was stopped has left. folders: the shards of `capture --shard`, in any
    order; they are only read. tick: told of bytes as they are verified.

    Files are hard links of the shards' where the file system has these, else copies. Each is compared with its checksum
    and synced before it has its name; the manifest comes last, so that what is no whole store is none.

    Raises ValueError, before anything is written, where the folders are not all shards of one capture: a shard that is
    missing, unfinished or there twice, another teacher, tokenizer, text or setting. A file whose bytes are not those of
    its checksum is found when it is reached; restored, the same join goes on.

    Cost: all files are read once, copied where they cannot be linked.
    """
    if not folders:
        _refuse("shards", "be at least one folder", "none", "Name the folders of all shards")
    shards = sorted(map(_opened, folders), key=lambda shard: shard[0].first)
    _check_one_capture(shards)
    _check_finished(shards)
    _check_all_there(shards)
    stores = [store for _, store in shards]
    first = stores[0]
    whole = Manifest(first.contents, first.head_part, [part for store in stores for part in store.parts])
    text = manifest_text(out, whole)
    head = [] if first.head_part is None else [(first.head_part, first)]
    files = [*head, *((part, store) for store in stores for part in store.parts)]
    if any(out.resolve() == folder.resolve() for folder in folders):
        _refuse("out", "be none of the shards", out, "Name another folder")
    names = {part.file for part, _ in files}
    if out.exists():  # before a lock is left in a folder of somebody else's
        _check_out(out, names, text)
    out.mkdir(parents=True, exist_ok=True)
    with lock(out):
        _check_out(out, names, text)
        for part, store in files:
            _place(part, store.folder / part.file, out, tick)
        if not (out / MANIFEST).exists():
            write_manifest(out, whole)
    return Store(out, verify=False)


def _refuse(argument: str, relation: str, got: object, remedy: str) -> NoReturn:
    fail("join", argument, relation, got, remedy)


def _opened(folder: Path) -> Shard:
    """A shard, by its sizes and shapes."""
    store = Store(folder, verify=False)
    if store.share is None:
        _refuse("shards", "be of dft-kernels capture --shard", f"{folder}, a whole store", "Leave it out")
    return store.share, store


def _check_one_capture(shards: Sequence[Shard]) -> None:
    """Refuse a shard of another teacher, tokenizer, text or setting than the first. Another name of the same teacher is
    none: machines may have it in other folders."""
    (share, first), *others = shards
    for other, store in others:
        told = first.contents.model_sha256 is not None  # a served teacher is known by its name alone
        apart = [one for one in differences(first.contents, store.contents) if one[0] != "model" or not told]
        apart += [(f"share.{one[0]}", *one[1:]) for one in differences(share, other) if one[0] in _OF_THE_WHOLE]
        if first.head_part is not None and store.head_part is not None:
            heads = differences(first.head_part, store.head_part)
            apart += [("head.sha256", *one[1:]) for one in heads if one[0] == "sha256"]
        for name, ours, theirs in apart:
            got = f"{name} {ours!r} in {first.folder} and {theirs!r} in {store.folder}"
            _refuse("shards", "be of one capture", got, "Capture one again with what the other had")


def _check_finished(shards: Sequence[Shard]) -> None:
    """Refuse shards that lack sequences."""
    lacking = [
        f"{store.folder} ({share}), which lacks {share.sequences - len(store):,} of {share.sequences:,} sequences"
        for share, store in shards
        if len(store) < share.sequences
    ]
    if lacking:
        _refuse("shards", "be finished", "; ".join(lacking), "Run the same capture again: it goes on")


def _check_all_there(shards: Sequence[Shard]) -> None:
    """Refuse sequences, or files' names, that are in no shard or in two. shards: by their first sequence."""
    whole, before, end = shards[0][0].whole, "", 0
    owner: dict[str, Path] = {}
    for share, store in shards:
        if share.first < end:
            got = f"sequences {share.first:,} to {min(end, share.first + share.sequences) - 1:,} in {before}"
            _refuse("shards", "hold each sequence once", f"{got} and in {store.folder} ({share})", "Leave one out")
        if share.first > end:
            _missing(shards, end, share.first)
        before, end = f"{store.folder} ({share})", share.first + share.sequences
        for part in store.parts:
            if owner.setdefault(part.file, store.folder) != store.folder:
                got = f"{part.file} in {owner[part.file]} and in {store.folder}"
                _refuse("shards", "have files of different names", got, "Capture one of them again")
    if end < whole:
        _missing(shards, end, whole)


def _missing(shards: Sequence[Shard], start: int, end: int) -> NoReturn:
    of, there = shards[0][0].of, {share.index for share, _ in shards}
    absent = ", ".join(f"{index}/{of}" for index in range(of) if index not in there)
    got = f"sequences {start:,} to {end - 1:,} in none" + (f"; no shard {absent}" if absent else "")
    _refuse("shards", f"hold all {shards[0][0].whole:,} sequences", got, "Name the folders of all shards")


def _check_out(out: Path, files: set[str], text: str) -> None:
    """Refuse a folder that holds anything but a part of this join, or all of it."""
    manifest = out / MANIFEST
    foreign = sorted(path.name for path in out.iterdir() if path.name not in {".lock", MANIFEST, *files})
    foreign = [name for name in foreign if not name.endswith(".part")]
    if foreign or (manifest.exists() and source(manifest).data() != text.encode()):
        got = f"{out}, which holds {foreign[:3] if foreign else 'another store'}"
        _refuse("out", "be new, empty or of the same join", got, "Name another folder")


def _place(part: Part, path: Path, out: Path, tick: Callable[[int], None] | None) -> None:
    """A file of a shard in `out`, compared with its checksum."""
    there = out / part.file
    if there.exists():  # a join that was stopped came as far as that
        if digest(there, tick) != part.sha256:
            _refuse("out", "be new, empty or of the same join", f"another {part.file} in {out}", "Name another folder")
        return
    # a name that no writer of a store opens: it may be a link, and what is written to it would be written to the shard
    beside = out / f"{part.file}.join.part"
    beside.unlink(missing_ok=True)
    try:
        os.link(os.path.realpath(path), beside)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(path, beside)
    found = digest(beside, tick)
    if found != part.sha256:
        beside.unlink()
        remedy = "The file was changed or damaged: restore it, or capture this shard again"
        source(path).fail("sha256", f"be {part.sha256}", found, remedy)
    sync(beside)
    beside.replace(there)
    sync(out)
