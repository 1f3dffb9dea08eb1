"""Fused losses for fine-tuning language models towards distributions. See `linear_distribution_loss`.

The losses and teachers are imported with the package. What needs transformers (attach, DFTTrainer, capture, ...) and
the packages `terms`, `targets`, `divergences` and `testing` are imported when they are first asked for.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

from .backends.extension import release_scratch
from .loss.functional import (
    DistributionStatistics,
    cross_entropy,
    distribution_loss,
    linear_cross_entropy,
    linear_distribution_loss,
    linear_distribution_statistics,
    shift_labels,
)
from .loss.metrics import Metrics
from .loss.modules import LinearCrossEntropyLoss, LinearDistributionLoss
from .loss.tokens import TokenStatistics, token_statistics
from .teachers import Labels, LogitStream, Mixture, ServedTeacher, TeacherHead, TeacherLogits, TopK

if TYPE_CHECKING:
    from . import distributed, divergences, targets, terms, testing
    from .models.correction import CorrectionHead, add_correction, load_correction, remove_correction, save_correction
    from .store.reader import Store
    from .training.attach import DistributionOutput, attach, detach
    from .training.capture import capture
    from .training.collators import PrinciplesCollator
    from .training.trainer import DFTConfig, DFTTrainer

__version__ = "0.1.0"

_PACKAGES = ("distributed", "divergences", "targets", "terms", "testing")
_LATER = {  # public names that are imported when first asked for, and where from
    **dict.fromkeys(("attach", "detach", "DistributionOutput"), "training.attach"),
    **dict.fromkeys(("DFTConfig", "DFTTrainer"), "training.trainer"),
    "PrinciplesCollator": "training.collators",
    "capture": "training.capture",
    **dict.fromkeys(
        ("CorrectionHead", "add_correction", "load_correction", "remove_correction", "save_correction"),
        "models.correction",
    ),
    "Store": "store.reader",
}

__all__ = [
    "CorrectionHead",
    "DFTConfig",
    "DFTTrainer",
    "DistributionOutput",
    "DistributionStatistics",
    "Labels",
    "LinearCrossEntropyLoss",
    "LinearDistributionLoss",
    "LogitStream",
    "Metrics",
    "Mixture",
    "PrinciplesCollator",
    "ServedTeacher",
    "Store",
    "TeacherHead",
    "TeacherLogits",
    "TokenStatistics",
    "TopK",
    "add_correction",
    "attach",
    "capture",
    "cross_entropy",
    "detach",
    "distributed",
    "distribution_loss",
    "divergences",
    "linear_cross_entropy",
    "linear_distribution_loss",
    "linear_distribution_statistics",
    "load_correction",
    "release_scratch",
    "remove_correction",
    "save_correction",
    "shift_labels",
    "targets",
    "terms",
    "testing",
    "token_statistics",
]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return _import_module(f"{__name__}.{name}")
    if name in _LATER:
        found = globals()[name] = getattr(_import_module(f"{__name__}.{_LATER[name]}"), name)
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
