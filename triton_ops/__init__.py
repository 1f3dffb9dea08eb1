"""Row kernels in Triton: statistics and gradients of rows of logits against labels and target distributions.

Imports torch and triton only. Logits of any floating dtype, arithmetic and statistics in fp32, 64-bit row offsets.
With `TRITON_INTERPRET=1` set before this is imported, the same kernels run on CPU tensors.
"""

from .columns import accumulate_columns, probabilities
from .row_kernel import STATISTICS
from .rows import Rows, row_divergence, row_gradient, row_statistics, row_step
from .scaling import scale

__all__ = [
    "STATISTICS",
    "Rows",
    "accumulate_columns",
    "probabilities",
    "row_divergence",
    "row_gradient",
    "row_statistics",
    "row_step",
    "scale",
]
