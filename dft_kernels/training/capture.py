"""Running a teacher over texts, into a store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backends.formulas import head_logits
from ..models.heads import check_positions, head_of, hidden_states
from ..store.fingerprint import model_fingerprint, tokenizer_fingerprint
from ..store.manifest import SHARD_ROWS, Contents
from ..store.reader import Store
from ..store.writer import StoreWriter
from ..teachers.contract import Head
from ..teachers.served import ServedTeacher
from .capture_served import served_contents, served_rows
from .shares import share_of, windows

_LOGITS = 1 << 24  # of a teacher's logits at a time


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """indices, log_probs [R, k] and the log of the mass outside, summed over it [R], of logits [R, V], which are
    spent."""
    top = logits.topk(k, dim=-1)
    outside = logits.scatter_(1, top.indices, -torch.inf).logsumexp(-1)
    whole = torch.logaddexp(top.values.logsumexp(-1), outside)
    return top.indices, top.values - whole[:, None], outside - whole


def _sparse_rows(hidden: Tensor, head: Head, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """`top_k` of the logits of hidden states [R, H], computed a few rows at a time."""
    assert head.weight is not None
    vocab, found = head.weight.shape[0], []
    for rows in hidden.split(max(1, _LOGITS // vocab)):
        logits = head_logits(rows, head)
        found.append(top_k(logits if temperature == 1.0 else logits.div_(temperature), k))
    indices, log_probs, tail = (torch.cat(parts) for parts in zip(*found, strict=True))
    return indices, log_probs, tail


def _batches(lengths: Sequence[int], window: range, tokens: int) -> Iterator[list[int]]:
    """Batches of the sequences of a window, of similar length, with at most `tokens` tokens each, padding included."""
    batch: list[int] = []
    for number in sorted(window, key=lambda n: (-lengths[n], n)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > tokens:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


@torch.no_grad()
def capture(
    model: Any,
    tokenizer: Any,
    sequences: Sequence[Tensor],
    folder: Path,
    kind: str = "hidden",
    *,
    counts: Sequence[Tensor] | None = None,
    k: int = 128,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    batch_tokens: int = 4096,
    shard_rows: int = SHARD_ROWS,
    shard: tuple[int, int] | None = None,
    name: str = "",
    tick: Callable[[int], None] | None = None,
) -> Store:
    """Run `model` over `sequences` (token ids [L] each) and store, for every token, its distribution over the next.

    model: a causal LM, or a `ServedTeacher`: kind "topk" with its top_k at temperature 1, its own vocab_size.
    kind: "hidden": last hidden states in bf16 and the head once: exact but for bf16, 2 H bytes a token, any
        temperature; "topk": the k likeliest tokens and the mass of all others, at `temperature`.
    counts: for each sequence which of its tokens are labels, [L] bool; None: all.
    vocab_size: of a padded head, keep its first ids only; distributions are over these.
    batch_tokens: tokens a batch, padding included; shard_rows: rows a file: what a killed capture may have to redo.
    shard: (i, n): of n machines that are given the same, this is number i, from 0, and captures its part alone, a
        range of the sequences with about 1 / n of the tokens; `dft-kernels store join` makes one store of all n.
    tick: told of tokens as they are done, those already stored first.

    A folder that holds the beginning of the same capture is continued: every sequence is stored once, in order.
    """
    lengths, mine = [len(ids) for ids in sequences], range(len(sequences))
    if isinstance(model, ServedTeacher):
        head = None
        contents = served_contents(model, tokenizer, kind, temperature, counts is not None, name)
    else:
        head, contents = _running(model, tokenizer, kind, k, temperature, vocab_size, counts is not None, name)
        check_positions(
            model, max(lengths, default=0), "capture", "sequences", "have", "Cut them: a smaller --max_length"
        )
    share = None if shard is None else share_of(sequences, counts, shard_rows, shard)
    if share is not None:
        mine = range(share.first, share.first + share.sequences)
    kept = None if head is None or kind == "topk" or head.weight is None else (head.weight, head.bias)
    with StoreWriter(folder, contents, kept, share) as writer:
        done = mine.start + writer.sequences
        _check_begun(folder, sequences[mine.start : mine.stop], writer.sequences)
        if tick is not None:
            tick(sum(lengths[mine.start : done]))
        for window in windows(lengths[: mine.stop], done, shard_rows):
            rows: dict[int, tuple[Tensor, ...]] = {}
            batches = list(_batches(lengths, window, batch_tokens))
            asked = ([sequences[n] for n in batch] for batch in batches)
            found = served_rows(model, asked, contents) if head is None else _runs(model, head, asked, contents)
            for batch, their_rows in zip(batches, found, strict=True):
                rows |= zip(batch, their_rows, strict=True)
                if tick is not None:
                    tick(sum(lengths[n] for n in batch))
            stored = map(list, zip(*(rows[number] for number in window), strict=True))
            columns = dict(zip(contents.names, stored, strict=True))
            if counts is not None:
                columns["counts"] = [counts[number] for number in window]
            writer.append([sequences[number] for number in window], **columns)
    return Store(folder, tokenizer, verify=False)


def _running(
    model: Any, tokenizer: Any, kind: str, k: int, temperature: float, vocab_size: int | None, masked: bool, name: str
) -> tuple[Head, Contents]:
    """The head of a model that is run here, cut to vocab_size, and the metadata of a store of it."""
    head = head_of(model)
    assert head.weight is not None
    vocab, width = head.weight.shape
    if vocab_size is not None:
        if not 1 <= vocab_size <= vocab:
            raise ValueError(f"capture: vocab_size must lie in 1..{vocab} (the head's), got {vocab_size}. Lower it.")
        bias = None if head.bias is None else head.bias[:vocab_size]
        head, vocab = head._replace(weight=head.weight[:vocab_size], bias=bias), vocab_size
    if kind == "topk" and not 1 <= k <= vocab:
        raise ValueError(f"capture: k must lie in 1..{vocab} (the vocabulary), got {k}. Lower it.")
    contents = Contents(
        kind=kind,
        vocab_size=vocab,
        width=width if kind == "hidden" else k,
        model=name or type(model).__name__,
        model_sha256=model_fingerprint(model),
        tokenizer_sha256=tokenizer_fingerprint(tokenizer),
        temperature=temperature if kind == "topk" else 1.0,
        logit_scale=head.logit_scale if kind == "hidden" else 1.0,
        softcap=head.softcap if kind == "hidden" else None,
        masked=masked,
    )
    model.eval()
    return head, contents


def _runs(
    model: Any, head: Head, batches: Iterable[list[Tensor]], contents: Contents
) -> Iterator[list[tuple[Tensor, ...]]]:
    return (_run(model, head, batch, contents) for batch in batches)


def _run(model: Any, head: Head, sequences: list[Tensor], contents: Contents) -> list[tuple[Tensor, ...]]:
    """The stored rows of each sequence of a batch."""
    assert head.weight is not None
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(head.weight.device)
    lengths = torch.tensor([len(one) for one in sequences], device=ids.device)
    mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    hidden = hidden_states(model, ids, mask.long())[mask]  # [rows, H]
    rows: tuple[Tensor, ...] = (hidden.to(torch.bfloat16),)
    if contents.kind == "topk":
        indices, log_probs, tail = _sparse_rows(hidden, head, contents.width, contents.temperature)
        rows = (indices.to(contents.dtype("indices")), log_probs.to(torch.bfloat16), tail)
    counts = [len(one) for one in sequences]
    return list(zip(*(part.cpu().split(counts) for part in rows), strict=True))


def _check_begun(folder: Path, sequences: Sequence[Tensor], done: int) -> None:
    """That what a folder holds are the first `done` of these sequences."""
    if done == 0:
        return
    if done > len(sequences):
        raise ValueError(
            f"capture: {folder} must hold the beginning of these {len(sequences)} sequences, got {done}. Name another "
            "folder, or give the texts that it was begun with."
        )
    store = Store(folder, verify=False)
    for start in range(0, done, 256):
        numbers = range(start, min(done, start + 256))
        given = torch.nn.utils.rnn.pad_sequence([sequences[number] for number in numbers], batch_first=True)
        stored = store.batch(numbers)
        if [len(sequences[n]) for n in numbers] != stored["attention_mask"].sum(1).tolist():
            raise ValueError(
                f"capture: {folder} must hold the beginning of these sequences, got others (sequences {numbers[0]} to "
                f"{numbers[-1]} differ in length). Give the texts and --max-length that it was begun with."
            )
        store.check_tokens(stored, given)
