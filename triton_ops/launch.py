"""How the kernels are launched: one way, and block sizes from a small table."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

# 128 threads a program and at most 96 registers a thread: five programs a multiprocessor at the least. Said outright,
# for without a limit ptxas guesses one and spills a few bytes to stay below it. (AMD's compiler takes no such option.)
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
if torch.version.hip is None:
    OPTIONS["maxnreg"] = 96
# Logits that a program of the row kernel takes at a time: 16, 8 or 4 a thread, so that what a lane keeps for each of
# them fits the registers, and none spills. bench/LOG.md has the table they come from.
ROW_BLOCK, ROW_BLOCK_COMPARED, ROW_BLOCK_MUCH = 2048, 1024, 512
COLUMN_BLOCK, COLUMN_ROWS = 256, 8


def row_block(vocab: int, compared: bool, much: bool) -> int:
    """The block of the row kernel. compared: with a target; much: and with more than one sum a lane, or a softcap."""
    block = ROW_BLOCK_MUCH if much else ROW_BLOCK_COMPARED if compared else ROW_BLOCK
    return min(block, max(128, triton.next_power_of_2(vocab)))


def launch(kernel: Any, grid: tuple[int, ...], where: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run on the current stream of the device of `where`, whatever device is current. An empty grid: nothing."""
    if min(grid) == 0:
        return
    guard: AbstractContextManager[Any] = torch.cuda.device(where.device) if where.is_cuda else nullcontext()
    with guard:
        kernel[grid](*arguments, **OPTIONS, **constants)
