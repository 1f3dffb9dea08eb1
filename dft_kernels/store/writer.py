"""Writing a teacher store (manifest.py has the format)."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ..errors import fail
from .manifest import (
    FORMAT,
    HEAD,
    KINDS,
    MANIFEST,
    MANIFEST_LIMIT,
    VERSION,
    Contents,
    Part,
    digest,
    read_manifest,
    source,
    sync,
)


class StoreWriter:
    """Appends shards to a new or existing store. One writer at a time; the folder is consistent at every moment.

    folder: new, empty, or a store of the same `contents`. head: weight [V, H] and bias [V] or None of kind "hidden".
    Use as a context manager. `sequences`: how many the store holds; the next `append` continues from there.
    """

    def __init__(self, folder: Path, contents: Contents, head: tuple[Tensor, Tensor | None] | None = None) -> None:
        self.folder, self.contents = folder, contents
        if contents.kind not in KINDS:
            fail("store", "kind", f"be one of {', '.join(KINDS)}", repr(contents.kind), "Pick one of these")
        if (head is not None) != (contents.kind == "hidden"):
            got = "none" if head is None else f"one of kind {contents.kind!r}"
            fail("store", "head", "be given for kind 'hidden' and only there", got, "Pass (weight, bias)")
        folder.mkdir(parents=True, exist_ok=True)
        manifest = folder / MANIFEST
        foreign = [path.name for path in folder.iterdir() if path.name != ".lock" and not path.name.endswith(".part")]
        if not manifest.exists() and foreign:
            source(folder).fail("the folder", "be new, empty or a store", sorted(foreign)[:3], "Name another folder")
        self.lock = os.fdopen(
            os.open(folder / ".lock", os.O_RDWR | os.O_CREAT), "wb"
        )  # without truncating what is there
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.lock.close()
            got = "another process writing"
            source(folder).fail("the store", "have one writer at a time", got, "Wait for it, or stop it")
        self.parts: list[Part] = []
        self.head: Part | None = None
        try:
            if manifest.exists():
                self._resume(manifest)
            else:
                self._begin(head)
        except BaseException:
            self.close()
            raise

    def _resume(self, manifest: Path) -> None:
        """Resume a store of the same contents."""
        found, self.head, self.parts = read_manifest(self.folder)
        for field in fields(Contents):
            ours, theirs = getattr(self.contents, field.name), getattr(found, field.name)
            if ours != theirs:
                relation = f"be {ours!r} as in this capture"
                source(manifest).fail(field.name, relation, repr(theirs), "Name another folder")
        listed = {part.file for part in self.parts}
        for path in self.folder.glob("shard-*"):  # written by a killed capture, not listed yet
            if path.name not in listed:
                path.unlink()

    def _begin(self, head: tuple[Tensor, Tensor | None] | None) -> None:
        """Write the head and a manifest without shards."""
        if head is not None:
            weight, bias = head
            tensors = {"weight": weight.detach().to(torch.bfloat16).contiguous()}
            if bias is not None:
                tensors["bias"] = bias.detach().to(torch.bfloat16).contiguous()
            self.head = self._write(HEAD, tensors)
        self._write_manifest()

    @property
    def sequences(self) -> int:
        """How many sequences are stored."""
        return sum(part.sequences for part in self.parts)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock."""
        self.lock.close()

    def append(self, tokens: Sequence[Tensor], **rows: Sequence[Tensor]) -> None:
        """Store one shard: the tokens [L] of some sequences, and for each its rows, `hidden` [L, H] or `indices`,
        `log_probs` [L, k] and `tail` [L]; `counts` [L] of a masked store. When it returns the shard is on the disk."""
        lengths = torch.tensor([len(one) for one in tokens], dtype=torch.int64)
        tensors = {"tokens": torch.cat(list(tokens)), "starts": torch.nn.functional.pad(lengths.cumsum(0), (1, 0))}
        tensors |= {name: torch.cat(list(rows[name])) for name in self.contents.columns}
        for name, tensor in tensors.items():
            want = self.contents.shape(name, int(lengths.sum()), len(tokens))
            if list(tensor.shape) != want:
                remedy = "Give a row for every token"
                source(self.folder).fail(name, f"have shape {want}", list(tensor.shape), remedy)
            tensors[name] = tensor.to("cpu", self.contents.dtype(name)).contiguous()
        part = self._write(f"shard-{len(self.parts):05d}.safetensors", tensors)
        counted = Part(part.file, part.bytes, part.sha256, int(lengths.sum()), len(tokens))
        self.parts.append(counted)
        self._write_manifest()

    def _write(self, name: str, tensors: dict[str, Tensor]) -> Part:
        beside = self.folder / f"{name}.part"
        safetensors.torch.save_file(tensors, beside)
        sync(beside)
        checksum, size = digest(beside), beside.stat().st_size
        beside.replace(self.folder / name)
        sync(self.folder)
        return Part(name, size, checksum)

    def _write_manifest(self) -> None:
        whole = {
            "format": FORMAT,
            "version": VERSION,
            **asdict(self.contents),
            "head": None if self.head is None else asdict(self.head),
            "shards": [asdict(part) for part in self.parts],
        }
        beside, text = self.folder / f"{MANIFEST}.part", json.dumps(whole, indent=1) + "\n"
        if len(text) > MANIFEST_LIMIT:
            remedy = "Capture in larger shards, or into several stores"
            source(self.folder / MANIFEST).fail("bytes", f"be at most {MANIFEST_LIMIT:,}", f"{len(text):,}", remedy)
        beside.write_text(text)
        sync(beside)
        beside.replace(self.folder / MANIFEST)
        sync(self.folder)
