"""The teacher store: a teacher's distributions over fixed texts, written once, read in random order.

    manifest.json             metadata, and the size and sha256 of every other file
    head.safetensors          kind "hidden": weight [V, H] and, if there is one, bias [V]
    shard-00000.safetensors   tokens [rows], starts [sequences + 1]: sequence i is rows starts[i]..starts[i + 1]; and
                              "hidden": hidden [rows, H] bf16, the last hidden states that the head multiplies
                              "topk": indices [rows, k] (uint16 where the vocabulary fits, else int32),
                                      log_probs [rows, k] bf16, tail [rows] fp32, log of the mass outside
                              where masked: counts [rows] uint8, 1 for a token that is a label

Row t of a sequence is the teacher's distribution over token t + 1. A shard belongs to the store once the manifest
lists it. Files are written under a temporary name, synced and renamed, and the manifest is then replaced atomically:
a capture that is killed at any moment resumes after the last complete shard.

A machine's share of a capture over several (`capture --shard`) is a store of its own sequences, whose files have the
names that they have in the whole store; its manifest says which share, and of what. join.py makes the whole of them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..files import Source, shown

MANIFEST, HEAD = "manifest.json", "head.safetensors"
FORMAT, VERSION = "dft_kernels teacher store", 1
KINDS = ("hidden", "topk")
SHARD_ROWS = 1 << 16  # default size of a shard
MANIFEST_LIMIT = 1 << 23  # bytes: some 40,000 shards
_BESIDE = ("format", "version", "share", "head", "shards")  # the contents
_BLOCK = 1 << 22  # bytes hashed at a time
_LEAST = math.ulp(0.0)  # above 0
_BOUNDS = {
    "vocab_size": (1, (1 << 31) - 1),  # ids are int32
    "width": (1, (1 << 31) - 1),
    "temperature": (_LEAST, math.inf),
    "softcap": (_LEAST, math.inf),
}
_ONE = {"of": (1, 1 << 53), "sequences": (1, 1 << 53), "shard_rows": (1, 1 << 53)}


@dataclass(frozen=True)
class Contents:
    """A store's metadata, fixed when a capture starts; a resumed capture must have the same."""

    kind: str  # hidden, topk
    vocab_size: int  # of the distributions
    width: int  # H of hidden, k of topk
    model: str
    model_sha256: str | None  # None of a served model, whose weights nobody here has seen
    tokenizer_sha256: str
    temperature: float = 1.0  # of log_probs; hidden states serve any temperature
    logit_scale: float = 1.0  # of the head; see TeacherHead
    softcap: float | None = None
    masked: bool = False  # some tokens are no labels: those of prompts
    server: str | None = None  # program and version, of a served model; `model` is its name there

    @property
    def columns(self) -> tuple[str, ...]:
        """All tensors of a shard that have a row for each token, but for tokens."""
        return (*self.names, "counts") if self.masked else self.names

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors of a shard that are the teacher's."""
        return ("hidden",) if self.kind == "hidden" else ("indices", "log_probs", "tail")

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a shard's tensor."""
        if name == "indices":
            return torch.uint16 if self.vocab_size <= 1 << 16 else torch.int32
        return {
            "tokens": torch.int32, "starts": torch.int64, "tail": torch.float32, "counts": torch.uint8
        }.get(name, torch.bfloat16)  # fmt: skip

    def shape(self, name: str, rows: int, sequences: int) -> list[int]:
        """The shape of a shard's tensor."""
        if name == "starts":
            return [sequences + 1]
        return [rows] if name in ("tokens", "tail", "counts") else [rows, self.width]


@dataclass(frozen=True)
class Part:
    """A file of the store, as the manifest lists it."""

    file: str  # a plain name in the store's folder
    bytes: int
    sha256: str
    rows: int = 0
    sequences: int = 0


@dataclass(frozen=True)
class Share:
    """Which part of a capture over several machines a store is."""

    index: int  # of `of`, from 0
    of: int
    first: int  # its first sequence, of the whole capture's
    sequences: int  # how many it holds when it is finished
    file: int  # number of its first file, of the whole capture's
    whole: int  # sequences of the whole capture
    shard_rows: int  # of the whole capture: where its files end
    sha256: str  # of all its sequences: `fingerprint.sequences_fingerprint`

    def __str__(self) -> str:
        return f"shard {self.index}/{self.of}"


class Manifest(NamedTuple):
    """What a manifest says. share: None of a whole store."""

    contents: Contents
    head: Part | None
    parts: list[Part]
    share: Share | None = None

    def json(self) -> str:
        """The file's text."""
        whole = {
            "format": FORMAT,
            "version": VERSION,
            **asdict(self.contents),
            **({} if self.share is None else {"share": asdict(self.share)}),
            "head": None if self.head is None else asdict(self.head),
            "shards": [asdict(part) for part in self.parts],
        }
        return json.dumps(whole, indent=1) + "\n"


