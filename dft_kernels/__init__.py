"""Fused losses for fine-tuning language models towards distributions. See `linear_distribution_loss`.

Every public name is imported when it is first asked for: `import dft_kernels` costs nothing, `dft-kernels --help` needs
no torch, the losses need no transformers, and the compiled extensions are looked at with the first loss or teacher.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import distributed, divergences, targets, terms, testing
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
    from .models.correction import CorrectionHead, add_correction, load_correction, remove_correction, save_correction
    from .store.reader import Store
    from .teachers import Labels, LogitStream, Mixture, ServedTeacher, TeacherHead, TeacherLogits, TopK
    from .training.attach import DistributionOutput, attach, detach
    from .training.capture import capture
    from .training.collators import PrinciplesCollator
    from .training.trainer import DFTConfig, DFTTrainer

__version__ = "0.1.0"

OLDEST_TORCH = (2, 11)
_PACKAGES = ("distributed", "divergences", "targets", "terms", "testing")
_FROM = {  # the same imports, for __getattr__
    "backends.extension": ("release_scratch",),
    "loss.functional": (
        "DistributionStatistics", "cross_entropy", "distribution_loss", "linear_cross_entropy",
        "linear_distribution_loss", "linear_distribution_statistics", "shift_labels",
    ),
    "loss.metrics": ("Metrics",),
    "loss.modules": ("LinearCrossEntropyLoss", "LinearDistributionLoss"),
    "loss.tokens": ("TokenStatistics", "token_statistics"),
    "models.correction": (
        "CorrectionHead", "add_correction", "load_correction", "remove_correction", "save_correction",
    ),
    "store.reader": ("Store",),
    "teachers": ("Labels", "LogitStream", "Mixture", "ServedTeacher", "TeacherHead", "TeacherLogits", "TopK"),
    "training.attach": ("DistributionOutput", "attach", "detach"),
    "training.capture": ("capture",),
    "training.collators": ("PrinciplesCollator",),
    "training.trainer": ("DFTConfig", "DFTTrainer"),
}  # fmt: skip
_WHERE = {name: module for module, names in _FROM.items() for name in names}

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


def require_torch() -> None:
    """ImportError that says what to do, where a deep import would end in whatever an older torch lacks."""
    try:
        import torch
    except (ImportError, OSError) as error:
        raise ImportError(f"dft_kernels: torch must be importable, got: {error}. Run dft-kernels doctor.") from error
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise ImportError(
            f"dft_kernels: torch must be {oldest} or newer, got {torch.__version__}. Run pip install 'torch>={oldest}'."
        )


def __getattr__(name: str) -> Any:
    if name in _PACKAGES or name in _WHERE:
        require_torch()
    if name in _PACKAGES:
        return _import_module(f"{__name__}.{name}")
    if name in _WHERE:
        found = globals()[name] = getattr(_import_module(f"{__name__}.{_WHERE[name]}"), name)
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
