"""Fused losses for fine-tuning language models towards distributions. See `linear_distribution_loss`."""

from . import divergences, extension  # noqa: F401 - the import checks the build stamp
from .extension import release_scratch
from .functional import (
    DistributionStatistics,
    Metrics,
    cross_entropy,
    distribution_loss,
    linear_cross_entropy,
    linear_distribution_loss,
    linear_distribution_statistics,
    shift_labels,
)
from .modules import LinearCrossEntropyLoss, LinearDistributionLoss
from .teachers import LogitStream, TeacherHead, TeacherLogits

__version__ = "0.1.0"

__all__ = [
    "DistributionStatistics",
    "LinearCrossEntropyLoss",
    "LinearDistributionLoss",
    "LogitStream",
    "Metrics",
    "TeacherHead",
    "TeacherLogits",
    "cross_entropy",
    "distribution_loss",
    "divergences",
    "linear_cross_entropy",
    "linear_distribution_loss",
    "linear_distribution_statistics",
    "release_scratch",
    "shift_labels",
]
