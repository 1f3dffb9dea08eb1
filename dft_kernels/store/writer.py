"""Writing a teacher store (manifest.py has the format)."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import safetensors.torch
import torch
from torch import Tensor

from ..errors import fail
from .manifest import (
    HEAD,
    KINDS,
    MANIFEST,
    Contents,
    Manifest,
    Part,
    Share,
    differences,
    digest,
    read_manifest,
    source,
    sync,
    write_manifest,
)

_WRITING = ".writing"  # the folder of files that are not whole yet, under names that safetensors, too, gives them


def lock(folder: Path) -> IO[bytes]:
    """The folder's lock, held until it is closed or the process ends; ValueError where another process has it."""
    held = os.fdopen(os.open(folder / ".lock", os.O_RDWR | os.O_CREAT), "wb")  # without truncating what is there
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        held.close()
        got = "another process writing"
        source(folder).fail("the store", "have one writer at a time", got, "Wait for it, or stop it")
    return held


class StoreWriter:
    """Appends shards to a new or existing store. One writer at a time; the folder is consistent at every moment.

    folder: new, empty, or a store of the same `contents` and `share`. head: weight [V, H] and bias [V] or None of kind
    "hidden". share: which part of a capture over several machines it is, if it is one. Use as a context manager.
    `sequences`: how many the store holds; the next `append` continues from there.
    """

    def __init__(
        self,
        folder: Path,
        contents: Contents,
        head: tuple[Tensor, Tensor | None] | None = None,
        share: Share | None = None,
    ) -> None:
        self.folder, self.contents, self.share = folder, contents, share
        if contents.kind not in KINDS:
            fail("store", "kind", f"be one of {', '.join(KINDS)}", repr(contents.kind), "Pick one of these")
        if (head is not None) != (contents.kind == "hidden"):
            got = "none" if head is None else f"one of kind {contents.kind!r}"
            fail("store", "head", "be given for kind 'hidden' and only there", got, "Pass (weight, bias)")
        folder.mkdir(parents=True, exist_ok=True)
        manifest = folder / MANIFEST
        # a capture that was killed may have come as far as that
        known = {".lock", _WRITING} if head is None else {".lock", _WRITING, HEAD}
        foreign = [path.name for path in folder.iterdir() if path.name not in known and path.suffix != ".part"]
        if not manifest.exists() and foreign:
            source(folder).fail("the folder", "be new, empty or a store", sorted(foreign)[:3], "Name another folder")
        self.lock = lock(folder)
        shutil.rmtree(folder / _WRITING, ignore_errors=True)
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
        """Resume a store of the same contents, and the same share."""
        found, self.head, self.parts, share = read_manifest(self.folder)
        for name, ours, theirs in differences(self.contents, found):
            source(manifest).fail(name, f"be {ours!r} as in this capture", repr(theirs), "Name another folder")
        ours, theirs = (str(one or "a whole store") for one in (self.share, share))
        if ours != theirs:
            source(manifest).fail("share", f"be {ours} as in this capture", theirs, "Name another folder")
        if self.share is not None and share is not None:
            for name, ours, theirs in differences(self.share, share):
                remedy = "Give the texts and options that it was begun with, or name another folder"
                source(manifest).fail(f"share.{name}", f"be {ours} as in this capture", theirs, remedy)
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
        write_manifest(self.folder, self._manifest())

    def _manifest(self) -> Manifest:
        return Manifest(self.contents, self.head, self.parts, self.share)

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
        shutil.rmtree(self.folder / _WRITING, ignore_errors=True)
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
        number = len(self.parts) + (0 if self.share is None else self.share.file)
        part = self._write(f"shard-{number:05d}.safetensors", tensors)
        counted = Part(part.file, part.bytes, part.sha256, int(lengths.sum()), len(tokens))
        self.parts.append(counted)
        write_manifest(self.folder, self._manifest())

    def _write(self, name: str, tensors: dict[str, Tensor]) -> Part:
        beside = self.folder / _WRITING / name
        beside.parent.mkdir(exist_ok=True)
        safetensors.torch.save_file(tensors, beside)
        sync(beside)
        checksum, size = digest(beside), beside.stat().st_size
        there = self.folder / name
        if name == HEAD and there.exists() and digest(there) != checksum:
            beside.unlink()
            source(there).fail("the file", "be none, or this capture's head", "another", "Name another folder")
        beside.replace(there)
        sync(self.folder)
        return Part(name, size, checksum)
