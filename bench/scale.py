"""The vocabulary-parallel loss on paper: what it sends, and what that costs on H100s.

    collectives(...)   what each rank sends in a call: formulas, which a hook over torch.distributed can count
    call(...)          the time of a call, from products measured on one GPU and published figures of networks
    gradient(...)      the head's gradient summed over replicas

bench/scale_tables.py makes tables of it. Nothing here was measured on more than one GPU. Times are in ms, bandwidths in
bytes a ms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

NODE = 8  # GPUs of a node, on NVLink
RANKS = (2, 4, 8, 16)
N, H, V = 8192, 4096, 128256  # of every table

# ---- measured on one H100: bench/LOG.md, the state before the work on the GPU; ms at N, H, V
LOGITS, TEACHER_LOGITS, DHIDDEN, DWEIGHT = 12.5, 12.1, 11.3, 11.5
ROW_BYTES = 2.8e9  # a ms, of the row kernels: 2.3 ms for 6 bytes a logit, 3.65 ms for 10

# ---- published
NVLINK = 370e6  # bytes a ms, bus bandwidth of a ring on NVLink 4
NVLS = 480e6  # of an all-reduce in the switches, 8 GPUs
INFINIBAND = 47e6  # a GPU's own adapter, NDR
BASE, STEP, NET_STEP = 8.4e-3, 3.4e-3, 9.6e-3  # ms: NCCL's model of a ring's latency: once, a step in a node, between
COMM_SMS, SMS = 16, 132  # what NCCL takes of the GPU while it runs beside a product

# ---- assumed
TILE = (128, 256)  # of a product's output, an SM's at a time: the fastest tile that was measured
BACKBONE_TFLOPS = 400  # of a GPU, backward
SMALL = 3e-3  # ms, of a small kernel that is queued behind others
BUDGET, MOST_ROWS, EVEN_ROWS = 1536 << 20, 4096, 1024  # of the planner, for CUDA

PEER_EFFICIENCY = {2: 0.978, 4: 0.937, 8: 0.840, 16: 0.545}  # Liger-Kernel #1422, backward, M 8192, H 4096
PEER_TFLOPS, PEER_V = 762.8, 131072  # of one GPU


class Loss(NamedTuple):
    """A loss: `products` measured at N, H, V in ms, by name; numbers a row in each exchange of statistics; bytes that
    the row kernels move a logit on one GPU and on a rank; small kernels a chunk that merge statistics; bytes of scratch
    a logit."""

    name: str
    products: dict[str, float]
    statistics: tuple[int, ...]
    row_bytes: tuple[int, int]
    merging: int
    scratch: int


_BACK = {"dhidden": DHIDDEN, "dweight": DWEIGHT}
CROSS_ENTROPY = Loss("cross-entropy", {"logits": LOGITS, **_BACK}, (6,), (6, 10), 54, 4)
HEAD_KL = Loss(
    "forward KL, teacher's head", {"logits": LOGITS, "teacher": TEACHER_LOGITS, **_BACK}, (12, 2), (10, 26), 100, 8
)
LOSSES = (CROSS_ENTROPY, HEAD_KL)


# ---- what is sent


class Collective(NamedTuple):
    """A collective of a call. calls: how often a call of the loss runs it; given: bytes that a rank passes in, of all
    these together; leaves: bytes of these that leave the rank, to each peer directly or around a ring."""

    what: str
    operation: str
    calls: int
    given: int
    leaves: int


def chunks(rows: int, chunk: int) -> list[int]:
    """The rows of each chunk."""
    return [min(chunk, rows - start) for start in range(0, rows, chunk)]


def collectives(
    ranks: int,
    rows: int,
    hidden: int,
    chunk: int,
    statistics: Sequence[int],
    itemsize: int = 2,
    part: int | None = None,
    sequence: bool = False,
) -> list[Collective]:
    """What one of `ranks` sends in a call of `rows` rows, forward and backward; nothing of it has the size of V.

    statistics: numbers a row, fp32, in each of a chunk's exchanges: k [k, R] numbers a rank, gathered everywhere.
    itemsize: of hidden and of dhidden; part: of a rank's part of dhidden on its way to be summed, None: itemsize.
    sequence: each rank has rows / ranks of the hidden states and wants the gradients of these alone.

    A chunk's dhidden [R, H] is divided among the ranks: each receives its share of every part, 1 / ranks of the chunk,
    and sends the sum of these to all. With `sequence` the share is a rank's own rows of the call, once, and stays.
    """
    blocks = chunks(rows, chunk)
    out, mine = [], 0
    if sequence:
        mine = -(-rows // ranks) * hidden * itemsize
        out.append(Collective("hidden", "all_gather_into_tensor", 1, mine, (ranks - 1) * mine))
    for number, count in enumerate(statistics):
        name = "statistics" if number == 0 else "sums of the divergence"
        given = 4 * count * rows
        out.append(Collective(name, "all_gather_into_tensor", len(blocks), given, (ranks - 1) * given))
    shares = mine // itemsize if sequence else sum(-(-size * hidden // ranks) for size in blocks)
    given, calls = ranks * shares * (part or itemsize), 1 if sequence else len(blocks)
    out.append(Collective("dhidden, parts", "all_to_all_single", calls, given, given // ranks * (ranks - 1)))
    if not sequence:
        given = shares * itemsize
        out.append(Collective("dhidden, sums", "all_gather_into_tensor", len(blocks), given, (ranks - 1) * given))
    return out


FORMULAS = {  # bytes that leave a rank in a call: n ranks, b bytes a number, k numbers a row
    "hidden": "(n - 1) N H b / n",
    "statistics": "4 (n - 1) k N",
    "sums of the divergence": "8 (n - 1) N",
    "dhidden, parts": "(n - 1) N H b / n",
    "dhidden, sums": "(n - 1) N H b / n",
}


# ---- how long that takes


def latency(ranks: int) -> float:
    """Of a collective, ms: a ring's steps, of which one a node is between nodes."""
    nodes = -(-ranks // NODE)
    between = nodes - 1
    return BASE + (ranks - 1 - between) * STEP + between * NET_STEP


def gather(leaves: float, ranks: int) -> float:
    """An all-gather, ms: a ring, over all adapters of a node where it leaves the node."""
    over = NVLINK if ranks <= NODE else min(NVLINK, NODE * INFINIBAND)
    return latency(ranks) + leaves / over


def exchange(given: float, ranks: int, hierarchical: bool) -> float:
    """An all-to-all of `given` bytes a rank, ms. Between nodes each rank sends to all others through its own adapter;
    hierarchical: it is summed within the node first, so that 1 / 8 is left to send there."""
    if ranks <= NODE:
        return latency(ranks) + given * (ranks - 1) / ranks / NVLINK
    apart = given * (ranks - NODE) / ranks
    if not hierarchical:
        return latency(ranks) + max(apart / INFINIBAND, given * (NODE - 1) / ranks / NVLINK)
    inside, between = given * (NODE - 1) / NODE / NVLINK, apart / NODE / INFINIBAND
    return latency(NODE) + BASE + NET_STEP + inside + between


def quantised(product: str, ranks: int, blocks: Sequence[int]) -> float:
    """How much longer a product takes since its output is computed in whole tiles, and these in whole waves of an SM
    each; V / ranks columns. dweight is one product, the others one a chunk."""
    columns = V / ranks
    if product == "dweight":
        shapes = [(columns, H)]
    else:
        shapes = [(size, H if product == "dhidden" else columns) for size in blocks]
    tiles = [math.ceil(m / TILE[0]) * math.ceil(n / TILE[1]) for m, n in shapes]
    exact = sum(m * n for m, n in shapes) / (TILE[0] * TILE[1])
    return sum(math.ceil(count / SMS) * SMS for count in tiles) / exact


def planned(loss: Loss, ranks: int) -> int:
    """Rows a chunk, as the planner has them where dlogits [N, V / ranks] are kept in bf16."""
    columns = V / ranks
    free = (BUDGET - 2 * N * columns) / (loss.scratch * columns)
    return max(EVEN_ROWS, min(MOST_ROWS, int(free) // EVEN_ROWS * EVEN_ROWS))


OVERLAPS = ("none", "next", "dweight")


class Way(NamedTuple):
    """How a call communicates. overlap: "none"; "next": a chunk's sum of dhidden runs beside the next chunk; "dweight":
    and the last one's beside the product of dweight. part: bytes of a number of a rank's part of dhidden."""

    overlap: str = "next"
    hierarchical: bool = False
    part: int = 2


class Call(NamedTuple):
    """The time of a call on each rank by what it goes into, ms. exposed: waiting for sums of dhidden; beside: what the
    products lose to the SMs of collectives beside them."""

    products: float
    rows: float
    merging: float
    statistics: float
    exposed: float
    beside: float

    @property
    def ms(self) -> float:
        """All of it."""
        return sum(self)


def alone(loss: Loss) -> float:
    """A call on one GPU, ms."""
    return sum(loss.products.values()) + N * V * loss.row_bytes[0] / ROW_BYTES


def call(loss: Loss, ranks: int, way: Way) -> Call:
    """A call on each of `ranks`, as `way` says."""
    blocks = chunks(N, planned(loss, ranks))
    reference = chunks(N, EVEN_ROWS)  # of what was measured
    took = {
        name: ms / ranks * quantised(name, ranks, blocks) / quantised(name, 1, reference)
        for name, ms in loss.products.items()
    }
    rows = N * V / ranks * loss.row_bytes[1] / ROW_BYTES
    merging = len(blocks) * loss.merging * SMALL
    told = sum(gather(4 * k * size * (ranks - 1), ranks) for size in blocks for k in loss.statistics)
    sums = [dhidden(size, ranks, way) for size in blocks]
    step = (sum(took.values()) - took["dweight"] + rows) / len(blocks)
    covers = {"none": [0.0] * len(blocks), "next": [step] * (len(blocks) - 1) + [0.0]}
    covers["dweight"] = [*covers["next"][:-1], took["dweight"]]
    waits = [max(0.0, ms - cover) for ms, cover in zip(sums, covers[way.overlap], strict=True)]
    beside = (sum(sums) - sum(waits)) * COMM_SMS / SMS
    return Call(sum(took.values()), rows, merging, told, sum(waits), beside)


def dhidden(size: int, ranks: int, way: Way) -> float:
    """The sum of a chunk's dhidden, ms."""
    parts, sums = collectives(ranks, size, H, size, (), part=way.part)
    return exchange(parts.given, ranks, way.hierarchical) + gather(sums.leaves, ranks)


def efficiency(loss: Loss, ranks: int, way: Way, more: float = 0.0) -> float:
    """One GPU's time over `ranks` times that of a rank. more: ms that a rank takes beside."""
    return alone(loss) / (ranks * (call(loss, ranks, way).ms + more))


def all_reduce(size: float, ranks: int) -> float:
    """An all-reduce, ms: by a ring; in the switches where a node is full; within nodes first where there are two."""
    if ranks < NODE:
        return size * 2 * (ranks - 1) / ranks / NVLINK
    if ranks == NODE:
        return size * 2 * (ranks - 1) / ranks / NVLS
    inside = 2 * size * (NODE - 1) / NODE / NVLINK
    return inside + size / NODE / INFINIBAND


def peer(ranks: int) -> tuple[float, float]:
    """The peer's backward by this model, as products and then an all-reduce of dX in fp32: its efficiency, and how many
    ms it took more."""
    whole = 3 * 2 * N * H * PEER_V / (PEER_TFLOPS * 1e9)
    took = whole / ranks + all_reduce(4 * N * H, ranks)
    return whole / ranks / took, whole / ranks / PEER_EFFICIENCY[ranks] - took


def gradient(ranks: int, gpus: int, itemsize: int) -> float:
    """The head's gradient [V / ranks, H] reduce-scattered over gpus / ranks replicas, ms, or as much gathered: within a
    node over NVLink, then between nodes, each GPU over its own adapter."""
    inside = max(1, NODE // ranks)
    nodes = max(1, gpus // ranks // inside)
    size = V / ranks * H * itemsize
    ms = BASE + (inside - 1) * STEP + (nodes - 1) * NET_STEP
    return ms + size * (inside - 1) / inside / NVLINK + size / inside * (nodes - 1) / nodes / INFINIBAND
