"""Launch options and block sizes of the kernels."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

# 128 threads a program and at most 96 registers a thread: at least five resident programs a multiprocessor. Without an
# explicit limit ptxas chooses one and spills a few bytes to stay below it. (AMD's compiler has no such option.)
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
if torch.version.hip is None:
    OPTIONS["maxnreg"] = 96
# Logits a step of the row kernel: 16, 8 or 4 a thread, so that the accumulators of each fit into the registers without
# spills. bench/LOG.md has the measurements.
ROW_BLOCK, ROW_BLOCK_COMPARED, ROW_BLOCK_MUCH = 2048, 1024, 512
COLUMN_BLOCK, COLUMN_ROWS = 256, 8
SCALE_BLOCK = 4096
SPREAD_SEGMENTS = 8  # of the rows, so that the blocks of columns fill the device
# The products of `active`: a tile [M, N] of the result a program, K a step. In 16 bits three buffers take 145 KB of the
# shared memory, which an A100 and its successors have; elsewhere, and in 32 bits, two of smaller tiles take 32 or 64.
PRODUCT, PRODUCT_STAGES, PRODUCT_MEMORY = {"M": 128, "N": 256, "K": 64}, 3, 146 << 10
PRODUCT_SMALL, PRODUCT_SMALL_STAGES = {"M": 128, "N": 128, "K": 32}, 2


def row_block(vocab: int, compared: bool, much: bool) -> int:
    """The block of the row kernel. compared: with a target; much: more than one accumulator a logit, or a softcap."""
    block = ROW_BLOCK_MUCH if much else ROW_BLOCK_COMPARED if compared else ROW_BLOCK
    return min(block, max(128, triton.next_power_of_2(vocab)))


def roomy(left: Tensor) -> bool:
    """Whether a product with `left` may have the large tile."""
    if not left.is_cuda or left.element_size() != 2:
        return False
    properties = torch.cuda.get_device_properties(left.device)
    return getattr(properties, "shared_memory_per_block_optin", 0) >= PRODUCT_MEMORY


def product_tile(left: Tensor, gathers: bool) -> dict[str, Any]:
    """The blocks and options of a product with `left`, and its precision: in fp32 what torch's own products have.
    gathers: rows of the other operand are loaded by numbers that are loaded."""
    large = roomy(left)
    stages = (PRODUCT_STAGES if large else PRODUCT_SMALL_STAGES) + 2 * gathers  # two more, which take no buffer
    return {
        **(PRODUCT if large else PRODUCT_SMALL),
        "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
        "WIDE": left.device.type == "cpu",  # Triton's interpreter takes bf16 for integers
        "options": {"num_warps": 8, "num_stages": stages, "enable_fp_fusion": True},
    }


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    where: Tensor,
    *arguments: Any,
    options: Mapping[str, Any] = OPTIONS,
    **constants: Any,
) -> None:
    """Launch on the current stream of the device of `where`, whatever device is current. An empty grid is no launch."""
    if min(grid) == 0:
        return
    guard: AbstractContextManager[Any] = torch.cuda.device(where.device) if where.is_cuda else nullcontext()
    with guard:
        kernel[grid](*arguments, **options, **constants)
