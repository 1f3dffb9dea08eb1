"""The tables of docs/scale.md, of the model in scale.py: python bench/scale_tables.py prints them.

bench/readme.py writes them into the page. A table is (head, lines, caption).
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import scale

NCCL, TESTS = "https://github.com/NVIDIA/nccl", "https://github.com/NVIDIA/nccl-tests/issues"
PEER = "https://github.com/linkedin/Liger-Kernel/pull/1422"

Table = tuple[list[str], list[list[str]], str]
SHAPE = f"N {scale.N}, H {scale.H}, V {scale.V}, bfloat16"
PREDICTED = "predicted, not measured"


def percent(value: float) -> str:
    """A share."""
    return f"{100 * value:.0f} %"


def ways() -> list[tuple[int, bool]]:
    """Ranks, and whether sums are hierarchical, of the rows of tables."""
    return [*((ranks, False) for ranks in scale.RANKS), (16, True)]


def named(ranks: int, hierarchical: bool) -> str:
    """A row's name."""
    return f"TP {ranks}{', hierarchical' if hierarchical else ', flat' if ranks > scale.NODE else ''}"


def efficiency_table() -> Table:
    """By overlap, a row for each loss and number of ranks."""
    head = ["", "rows a chunk", "nothing overlapped", "overlapped", "overlapped, dweight too",
            "and merging in one kernel", "overlapped, with the peer's difference"]  # fmt: skip
    lines = []
    for loss in scale.LOSSES:
        for ranks, by_node in ways():
            found = [scale.efficiency(loss, ranks, scale.Way(overlap, by_node)) for overlap in scale.OVERLAPS]
            found.append(scale.efficiency(loss._replace(merging=1), ranks, scale.Way("dweight", by_node)))
            found.append(scale.efficiency(loss, ranks, scale.Way("next", by_node), max(0.0, scale.peer(ranks)[1])))
            name = f"{loss.name}, {named(ranks, by_node)}"
            lines.append([name, str(scale.planned(loss, ranks)), *map(percent, found)])
    return head, lines, f"{SHAPE}; {PREDICTED}"


def parts_table() -> Table:
    """Where the time of a rank goes, overlapped."""
    head = ["ms of a rank", "products", "rows", "merging", "statistics", "waiting for dhidden", "lost beside it", "all"]
    lines = []
    for loss in scale.LOSSES:
        whole, products = scale.alone(loss), sum(loss.products.values())
        numbers = [f"{products:.1f}", f"{whole - products:.1f}", *[""] * 4, f"{whole:.1f}"]
        lines.append([f"{loss.name}, one GPU", *numbers])
        for ranks, by_node in ways():
            found = scale.call(loss, ranks, scale.Way("next", by_node))
            lines.append([f"{loss.name}, {named(ranks, by_node)}", *(f"{ms:.2f}" for ms in (*found, found.ms))])
    return head, lines, f"{SHAPE}; {PREDICTED}, but for the products and row kernels of one GPU"


def volume_table() -> Table:
    """What a rank sends, formulas and an example."""
    lines = []
    for name, sequence in (("", False), ("sequence parallel: ", True)):
        for one in scale.collectives(8, scale.N, scale.H, scale.MOST_ROWS, scale.HEAD_KL.statistics, sequence=sequence):
            once = one.what == "hidden" or (sequence and one.what.startswith("dhidden"))
            when = "once" if once else "each chunk"
            size = f"{one.leaves / 1e6:.1f} MB"
            lines.append([f"{name}{one.what}", f"`{one.operation}`", when, scale.FORMULAS[one.what], size])
    head = ["what", "collective", "when", "bytes that leave a rank, a call", "TP 8, forward KL"]
    return head, lines, f"n ranks, b bytes a number, k numbers a row; {SHAPE}, k {scale.HEAD_KL.statistics[0]}"


def sum_table() -> Table:
    """The ways to sum dhidden: of all rows, in two chunks, not overlapped."""
    head = ["sum of dhidden, ms a call", "bf16 parts", "fp32 parts", "sequence parallel, bf16"]
    lines = []
    for ranks, by_node in ways():
        blocks = scale.chunks(scale.N, scale.MOST_ROWS)
        alone = (scale.Way("none", by_node, part) for part in (2, 4))
        found = [sum(scale.dhidden(size, ranks, way) for size in blocks) for way in alone]
        found.append(sum(scale.exchange(size * scale.H * 2, ranks, by_node) for size in blocks))
        lines.append([named(ranks, by_node), *(f"{ms:.2f}" for ms in found)])
    return head, lines, f"{SHAPE}, chunks of {scale.MOST_ROWS} rows; {PREDICTED}"


def peer_table() -> Table:
    """What the peer published, and this model of it."""
    lines = []
    for ranks in scale.RANKS:
        modelled, more = scale.peer(ranks)
        lines.append(
            [f"TP {ranks}", f"{100 * scale.PEER_EFFICIENCY[ranks]:.1f} %", f"{100 * modelled:.1f} %", f"{more:.2f} ms"]
        )
    about = "its backward of a fused cross-entropy: M 8192, H 4096, V 131072, H200, 763 TFLOP/s on one GPU"
    return ["", f"[Liger-Kernel #1422]({PEER})", "this model of it", "the difference, a rank"], lines, about


