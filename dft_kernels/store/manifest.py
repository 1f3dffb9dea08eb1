"""The teacher store: what a teacher said about fixed texts, written once and read at random.

    manifest.json             what it is, and size and checksum of every other file
    head.safetensors          kind "hidden": weight [V, H] and, if there is one, bias [V]
    shard-00000.safetensors   tokens [rows], starts [sequences + 1]: sequence i is rows starts[i]..starts[i + 1]; and
                              "hidden": hidden [rows, H] bf16, the last hidden states that the head multiplies
                              "topk": indices [rows, k] (uint16 where the vocabulary fits, else int32),
                                      log_probs [rows, k] bf16, tail [rows] fp32, log of the mass outside

Row t of a sequence is the teacher's distribution over token t + 1. A shard exists once it is listed: files are
written beside their names, synced, renamed, and only then listed by a manifest that is replaced as a whole, so that
a capture may be killed at any moment and goes on from the last whole shard.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NoReturn

import torch

MANIFEST, HEAD = "manifest.json", "head.safetensors"
FORMAT, VERSION = "dft_kernels teacher store", 1
KINDS = ("hidden", "topk")
SHARD_ROWS = 1 << 16  # of a shard, unless told otherwise
_BLOCK = 1 << 22  # bytes hashed at a time


@dataclass(frozen=True)
class Contents:
    """What a store holds: the fields that a capture fixes when it begins, and a resumed one must repeat."""

    kind: str  # hidden, topk
    vocab_size: int  # of the distributions
    width: int  # H of hidden, k of topk
    model: str
    model_sha256: str
    tokenizer_sha256: str
    temperature: float = 1.0  # that log_probs are of; hidden states serve any
    logit_scale: float = 1.0  # of the head; see TeacherHead
    softcap: float | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors of a shard beside tokens and starts."""
        return ("hidden",) if self.kind == "hidden" else ("indices", "log_probs", "tail")

    def dtype(self, name: str) -> torch.dtype:
        """Of a shard's tensor."""
        if name == "indices":
            return torch.uint16 if self.vocab_size <= 1 << 16 else torch.int32
        return {"tokens": torch.int32, "starts": torch.int64, "tail": torch.float32}.get(name, torch.bfloat16)

    def shape(self, name: str, rows: int, sequences: int) -> list[int]:
        """Of a shard's tensor."""
        if name == "starts":
            return [sequences + 1]
        return [rows] if name in ("tokens", "tail") else [rows, self.width]


@dataclass(frozen=True)
class Part:
    """A file of the store, as the manifest lists it."""

    file: str
    bytes: int
    sha256: str
    rows: int = 0
    sequences: int = 0


def fail(path: Path, field: str, relation: str, got: object, remedy: str) -> NoReturn:
    """Raise what is wrong with a file of the store, by file and field."""
    raise ValueError(f"store: {path}: {field} must {relation}, got {got}. {remedy}.")


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
    """Wait until a file, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_manifest(folder: Path) -> tuple[Contents, Part | None, list[Part]]:
    """What the store holds, its head, its shards."""
    path = folder / MANIFEST
    try:
        whole = json.loads(path.read_text())
    except FileNotFoundError:
        fail(path, "the file", "be there", "none", "Name the folder that `dft-kernels capture --out` made")
    except (OSError, ValueError) as error:
        fail(path, "the file", "be readable JSON", error, "Restore it, or capture again")
    if not isinstance(whole, dict) or whole.get("format") != FORMAT:
        fail(
            path,
            "format",
            f"be {FORMAT!r}",
            repr(whole.get("format") if isinstance(whole, dict) else whole),
            "Name a store",
        )
    if whole.get("version") != VERSION:
        fail(path, "version", f"be {VERSION}", whole.get("version"), "Read it with the dft_kernels that wrote it")
    try:
        contents = Contents(**{field.name: whole[field.name] for field in fields(Contents)})
        head = None if whole["head"] is None else Part(**whole["head"])
        parts = [Part(**part) for part in whole["shards"]]
    except (KeyError, TypeError) as error:
        fail(path, str(error), "be as a capture writes it", "something else", "Restore the file, or capture again")
    if contents.kind not in KINDS:
        fail(path, "kind", f"be one of {', '.join(KINDS)}", repr(contents.kind), "Restore the file")
    return contents, head, parts
