"""Which part of a capture over several machines is whose."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence

from torch import Tensor

from ..errors import fail
from ..store.fingerprint import sequences_fingerprint
from ..store.manifest import Share


def windows(lengths: Sequence[int], first: int, rows: int) -> Iterator[range]:
    """Sequences from `first` on, for files of about `rows` rows."""
    start, held = first, 0
    for number in range(first, len(lengths)):
        held += lengths[number]
        if held >= rows:
            yield range(start, number + 1)
            start, held = number + 1, 0
    if start < len(lengths):
        yield range(start, len(lengths))


def share_range(lengths: Sequence[int], shard_rows: int, shard: tuple[int, int]) -> tuple[range, int]:
    """The sequences of shard (i, n), and the number of its first file.

    Cut where a file of one machine's capture would end, so that the batches, and with them the bits, are the same; of
    these places those nearest to i / n of the tokens, with a file for each shard. So shards differ by about
    `shard_rows` tokens.
    """
    index, of = shard
    if not 0 <= index < of:
        relation = "be (i, n) with i in 0..n-1, counted from 0"
        fail("capture", "shard", relation, f"({index}, {of})", f"The last of {of} is {of - 1}" if of > 0 else "Raise n")
    files = list(windows(lengths, 0, shard_rows))
    if of > len(files):
        remedy = "Lower shard_rows, on all machines, or capture in fewer shards"
        got = f"{of} for {len(files)} files of {shard_rows:,} tokens"
        fail("capture", "shard", "have a file for each of its n parts", got, remedy)
    tokens = [0, *itertools.accumulate(sum(lengths[number] for number in file) for file in files)]
    cuts = [0]
    for part in range(1, of):
        want = tokens[-1] * part / of
        after = bisect.bisect_left(tokens, want)
        nearest = after - 1 if want - tokens[after - 1] <= tokens[after] - want else after
        cuts.append(min(max(nearest, cuts[-1] + 1), len(files) - (of - part)))
    cuts.append(len(files))
    return range(files[cuts[index]].start, files[cuts[index + 1] - 1].stop), cuts[index]


def share_of(
    sequences: Sequence[Tensor], counts: Sequence[Tensor] | None, shard_rows: int, shard: tuple[int, int]
) -> Share:
    """Shard (i, n) of a capture of these sequences, as its manifest says it."""
    numbers, file = share_range([len(ids) for ids in sequences], shard_rows, shard)
    return Share(
        *shard,
        first=numbers.start,
        sequences=len(numbers),
        file=file,
        whole=len(sequences),
        shard_rows=shard_rows,
        sha256=sequences_fingerprint(sequences, counts),
    )