def data_table() -> Table:
    """The head's gradient over replicas."""
    head = ["GPUs", "replicas x TP", "loss, cross-entropy, ms", "gradient, bf16, ms", "gradient, fp32, ms",
            "weight gathered, bf16, ms", "efficiency if none of it is hidden"]  # fmt: skip
    lines = []
    for gpus in (8, 64, 256, 1024):
        for ranks in (1, 8):
            if gpus // ranks < 2:
                continue
            its = scale.CROSS_ENTROPY
            loss = scale.alone(its) if ranks == 1 else scale.call(its, ranks, scale.Way()).ms
            narrow, wide = scale.gradient(ranks, gpus, 2), scale.gradient(ranks, gpus, 4)
            numbers = (f"{ms:.2f}" for ms in (loss, narrow, wide, narrow))
            lines.append([str(gpus), f"{gpus // ranks} x {ranks}", *numbers, percent(loss / (loss + 2 * narrow))])
    backbone = 4 * 1e9 * scale.N / (scale.BACKBONE_TFLOPS * 1e9)
    about = f"a backbone runs backward in {backbone:.0f} ms / TP for each billion of its parameters"
    about += f" (4 FLOP a parameter and token, {scale.BACKBONE_TFLOPS} TFLOP/s)"
    return head, lines, f"{SHAPE}, N rows a replica; gradient and weight sharded over replicas; {about}; {PREDICTED}"


def inputs_table() -> Table:
    """Every number that the model starts from, and where it is from."""
    ring = f"[NVIDIA]({TESTS}/212); [365 to 370 on 2 to 8 H100s]({NCCL}/issues/1455)"
    tuning = (
        f"[NCCL's own model]({NCCL}/blob/01afd20a77b5804e0ecf1042509dd9d20ebf9e93/src/graph/tuning.cc), ring, Simple"
    )
    channels = f"[NVLS]({NCCL}/blob/178b6b759074597777ce13438efb0e0ba625e429/src/transport/nvls.cc) has 16 channels, "
    channels += f"[an SM each]({NCCL}/issues/689)"
    adapter = f"400 Gb/s; [46 to 48 GB/s an adapter]({TESTS}/290)"
    reported = f"reported: [6 on two H100s]({NCCL}/issues/1259), [47 on 2 x 8 H20s]({NCCL}/issues/1244)"
    small = f"{scale.CROSS_ENTROPY.merging} or {scale.HEAD_KL.merging} kernels of {scale.SMALL * 1e3:.0f} us"
    steps = ", ".join(f"{ms * 1e3:.1f}" for ms in (scale.BASE, scale.STEP, scale.NET_STEP))
    products = f"{scale.LOGITS}, {scale.TEACHER_LOGITS}, {scale.DHIDDEN}, {scale.DWEIGHT} ms"
    log = "measured on one H100: bench/LOG.md"
    lines = [
        ["products on one GPU: logits, teacher's logits, dhidden, dweight", products, log],
        ["row kernels", f"{scale.ROW_BYTES / 1e9:.1f} TB/s", log],
        ["NVLink 4, each way, for a ring", f"{scale.NVLINK / 1e6:.0f} GB/s of 450", ring],
        ["all-reduce in the switches, 8 GPUs", f"{scale.NVLS / 1e6:.0f} GB/s (bus bandwidth)", "the same two"],
        ["InfiniBand NDR, a GPU", f"{scale.INFINIBAND / 1e6:.0f} GB/s", adapter],
        ["latency of a collective: once, a step in a node, between nodes", f"{steps} us", tuning],
        ["which gives for 2 and 16 GPUs", f"{scale.latency(2) * 1e3:.0f}, {scale.latency(16) * 1e3:.0f} us", reported],
        ["SMs that NCCL takes", f"{scale.COMM_SMS} of {scale.SMS}", channels],
        ["a product's tile", f"{scale.TILE[0]} x {scale.TILE[1]}", f"assumed: the fastest that was {log}"],
        ["merging of statistics, a chunk", small, "operators of the merging, counted on a CPU; the time assumed"],
        ["a backbone's backward", f"{scale.BACKBONE_TFLOPS} TFLOP/s a GPU", "assumed"],
        ["launches", "none is waited for", "assumed: the host is ahead, or the step is a CUDA graph"],
    ]
    return ["input", "value", "source"], lines, "H100 SXM, 8 to a node, each with an adapter"


TABLES: dict[str, Callable[[], Table]] = {
    "inputs": inputs_table,
    "volume": volume_table,
    "efficiency": efficiency_table,
    "parts": parts_table,
    "sums": sum_table,
    "peer": peer_table,
    "data": data_table,
}


def main() -> int:
    """Print every table."""
    for name, made in TABLES.items():
        head, lines, caption = made()
        print(f"\n{name}: {caption}", *(" | ".join(line) for line in (head, *lines)), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
