"""Reading a teacher store (manifest.py has the format)."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from ..teachers.head import TeacherHead
from ..teachers.top_k import TopK
from .fingerprint import tokenizer_fingerprint
from .manifest import HEAD, MANIFEST, Part, digest, read_manifest, source


class Store(torch.utils.data.Dataset[dict[str, Tensor]]):
    """A store, opened for reading: memory-mapped sequences by index, in any order, from any DataLoader worker.

    folder: written by `dft-kernels capture`; a shard of `capture --shard` is read as the sequences that it has, `share`
    says which these are. tokenizer: the student's; ValueError if the capture had another. verify:
    compare every file with its checksum (about a second per gigabyte); False: only sizes, shapes and dtypes.

        loader = DataLoader(store, batch_size=8, shuffle=True, collate_fn=store.collate, num_workers=2)
        for batch in loader:
            hidden = student(batch["input_ids"], batch["attention_mask"])
            loss = linear_distribution_loss(hidden, head, shift_labels(batch["labels"]), store.teacher(batch))

    Raises ValueError, by file and field, for a store that is truncated, edited, or of another tokenizer, before any
    sequence is read.
    """

    def __init__(self, folder: str | Path, tokenizer: Any = None, *, verify: bool = True) -> None:
        self.folder = Path(folder)
        self.contents, self.head_part, self.parts, self.share = read_manifest(self.folder)
        if tokenizer is not None:
            self.check_tokenizer(tokenizer)
        self._files = [*([] if self.head_part is None else [self.head_part]), *self.parts]
        for part in self._files:
            self._check_size(part)
        if verify:
            self.check_sums()
        self._check_head()
        self.starts: list[Tensor] = [self._check_shapes(part) for part in self.parts]
        self.first = [0]  # sequence of each shard
        for part in self.parts:
            self.first.append(self.first[-1] + part.sequences)
        self._open: dict[int, Any] = {}
        self._head: tuple[tuple[str, torch.dtype], Any, Tensor | None] | None = None  # the last one loaded

    # ---- what it holds

    def __len__(self) -> int:
        return self.first[-1]

    @property
    def rows(self) -> int:
        """Number of tokens, and of distributions, in all sequences."""
        return sum(part.rows for part in self.parts)

    @property
    def bytes(self) -> int:
        """Size of all shards."""
        return sum(part.bytes for part in self.parts)

    def length(self, sequence: int) -> int:
        """Number of tokens of a sequence."""
        shard, at = self._find(sequence)
        return int(self.starts[shard][at + 1] - self.starts[shard][at])

    # ---- reading

    def __getitem__(self, sequence: int) -> dict[str, Tensor]:
        """input_ids [L], `sequence` (its number), and hidden [L, H], or indices, log_probs [L, k] and tail [L]; counts
        [L] of a masked store."""
        shard, at = self._find(sequence)
        start, end = int(self.starts[shard][at]), int(self.starts[shard][at + 1])
        file = self._opened(shard)
        out = {name: file.get_slice(name)[start:end] for name in ("tokens", *self.contents.columns)}
        out["input_ids"] = out.pop("tokens").long()
        if "indices" in out:
            out["indices"] = out["indices"].long()
        out["sequence"] = torch.tensor(sequence)
        return out

    def collate(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Sequences as one batch, padded on the right: input_ids (0 where padded), attention_mask, labels (-100 where
        padded or masked) [B, T], sequence [B], and the stored rows [B, T, ...]."""
        length = max(len(item["input_ids"]) for item in items)
        out: dict[str, Tensor] = {"sequence": torch.stack([item["sequence"] for item in items])}
        for name in ("input_ids", *self.contents.columns):
            first = items[0][name]
            out[name] = first.new_zeros(len(items), length, *first.shape[1:])
            for row, item in enumerate(items):
                out[name][row, : len(item[name])] = item[name]
        lengths = torch.tensor([len(item["input_ids"]) for item in items])
        out["attention_mask"] = (torch.arange(length) < lengths[:, None]).long()
        counts = out.pop("counts", out["attention_mask"])
        out["labels"] = torch.where(counts == 1, out["input_ids"], -100)
        return out

    def batch(self, sequences: Sequence[int], input_ids: Tensor | None = None) -> dict[str, Tensor]:
        """These sequences, collated. input_ids [B, T]: what the caller believes their tokens to be, right-padded with
        anything; refused where it differs, so that rows are never matched with tokens they were not made of."""
        out = self.collate([self[int(sequence)] for sequence in sequences])
        if input_ids is not None:
            self.check_tokens(out, input_ids)
        return out

    def teacher(
        self, batch: dict[str, Tensor], device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> TeacherHead | TopK:
        """The batch's rows as the `teacher` of a loss, [B, T, ...]. device: None: the batch's; dtype: of hidden states
        and head, None: bf16, as stored. The head is loaded once."""
        if self.contents.kind == "topk":
            indices, log_probs, tail = (batch[name].to(device or batch[name].device) for name in self.contents.names)
            return TopK(indices, log_probs, tail, self.contents.temperature)
        hidden = batch["hidden"].to(device or batch["hidden"].device, dtype or torch.bfloat16)
        weight, bias = self.head(hidden.device, hidden.dtype)
        return TeacherHead(hidden, weight, bias, self.contents.logit_scale, self.contents.softcap)

    def head(
        self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The teacher's head of kind "hidden": weight [V, H] and bias [V] or None."""
        if self.contents.kind != "hidden":
            manifest = source(self.folder / MANIFEST)
            manifest.fail("kind", "be 'hidden' to have a head", "'topk'", "Its rows are whole already")
        wanted = (str(device), dtype or torch.bfloat16)
        if self._head is None or self._head[0] != wanted:
            with safetensors.safe_open(self.folder / HEAD, framework="pt") as file:
                weight, bias = (
                    file.get_tensor(name).to(*wanted) if name in file.keys() else None  # noqa: SIM118 - no mapping
                    for name in ("weight", "bias")
                )
            self._head = (wanted, weight, bias)
        return self._head[1], self._head[2]

    # ---- checking

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuse a tokenizer that is not the one of the capture."""
        found = tokenizer_fingerprint(tokenizer)
        if found != self.contents.tokenizer_sha256:
            remedy = "Train with the tokenizer that the teacher was captured with, or capture again"
            relation = f"be this tokenizer's, {found}"
            manifest = source(self.folder / MANIFEST)
            manifest.fail("tokenizer_sha256", relation, self.contents.tokenizer_sha256, remedy)

    def check_tokens(self, batch: dict[str, Tensor], input_ids: Tensor) -> None:
        """Refuse input_ids [B, T] that are not the tokens of the batch's sequences."""
        stored, mask = batch["input_ids"], batch["attention_mask"] == 1
        if input_ids.shape[0] != stored.shape[0] or input_ids.shape[1] < stored.shape[1]:
            want = f"have shape [{stored.shape[0]}, at least {stored.shape[1]}]"
            remedy = "Give the sequences' tokens from their start"
            source(self.folder).fail("input_ids", want, list(input_ids.shape), remedy)
        wrong = (input_ids[:, : stored.shape[1]].to(stored.device) != stored) & mask
        if bool(wrong.any()):
            row, column = (int(x) for x in wrong.nonzero()[0])
            sequence = int(batch["sequence"][row])
            path = self.folder / self.parts[self._find(sequence)[0]].file
            got = f"{int(input_ids[row, column])} in input_ids"
            relation = f"hold the batch's ids: sequence {sequence} has {int(stored[row, column])} at position {column}"
            remedy = "Feed the texts of the capture, tokenised and cut as they were then"
            source(path).fail("tokens", relation, got, remedy)

    def check_sums(self, tick: Callable[[int], None] | None = None) -> None:
        """Compare every file with its checksum. tick: called with the number of bytes read since the last call."""
        for part in self._files:
            found = digest(self.folder / part.file, tick)
            if found != part.sha256:
                remedy = "The file was changed or damaged: restore it, or capture again"
                source(self.folder / part.file).fail("sha256", f"be {part.sha256}", found, remedy)

    def check_values(self) -> None:
        """Raise for invalid rows: ids outside the vocabulary or repeated, probabilities that do not sum to 1."""
        for shard, part in enumerate(self.parts):
            said, file = source(self.folder / part.file), self._opened(shard)
            for start in range(0, part.rows, 8192):
                rows = {name: file.get_slice(name)[start : start + 8192] for name in ("tokens", *self.contents.columns)}
                if "counts" in rows and bool((wrong := rows["counts"] > 1).any()):
                    at = start + int(wrong.nonzero()[0, 0])
                    said.fail("counts", "hold 0 and 1", f"{int(rows['counts'][wrong][0])} at row {at}", "Capture again")
                for name in rows.keys() & {"tokens", "indices"}:
                    ids = rows[name].long()
                    wrong = (ids < 0) | (ids >= self.contents.vocab_size)
                    if name == "tokens":
                        wrong = ids < 0  # the input may use ids of a padded vocabulary that the distributions leave out
                    if bool(wrong.any()):
                        at, got = start + int(wrong.nonzero()[0, 0]), int(ids[wrong][0])
                        want = f"hold ids in 0..{self.contents.vocab_size - 1}"
                        said.fail(name, want, f"{got} at row {at}", "Capture again")
                if "hidden" in rows:
                    wrong = ~rows["hidden"].isfinite().all(-1)
                    what, relation = "hidden", "be finite"
                else:
                    ordered = rows["indices"].long().sort(-1).values
                    total = rows["log_probs"].float().exp().sum(-1) + rows["tail"].exp()
                    wrong = (ordered[:, 1:] == ordered[:, :-1]).any(-1) | ~((total - 1).abs() < 0.02)
                    what, relation = "log_probs", "be of distinct ids and sum to 1 with tail"
                if bool(wrong.any()):
                    said.fail(what, relation, f"row {start + int(wrong.nonzero()[0])}", "Capture again")

    def _check_size(self, part: Part) -> None:
        file = source(self.folder / part.file)
        found = file.size()
        if found != part.bytes:
            remedy = "The file is truncated or edited: restore it, or capture again"
            file.fail("bytes", f"be {part.bytes}", found, remedy)

    def _check_head(self) -> None:
        """Refuse a head that is not of the manifest's vocabulary and width."""
        if self.head_part is None:
            return
        file, held = source(self.folder / HEAD), self.contents
        with file.tensors() as opened:
            file.tensor(opened, "weight", [held.vocab_size, held.width], torch.bfloat16)
            if "bias" in opened.keys():  # noqa: SIM118 - not a dict
                file.tensor(opened, "bias", [held.vocab_size], torch.bfloat16)

    def _check_shapes(self, part: Part) -> Tensor:
        """`starts` of a shard whose tensors are what the manifest says."""
        file, held = source(self.folder / part.file), self.contents
        with file.tensors() as opened:
            for name in ("tokens", "starts", *held.columns):
                file.tensor(opened, name, held.shape(name, part.rows, part.sequences), held.dtype(name))
            starts: Tensor = opened.get_tensor("starts")
        if bool((starts.diff() < 1).any()) or (int(starts[0]), int(starts[-1])) != (0, part.rows):
            file.fail("starts", f"rise from 0 to {part.rows}", starts.tolist()[:4], "Capture again")
        return starts

    def _find(self, sequence: int) -> tuple[int, int]:
        """The shard of a sequence, and its index in the shard."""
        if not 0 <= sequence < len(self):
            raise IndexError(f"store: sequence must lie in 0..{len(self) - 1}, got {sequence}. See len(store).")
        shard = bisect.bisect_right(self.first, sequence) - 1
        return shard, sequence - self.first[shard]

    def _opened(self, shard: int) -> Any:
        if shard not in self._open:
            self._open[shard] = safetensors.safe_open(self.folder / self.parts[shard].file, framework="pt")
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        """State for DataLoader workers, each of which maps the files itself."""
        return {**self.__dict__, "_open": {}, "_head": None}