def differences(ours: Any, theirs: Any) -> list[tuple[str, Any, Any]]:
    """The fields in which two dataclasses of a kind differ: name and both values."""
    pairs = ((field.name, getattr(ours, field.name), getattr(theirs, field.name)) for field in fields(ours))
    return [(name, one, other) for name, one, other in pairs if one != other]


def source(path: Path) -> Source:
    """A file of a store."""
    return Source("store", path, "Restore it, or capture again")


def digest(path: Path, tick: Callable[[int], None] | None = None) -> str:
    """sha256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            found.update(block)
            if tick is not None:
                tick(len(block))
    return found.hexdigest()


def sync(path: Path) -> None:
    """fsync a file, or a folder's entries."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def manifest_text(folder: Path, manifest: Manifest) -> str:
    """What `write_manifest` writes; ValueError for a manifest that no reader takes."""
    text = manifest.json()
    if len(text) > MANIFEST_LIMIT:
        remedy = "Capture in larger shards, or into several stores"
        source(folder / MANIFEST).fail("bytes", f"be at most {MANIFEST_LIMIT:,}", f"{len(text):,}", remedy)
    return text


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the folder's manifest atomically. When it returns the manifest is on the disk."""
    beside, text = folder / f"{MANIFEST}.part", manifest_text(folder, manifest)
    beside.write_text(text)
    sync(beside)
    beside.replace(folder / MANIFEST)
    sync(folder)


def read_manifest(folder: Path) -> Manifest:
    """A store's manifest. Raises ValueError, by file and field, for one that no capture writes; every file that it
    lists has a plain name and lies in the folder."""
    file = replace(source(folder / MANIFEST), absent="Name the folder that `dft-kernels capture --out` made")
    whole = file.json(MANIFEST_LIMIT)
    if whole.get("format") != FORMAT:
        file.fail("format", f"be {FORMAT!r}", shown(whole.get("format")), "Name a store")
    if file.typed("version", whole.get("version"), int) != VERSION:
        file.fail("version", f"be {VERSION}", whole["version"], "Read it with the dft_kernels that wrote it")
    whole.setdefault("masked", False)  # of stores that are older than masks
    whole.setdefault("server", None)  # of stores that are older than served teachers
    contents = file.record(Contents, whole, bounds=_BOUNDS, beside=_BESIDE)
    if contents.kind not in KINDS:
        file.fail("kind", f"be one of {', '.join(KINDS)}", shown(contents.kind))
    if contents.kind == "topk" and contents.width > contents.vocab_size:
        file.fail("width", f"be at most vocab_size, {contents.vocab_size}, of kind topk", contents.width)
    said = whole.get("head")
    if (said is None) != (contents.kind == "topk"):
        relation = "be a file of kind hidden, and null of kind topk"
        file.fail("head", relation, "none" if said is None else f"one of kind {contents.kind}")
    head = None if said is None else _part(file, "head", said)
    if head is not None and head.file != HEAD:
        file.fail("head.file", f"be {HEAD}", head.file)
    listed = file.typed("shards", whole.get("shards"), list)
    parts = [_part(file, f"shards[{number}]", shard) for number, shard in enumerate(listed)]
    names = Counter(part.file for part in parts)
    for number, part in enumerate(parts):
        if names[part.file] > 1:
            file.fail(f"shards[{number}].file", "be of one shard", f"{part.file} {names[part.file]} times")
        if part.sequences > part.rows:
            file.fail(f"shards[{number}].sequences", f"be at most its rows, {part.rows}", part.sequences)
    share = None if "share" not in whole else _share(file, whole["share"], sum(part.sequences for part in parts))
    return Manifest(contents, head, parts, share)


def _share(file: Source, value: Any, held: int) -> Share:
    """Which part a store of `held` sequences says that it is."""
    share = file.record(Share, value, "share", _ONE)
    if share.index >= share.of:
        file.fail("share.index", f"be below share.of, {share.of}", share.index)
    if share.first + share.sequences > share.whole:
        got = f"{share.first} + {share.sequences}"
        file.fail("share.first + share.sequences", f"be at most share.whole, {share.whole}", got)
    if held > share.sequences:
        file.fail("share.sequences", f"be at least the {held} that shards hold", share.sequences)
    _check_sha256(file, "share.sha256", share.sha256)
    return share


def _part(file: Source, where: str, value: Any) -> Part:
    """A listed file."""
    part = file.record(Part, value, where)
    file.inside(f"{where}.file", part.file)
    _check_sha256(file, f"{where}.sha256", part.sha256)
    return part


def _check_sha256(file: Source, field: str, value: str) -> None:
    if not re.fullmatch("[0-9a-f]{64}", value):
        file.fail(field, "be 64 hexadecimal digits", shown(value))
