"""The keywords of a loss call: their types and defaults, once for every function that takes them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypedDict, TypeVar

import torch
from torch import Tensor

from ..errors import fail

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from ..divergences import Divergence

_F = TypeVar("_F", bound=Callable[..., Any])


class TokenOptions(TypedDict, total=False):
    """What `token_statistics` takes. See `linear_distribution_loss` for the meaning of each."""

    bias: Tensor | None
    low_rank: tuple[Tensor, Tensor] | None
    temperature: float
    logit_scale: float
    softcap: float | None
    ignore_index: int
    chunk_size: int | None
    memory_budget: int | None
    logits_dtype: torch.dtype | None
    compact: bool
    backend: str
    process_group: ProcessGroup | DeviceMesh | None
    sum_hidden_gradient: bool


class StatisticsOptions(TokenOptions, total=False):
    """What `linear_distribution_statistics` takes."""

    divergence: str | Divergence
    teacher_temperature: float | None
    group: Tensor | None
    num_groups: int
    features: Tensor | None
    row_weight: Tensor | None


class LossOptions(StatisticsOptions, total=False):
    """What `linear_distribution_loss` takes."""

    soft_weight: float
    hard_weight: float | None
    temperature_scaling: str
    label_smoothing: float
    z_loss: float
    potential: Tensor | None
    feature_weight: Tensor | None
    entropy_weight: Tensor | None
    reduction: str
    num_items: float | Tensor | None
    gradient_error: float | None
    return_metrics: bool | Collection[str]


DEFAULTS: LossOptions = {
    "bias": None,
    "low_rank": None,
    "divergence": "forward_kl",
    "soft_weight": 1.0,
    "hard_weight": None,
    "temperature": 1.0,
    "teacher_temperature": None,
    "temperature_scaling": "none",
    "label_smoothing": 0.0,
    "z_loss": 0.0,
    "logit_scale": 1.0,
    "softcap": None,
    "potential": None,
    "group": None,
    "num_groups": 1,
    "features": None,
    "feature_weight": None,
    "entropy_weight": None,
    "ignore_index": -100,
    "row_weight": None,
    "reduction": "mean",
    "num_items": None,
    "chunk_size": None,
    "memory_budget": None,
    "logits_dtype": None,
    "compact": True,
    "backend": "auto",
    "process_group": None,
    "sum_hidden_gradient": True,
    "gradient_error": None,
    "return_metrics": False,
}
LOSS = tuple(DEFAULTS)
STATISTICS = tuple(name for name in LOSS if name in StatisticsOptions.__annotations__)
TOKENS = tuple(name for name in LOSS if name in TokenOptions.__annotations__)
OF_LOGITS = tuple(  # of given logits
    name for name in LOSS if name not in ("bias", "low_rank", "logits_dtype", "gradient_error")
)


class Function(NamedTuple):
    """A public function, as its checks and errors know it."""

    name: str
    takes: tuple[str, ...] = LOSS  # options
    names: tuple[str, str, str] = ("hidden", "weight", "bias")  # what it calls these
    own: tuple[str, ...] = ()  # further keywords of its own
    projected: bool = True  # there is a weight; else `hidden` holds logits
    statistics: bool = False  # the row quantities themselves are the result
    labelled: bool = False  # target is not optional


def complete(function: Function, given: Mapping[str, Any]) -> LossOptions:
    """`given` with the defaults of all others. TypeError for a keyword that the function does not take."""
    check_names(function, given, function.takes)
    return {**DEFAULTS, **given}  # type: ignore[typeddict-item]


def untouched(given: Collection[str], names: Collection[str]) -> bool:
    """Whether a call has left all these options at their defaults."""
    return not given or all(name not in names for name in given)


def check_names(function: Function, given: Iterable[str], taken: tuple[str, ...]) -> None:
    """TypeError for a keyword that is not among `taken`."""
    for name in given:
        if name not in taken:
            _refuse(function, name)


def _refuse(function: Function, name: str) -> NoReturn:
    if name in ("bias", "low_rank") and not function.projected:
        fail(function.name, name, "be left out", "one", "Add it to the logits, or call the linear_ function", TypeError)
    known = [*filter(None, function.names[:2]), "target", "teacher", *function.own, *function.takes]
    near = function.names[2] if name == "bias" else (difflib.get_close_matches(name, known, 1, 0.5) or [""])[0]
    remedy = f"Did you mean {near}" if near else f"There are {', '.join(known)}"
    fail(function.name, name, "be a keyword that it takes", "one that it does not", remedy, TypeError)


def documented(function: Function) -> Callable[[_F], _F]:
    """Shows the options and their defaults in the signature of a public function that takes **options."""

    def decorate(called: _F) -> _F:
        known = inspect.signature(called)
        before = [p for p in known.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        defaults = {name: DEFAULTS[name] for name in function.takes}  # type: ignore[literal-required]
        kind = inspect.Parameter.KEYWORD_ONLY
        shown = [inspect.Parameter(name, kind, default=default) for name, default in defaults.items()]
        called.__signature__ = known.replace(parameters=[*before, *shown])  # type: ignore[attr-defined]
        return called

    return decorate
