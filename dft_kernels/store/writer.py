"""Writing a teacher store (manifest.py says what it is)."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from .manifest import FORMAT, HEAD, KINDS, MANIFEST, VERSION, Contents, Part, digest, fail, read_manifest, sync


class StoreWriter:
    """Appends shards to a store, new or begun; one writer at a time, and the folder is consistent at every moment.

    folder: new, empty, or a store of the same `contents`. head: weight [V, H] and bias [V] or None of kind "hidden".
    Use as a context manager. `sequences`: how many the store holds; the next `append` continues from there.
    """

    def __init__(self, folder: Path, contents: Contents, head: tuple[Tensor, Tensor | None] | None = None) -> None:
        self.folder, self.contents = folder, contents
        if contents.kind not in KINDS:
            raise ValueError(
                f"store: kind must be one of {', '.join(KINDS)}, got {contents.kind!r}. Pick one of these."
            )
        if (head is not None) != (contents.kind == "hidden"):
            raise ValueError("store: head must be given for kind 'hidden' and only there. Pass (weight, bias).")
        folder.mkdir(parents=True, exist_ok=True)
        manifest = folder / MANIFEST
        foreign = [path.name for path in folder.iterdir() if path.name != ".lock" and not path.name.endswith(".part")]
        if not manifest.exists() and foreign:
            fail(folder, "the folder", "be new, empty or a store", sorted(foreign)[:3], "Name another folder")
        self.lock = (folder / ".lock").open("w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.lock.close()
            fail(folder, "the store", "have one writer at a time", "another process writing", "Wait for it, or stop it")
        self.parts: list[Part] = []
        self.head: Part | None = None
        if manifest.exists():
            found, self.head, self.parts = read_manifest(folder)
            for field in fields(Contents):
                ours, theirs = getattr(contents, field.name), getattr(found, field.name)
                if ours != theirs:
                    self.close()
                    fail(manifest, field.name, f"be {ours!r} as in this capture", repr(theirs), "Name another folder")
            listed = {part.file for part in self.parts}
            for path in folder.glob("shard-*"):  # what a killed capture had not listed yet
                if path.name not in listed:
                    path.unlink()
        else:
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
        """Let other writers in."""
        self.lock.close()

    def append(self, tokens: Sequence[Tensor], **rows: Sequence[Tensor]) -> None:
        """Store one shard: the tokens [L] of some sequences, and for each its rows, `hidden` [L, H] or `indices`,
        `log_probs` [L, k] and `tail` [L]. When it returns the shard is on the disk."""
        lengths = torch.tensor([len(one) for one in tokens], dtype=torch.int64)
        tensors = {"tokens": torch.cat(list(tokens)), "starts": torch.nn.functional.pad(lengths.cumsum(0), (1, 0))}
        tensors |= {name: torch.cat(list(rows[name])) for name in self.contents.names}
        for name, tensor in tensors.items():
            want = self.contents.shape(name, int(lengths.sum()), len(tokens))
            if list(tensor.shape) != want:
                fail(self.folder, name, f"have shape {want}", list(tensor.shape), "Give a row for every token")
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
        beside = self.folder / f"{MANIFEST}.part"
        beside.write_text(json.dumps(whole, indent=1) + "\n")
        sync(beside)
        beside.replace(self.folder / MANIFEST)
        sync(self.folder)
