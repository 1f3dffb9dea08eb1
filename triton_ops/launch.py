"""Launch options and block sizes of the kernels."""

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


def row_block(vocab: int, compared: bool, much: bool) -> int:
    """The block of the row kernel. compared: with a target; much: more than one accumulator a logit, or a softcap."""
    block = ROW_BLOCK_MUCH if much else ROW_BLOCK_COMPARED if compared else ROW_BLOCK
    return min(block, max(128, triton.next_power_of_2(vocab)))


def launch(kernel: Any, grid: tuple[int, ...], where: Tensor, *arguments: Any, **constants: Any) -> None:
    """Launch on the current stream of the device of `where`, whatever device is current. An empty grid is no launch."""
    if min(grid) == 0:
        return
    guard: AbstractContextManager[Any] = torch.cuda.device(where.device) if where.is_cuda else nullcontext()
    with guard:
        kernel[grid](*arguments, **OPTIONS, **constants)
