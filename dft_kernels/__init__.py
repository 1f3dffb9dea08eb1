"""Fused losses for fine-tuning language models towards distributions. See `linear_distribution_loss`."""

from . import divergences, extension  # noqa: F401 - the import checks the build stamp
from .extension import release_scratch
from .functional import (
    DistributionStatistics,
    cross_entropy,
    distribution_loss,
    linear_cross_entropy,
    linear_distribution_loss,
    linear_distribution_statistics,
    shift_labels,
)
from .metrics import Metrics
from .mixture import Labels, Mixture
from .modules import LinearCrossEntropyLoss, LinearDistributionLoss
from .streams import LogitStream
from .teachers import TeacherHead, TeacherLogits, TopK

__version__ = "0.1.0"

__all__ = [
    "DistributionStatistics",
    "Labels",
    "LinearCrossEntropyLoss",
    "LinearDistributionLoss",
    "LogitStream",
    "Metrics",
    "Mixture",
    "TeacherHead",
    "TeacherLogits",
    "TopK",
    "cross_entropy",
    "distribution_loss",
    "divergences",
    "linear_cross_entropy",
    "linear_distribution_loss",
    "linear_distribution_statistics",
    "release_scratch",
    "shift_labels",
]
