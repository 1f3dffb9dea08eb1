"""Other libraries' losses, each at the settings that its own documentation gives as the default or the best."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .implementations import Call, Implementation, Unavailable, ours, written
from .problems import HARD_WEIGHT, Case

_TEACHER_HEAD = ("forward_kl", "reverse_kl", "jensen_shannon")
_BETA = {"forward_kl": 0.0, "ce_and_kl": 0.0, "reverse_kl": 1.0, "jensen_shannon": 0.5}  # of generalised JSDs


def _needs_gpu(case: Case, who: str) -> None:
    if case.device != "cuda":
        raise Unavailable(f"{who} needs a GPU")


def _load(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


# ---- torch ----


def _torch(chunked: bool) -> Callable[[Case], Call]:
    def prepare(case: Case) -> Call:
        if not hasattr(F, "linear_cross_entropy"):
            raise Unavailable(f"torch {torch.__version__} has no F.linear_cross_entropy (2.13 has)")
        options = torch.nn.LinearCrossEntropyOptions() if chunked else None
        return lambda x: F.linear_cross_entropy(x.hidden, x.weight, x.target, options=options)

    return prepare


# ---- Liger-Kernel ----


def _liger_cross_entropy(case: Case) -> Call:
    _needs_gpu(case, "Liger's Triton kernel")
    loss = _load("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")()
    return lambda x: loss(x.weight, x.hidden, x.target)


def _liger_jsd(case: Case) -> Call:
    _needs_gpu(case, "Liger's Triton kernel")
    loss = _load("liger_kernel.transformers", "LigerFusedLinearJSD")(jsd_beta=_BETA[case.loss])
    return lambda x: loss(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, None)


def _liger_kl(case: Case) -> Call:
    _needs_gpu(case, "Liger's Triton kernel")
    loss = _load("liger_kernel.transformers.fused_linear_kl_div", "LigerFusedLinearKLDivLoss")()
    return lambda x: loss(x.hidden, x.weight, x.teacher_probabilities)


def _liger_chunked(compiled: bool) -> Callable[[Case], Call]:
    def prepare(case: Case) -> Call:
        loss = _load("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")(
            weight_hard_loss=HARD_WEIGHT if case.loss == "ce_and_kl" else 0.0,
            weight_soft_loss=1.0,
            beta=_BETA[case.loss],
            compiled=compiled,
        )
        return lambda x: loss(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, x.target)

    return prepare


# ---- Cut Cross-Entropy ----


def _cut(implementation: str, **settings: Any) -> Callable[[Case], Call]:
    def prepare(case: Case) -> Call:
        if implementation != "torch_compile":
            _needs_gpu(case, "CCE's Triton kernel")
        names = [each.name.lower() for each in _load("cut_cross_entropy", "LinearCrossEntropyImpl")]
        loss = _load("cut_cross_entropy", "linear_cross_entropy")
        if implementation not in names:
            raise Unavailable(f"this cut-cross-entropy has no {implementation}, only {', '.join(names)}")
        return lambda x: loss(x.hidden, x.weight, x.target, impl=implementation, **settings)

    return prepare


# ---- QuACK ----


def _quack(case: Case) -> Call:
    _needs_gpu(case, "QuACK")
    if torch.cuda.get_device_capability()[0] < 9:
        raise Unavailable("QuACK needs a GPU of capability 9.0 or newer")
    loss = _load("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    return lambda x: loss(x.hidden, x.weight, x.target)


# ---- TRL ----


def _trl(case: Case) -> Call:
    divergence = _load("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction")
    beta = _BETA[case.loss]
    return lambda x: divergence.apply(
        x.hidden, x.weight, None, x.teacher_hidden, x.teacher_weight, None, beta
    )[0].mean()  # fmt: skip


def peers() -> list[Implementation]:
    """Every other library's."""
    ce = ("cross_entropy",)
    cut, liger = "cut-cross-entropy", "liger-kernel"
    chunked = (*_TEACHER_HEAD, "ce_and_kl")
    return [
        Implementation("F.linear_cross_entropy", "torch", ce, _torch(False)),
        Implementation("F.linear_cross_entropy, options", "torch", ce, _torch(True)),
        Implementation("Liger FLCE", liger, ce, _liger_cross_entropy),
        Implementation("Liger fused_linear_jsd", liger, _TEACHER_HEAD, _liger_jsd),
        Implementation("Liger FusedLinearKLDiv", liger, ("stored_kl",), _liger_kl),
        Implementation("Liger chunked, compiled", liger, chunked, _liger_chunked(True), compiled=True),
        Implementation("Liger chunked", liger, chunked, _liger_chunked(False)),
        Implementation("CCE", cut, ce, _cut("cce")),
        Implementation("CCE without filter", cut, ce, _cut("cce", filter_eps=None)),
        Implementation("CCE exact", cut, ce, _cut("cce_exact")),
        Implementation("CCE kahan", cut, ce, _cut("cce_kahan")),
        Implementation("CCE torch_compile", cut, ce, _cut("torch_compile"), compiled=True),
        Implementation("QuACK", "quack-kernels", ce, _quack),
        Implementation("TRL chunked_divergence", "trl", _TEACHER_HEAD, _trl),
    ]


def everyone() -> dict[str, Implementation]:
    """All implementations by name, ours first."""
    return {each.name: each for each in (*ours(), *written(), *peers())}
