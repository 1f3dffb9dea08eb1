"""The three matrix products of a chunk, all accumulated in fp32 (fp64 for fp64 inputs).

    logits  [R, V] = hidden [R, H] @ weight.T [H, V] + bias     kept in the accumulation dtype, or rounded once
    dhidden [R, H] = dlogits [R, V] @ weight [V, H]             rounded once, to the input dtype
    dweight [V, H] += dlogits.T [V, R] @ hidden [R, H]          kept in the accumulation dtype, or rounded once

2 R H V FLOP each. A low-rank pair, down [R, r] and up [V, r], is a second hidden and weight of width r. On CUDA a
16-bit product is asked for its fp32 accumulator. Elsewhere the operands are upcast one block of the vocabulary at a
time, so the extra memory is a block and never a second weight.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_UPCAST_BYTES = 8 << 20  # fp32 copy of one vocabulary block
_TILE = {"cpu": 1 << 20}  # logits that temporaries of their size exist of at a time
_TILE_ELSEWHERE = 1 << 25


def _narrow(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16)


def _accumulates(tensor: Tensor) -> bool:
    """Whether products in its dtype accumulate in fp32: those in bf16 do on every device."""
    return tensor.dtype != torch.float16 or tensor.is_cuda


def _blocks(weight: Tensor) -> Iterator[slice]:
    """Slices of the vocabulary [V] whose fp32 copy [block, H] stays within `_UPCAST_BYTES`."""
    step = max(1, _UPCAST_BYTES // (4 * max(1, weight.shape[1])))
    for start in range(0, weight.shape[0], step):
        yield slice(start, start + step)


def tiles(rows: Tensor, vocab: int | None = None) -> Iterator[slice]:
    """Slices of the rows of logits [R, V], of as many as may have temporaries of their size at a time; vocab: V, where
    `rows` are not logits."""
    step = max(1, _TILE.get(rows.device.type, _TILE_ELSEWHERE) // max(1, vocab or rows.shape[1]))
    return (slice(start, start + step) for start in range(0, rows.shape[0], step))


def logits_(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """out [R, V] = hidden [R, H] @ weight.T + bias, `out` in the accumulation dtype or that of `hidden`."""
    if _narrow(out) and _accumulates(out):
        return torch.mm(hidden, weight.t(), out=out) if bias is None else torch.addmm(bias, hidden, weight.t(), out=out)
    if not _narrow(hidden):
        torch.mm(hidden, weight.t(), out=out)
    elif hidden.is_cuda:
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    else:
        wide = hidden.float()
        for block in _blocks(weight):
            into = out[:, block] if not _narrow(out) else wide.new_empty(len(out), len(weight[block]))
            torch.mm(wide, weight[block].float().t(), out=into)
            if bias is not None:
                into += bias[block]
            if _narrow(out):
                out[:, block] = into
        return out
    return out if bias is None else out.add_(bias)


def add_product_(down: Tensor, up: Tensor, out: Tensor) -> Tensor:
    """out [R, V] += down [R, r] @ up.T, `out` in the accumulation dtype or that of `down`."""
    if not _narrow(down) or (_narrow(out) and _accumulates(out)):
        return out.addmm_(down, up.t())
    if down.is_cuda:
        return torch.addmm(out, down, up.t(), out_dtype=out.dtype, out=out)
    wide = down.float()
    for block in _blocks(up):
        out[:, block] += wide @ up[block].float().t()
    return out


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """left [m, k] @ right [k, n] in the accumulation dtype."""
    if not _narrow(left):
        return left @ right
    return torch.mm(left, right, out_dtype=torch.float32) if left.is_cuda else left.float() @ right.float()


def dhidden_(dlogits: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """out [R, H] = dlogits [R, V] @ weight [V, H], `out` in the input dtype."""
    if _accumulates(dlogits):
        return torch.mm(dlogits, weight, out=out)
    wide = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    for block in _blocks(weight):
        wide.addmm_(dlogits[:, block].float(), weight[block].float())
    return out.copy_(wide)


def dweight_(dlogits: Tensor, hidden: Tensor, out: Tensor, *, accumulate: bool) -> Tensor:
    """out [V, H] (+)= dlogits.T [V, R] @ hidden [R, H]; `out` in the accumulation dtype, or in the input dtype
    where a single chunk makes the accumulator unnecessary."""
    if out.dtype == hidden.dtype:
        return torch.addmm(out, dlogits.t(), hidden, beta=1.0 if accumulate else 0.0, out=out)
    if hidden.is_cuda:
        if accumulate:
            return torch.addmm(out, dlogits.t(), hidden, out_dtype=out.dtype, out=out)
        return torch.mm(dlogits.t(), hidden, out_dtype=out.dtype, out=out)
    wide = hidden.to(out.dtype)
    for block in _blocks(out):
        product = dlogits[:, block].to(out.dtype).t()
        out[block].addmm_(product, wide, beta=1.0 if accumulate else 0.0)
    return out


def add_products_(out: Tensor, index: Tensor, left: Tensor, right: Tensor) -> float:
    """out [V, H] at `index` [n], each of them once: += left [n, R] @ right [R, H]; by how much that changes the sum of
    squares of `out`, which is in the accumulation dtype, or in the input dtype and 0 there."""
    change = torch.zeros((), dtype=torch.float64, device=out.device)
    for some in tiles(left, vocab=out.shape[1]):
        product = wide_product(left[some], right)
        before = out.index_select(0, index[some]).to(product.dtype)
        after = before + product
        out.index_copy_(0, index[some], after.to(out.dtype))
        change += (product * after.add_(before)).sum(dtype=torch.float64)  # after^2 - before^2
    return float(change)
