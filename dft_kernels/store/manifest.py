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
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..files import Source, shown

MANIFEST, HEAD = "manifest.json", "head.safetensors"
FORMAT, VERSION = "dft_kernels teacher store", 1
KINDS = ("hidden", "topk")
SHARD_ROWS = 1 << 16  # default size of a shard
MANIFEST_LIMIT = 1 << 23  # bytes: some 40,000 shards
_BLOCK = 1 << 22  # bytes hashed at a time
_LEAST = math.ulp(0.0)  # above 0
_BOUNDS = {
    "vocab_size": (1, (1 << 31) - 1),  # ids are int32
    "width": (1, (1 << 31) - 1),
    "temperature": (_LEAST, math.inf),
    "softcap": (_LEAST, math.inf),
}


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


def read_manifest(folder: Path) -> tuple[Contents, Part | None, list[Part]]:
    """The metadata, the head and the shards. Raises ValueError, by file and field, for a manifest that no capture
    writes; every file that it lists has a plain name and lies in the folder."""
    file = replace(source(folder / MANIFEST), absent="Name the folder that `dft-kernels capture --out` made")
    whole = file.json(MANIFEST_LIMIT)
    if whole.get("format") != FORMAT:
        file.fail("format", f"be {FORMAT!r}", shown(whole.get("format")), "Name a store")
    if file.typed("version", whole.get("version"), int) != VERSION:
        file.fail("version", f"be {VERSION}", whole["version"], "Read it with the dft_kernels that wrote it")
    whole.setdefault("masked", False)  # of stores that are older than masks
    whole.setdefault("server", None)  # of stores that are older than served teachers
    contents = file.record(Contents, whole, bounds=_BOUNDS, beside=("format", "version", "head", "shards"))
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
    return contents, head, parts


def _part(file: Source, where: str, value: Any) -> Part:
    """A listed file."""
    part = file.record(Part, value, where)
    file.inside(f"{where}.file", part.file)
    if not re.fullmatch("[0-9a-f]{64}", part.sha256):
        file.fail(f"{where}.sha256", "be 64 hexadecimal digits", shown(part.sha256))
    return part
