"""The one table of cases that every backend runs, and how a case becomes tensors."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import torch

from dft_kernels import (
    Labels,
    LogitStream,
    Mixture,
    TeacherHead,
    TeacherLogits,
    TopK,
    divergences,
    linear_distribution_loss,
)
from dft_kernels.backends import BACKENDS
from dft_kernels.testing import allowance, conditions, dense_loss, one_after_the_other, relative_error

NAMES = tuple(divergences.TABLE)


def present(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[str]:
    """The backends that run here, on the CPU with Triton's interpreter included (conftest.py)."""
    return [name for name, b in BACKENDS.items() if b.unavailable(torch.device(device), dtype) is None]


PRESENT = present()


class Case(NamedTuple):
    name: str
    shape: tuple[int, int, int] = (29, 12, 101)  # N, H, V
    options: dict[str, Any] = {}  # noqa: RUF012
    teacher: str = ""  # "", logits, head, stream, near (a head that nearly agrees with the model's), mixture,
    # log_mixture, padded; topk, topk_near, topk_sum (its tail from the sum), renormalise, ignore, all (k = V)
    target: str = "some"  # none (no target), some, all_valid, all_ignored
    tensors: tuple[str, ...] = ()  # of bias, row_weight, potential, group, features, entropy, low_rank
    rank: int = 4
    hard: bool = True


def table() -> list[Case]:
    cases = [
        Case("cross_entropy"),
        Case("cross_entropy_bias", tensors=("bias",)),
        Case("label_smoothing", options={"label_smoothing": 0.1}),
        Case("z_loss", options={"z_loss": 1e-2}),
        Case("scale_softcap", options={"logit_scale": 0.5, "softcap": 3.0}, tensors=("bias",), teacher="logits"),
        Case("row_weight", tensors=("row_weight",)),
        Case("potential", tensors=("potential", "group")),
        Case("potential_alone", tensors=("potential",), target="none"),
        Case("features", tensors=("features",)),
        Case("features_alone", tensors=("features", "row_weight"), target="none", options={"reduction": "sum"}),
        Case("entropy", tensors=("entropy",)),
        Case("entropy_alone", tensors=("entropy", "bias"), target="none"),
        Case("every_statistic", teacher="head", tensors=("features", "entropy", "potential", "group", "row_weight")),
        Case(
            "every_statistic_rows",
            teacher="topk",
            tensors=("features", "entropy", "potential"),
            options={"reduction": "none", "compact": False, "temperature": 1.3},
        ),
        Case("sum", options={"reduction": "sum"}, teacher="head"),
        Case("num_items", options={"num_items": 17}, teacher="head"),
        Case("none", options={"reduction": "none"}, teacher="head", tensors=("row_weight", "bias")),
        Case("no_compact", options={"compact": False}, teacher="head", tensors=("row_weight", "group", "potential")),
        Case("no_compact_none", options={"compact": False, "reduction": "none"}, teacher="head"),
        Case("stream", teacher="stream", options={"temperature": 2.0}),
        Case("low_rank", tensors=("low_rank",)),
        Case("low_rank_odd", tensors=("low_rank", "bias"), teacher="head", rank=3),
        Case("low_rank_rows", tensors=("low_rank",), teacher="head", rank=1, options={"reduction": "none"}),
        Case("low_rank_all_valid", tensors=("low_rank",), teacher="logits", target="all_valid"),
        Case("low_rank_none_left", tensors=("low_rank",), target="all_ignored"),
        Case("low_rank_topk", tensors=("low_rank",), teacher="topk", options={"temperature": 1.3}),
        Case(
            "low_rank_wide", shape=(70, 64, 5003), tensors=("low_rank", "potential", "group"), teacher="head", rank=16
        ),
        Case("no_target", teacher="logits", target="none"),
        Case("all_ignored", teacher="logits", target="all_ignored"),
        Case("all_valid", teacher="head", target="all_valid"),
        Case("one_class", shape=(5, 3, 1), teacher="logits"),
        Case("one_row", shape=(1, 7, 13), teacher="head", target="all_valid"),
        Case("no_rows", shape=(0, 7, 13), teacher="logits"),
        Case("wide", shape=(7, 64, 5003), teacher="head", tensors=("bias",)),
        Case(
            "everything",
            teacher="head",
            tensors=("bias", "row_weight", "potential", "group"),
            options={
                "hard_weight": 0.3,
                "soft_weight": 0.7,
                "temperature": 2.0,
                "teacher_temperature": 1.5,
                "temperature_scaling": "squared",
                "label_smoothing": 0.05,
                "z_loss": 1e-3,
                "logit_scale": 0.8,
                "softcap": 10.0,
                "divergence": divergences.jensen_shannon(0.3),
            },
        ),
    ]
    everything = cases[-1]
    cases += [
        Case("topk", teacher="topk"),
        Case("topk_alone", teacher="topk", target="none"),
        Case("topk_sum", teacher="topk_sum", target="none"),
        Case("topk_temperature", teacher="topk", options={"temperature": 2.0}, target="none"),
        Case("topk_two_temperatures", teacher="topk", options={"temperature": 2.0, "teacher_temperature": 1.0}),
        Case(
            "topk_rows", teacher="topk", options={"reduction": "none", "z_loss": 1e-2}, tensors=("row_weight", "bias")
        ),
        Case("topk_no_compact", teacher="topk", options={"compact": False}, tensors=("row_weight",)),
        Case("topk_scaled", teacher="topk", options={"logit_scale": -0.7}, tensors=("bias",)),
        Case("topk_capped", teacher="topk", options={"softcap": 3.0, "logit_scale": 0.7, "temperature": 1.3}),
        Case("topk_everything", teacher="topk", tensors=everything.tensors, options=everything.options),
        Case("topk_unweighted", teacher="topk", options={"soft_weight": 0.0}),
        Case("topk_all", teacher="all", target="none"),
        Case("renormalise", teacher="renormalise", options={"temperature": 2.0}),
        Case("ignore", teacher="ignore"),
        Case("ignore_reverse", teacher="ignore", options={"divergence": "reverse_kl"}),
        Case("topk_wide", shape=(7, 64, 5003), teacher="topk", tensors=("bias",)),
        Case("topk_one_class", shape=(5, 3, 1), teacher="all"),
        Case("topk_all_ignored", teacher="topk", target="all_ignored"),
        Case("mixture", teacher="mixture", options={"temperature": 1.5}, target="all_valid"),
        Case("log_mixture", teacher="log_mixture", options={"divergence": "reverse_kl"}),
        Case("padded", teacher="padded"),
    ]
    for name in NAMES:
        cases.append(Case(f"topk_{name}", teacher="topk", options={"divergence": name}, hard=False))
        if name != "total_variation":
            cases.append(Case(f"topk_near_{name}", teacher="topk_near", options={"divergence": name}, hard=False))
    for name in (name for name in NAMES if name != "total_variation"):  # whose gradient jumps at p = q
        cases.append(
            Case(f"near_{name}", shape=(23, 12, 997), teacher="near", options={"divergence": name}, hard=False)
        )
    for name in NAMES:
        cases.append(Case(name, teacher="head", options={"divergence": name, "temperature": 1.7}))
    for chosen in (
        divergences.jensen_shannon(0.9),
        divergences.skew_kl(0.7),
        divergences.skew_reverse_kl(0.7),
        divergences.alpha_divergence(2.0),
        divergences.alpha_divergence(-0.5),
    ):
        cases.append(Case(f"{chosen.name}_{chosen.parameter}", teacher="logits", options={"divergence": chosen}))
    return cases


CASES = {case.name: case for case in table()}


def make(case: Case, dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
    """The arguments of a case: hidden, weight (and bias) require grad."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    n, h, v = case.shape

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype).to(device)

    out: dict[str, Any] = {"hidden": normal(n, h), "weight": normal(v, h, scale=0.5), **case.options}
    if case.target != "none":
        target = torch.randint(0, v, (n,), generator=generator)
        if case.target == "some":
            target[1::3] = -100
        if case.target == "all_ignored":
            target[:] = -100
        out["target"] = target.to(device)
    if case.teacher == "head":
        out["teacher"] = TeacherHead(normal(n, h + 5), normal(v, h + 5, scale=0.5), normal(v), 0.7, 8.0)
    elif case.teacher == "near":  # KL of about 1e-3 for fp32, and what rounding leaves for the narrow dtypes
        out["teacher"] = TeacherHead(out["hidden"] + normal(n, h, scale=0.02), out["weight"].clone())
    elif case.teacher:
        out["teacher"] = _teacher(case, out, normal)
        if case.hard and case.target != "none" and "hard_weight" not in out:
            out["hard_weight"] = 0.4
    if "bias" in case.tensors:
        out["bias"] = normal(v)
    if "low_rank" in case.tensors:
        out["low_rank"] = (normal(n, case.rank), normal(v, case.rank, scale=0.5))
    if "row_weight" in case.tensors:
        weights = torch.rand(n, generator=generator)
        weights[:2] = 0.0
        out["row_weight"] = weights.to(device)
    groups = 3 if "group" in case.tensors else 1
    if "potential" in case.tensors:
        out["potential"] = (1 + torch.randn(groups, v, generator=generator)).to(device)  # its mean does not cancel
    if "group" in case.tensors:
        out["group"] = torch.randint(0, groups, (n,), generator=generator).to(device)
        out["num_groups"] = groups
    if "features" in case.tensors:
        features = torch.randn(v, 3, generator=generator) * (torch.rand(v, 3, generator=generator) < 0.3)
        out["features"] = features.to(device)
        out["feature_weight"] = torch.randn(n, 3, generator=generator).to(device)
    if "entropy" in case.tensors:
        out["entropy_weight"] = torch.randn(n, generator=generator).to(device)
    for leaf in leaves(out):
        leaf.requires_grad_()
    return out


def _teacher(case: Case, out: dict[str, Any], normal: Any) -> Any:
    n, h, v = case.shape
    logits = normal(n, v, scale=2.0)
    if case.teacher == "logits":
        return TeacherLogits(logits)
    if case.teacher == "stream":
        return LogitStream(lambda rows: logits[rows])
    if case.teacher == "mixture":
        head = TeacherHead(normal(n, h), normal(v, h, scale=0.5), normal(v), 0.7, 8.0)
        top = top_k(logits.flip(0), min(5, v), 1.0, tail="renormalise")
        return Mixture([Labels(), logits, head, LogitStream(lambda rows: logits[rows]), top], [0.1, 0.2, 0.3, 0.2, 0.2])
    if case.teacher == "log_mixture":
        return Mixture([logits, normal(n, v)], [1.3, -0.3], kind="log_linear")
    if case.teacher == "padded":
        return TeacherHead(normal(n, h), normal(v + 27, h), normal(v + 27), vocab_size=v)
    if case.teacher == "topk_near":  # the model's own, off by a little
        model = torch.nn.functional.linear(out["hidden"].double(), out["weight"].double())
        logits = (model + normal(n, v, scale=0.02).double()).to(logits.dtype)
    temperature = out.get("teacher_temperature", out.get("temperature", 1.0))
    if case.teacher == "renormalise":
        return top_k(logits, min(7, v), 1.0, tail="renormalise")
    with_tail = case.teacher in ("topk", "topk_near")
    k = v if case.teacher == "all" else min(7, v)
    return top_k(logits, k, temperature, with_tail, "ignore" if case.teacher == "ignore" else "bucket")


def top_k(logits: torch.Tensor, k: int, temperature: float = 1.0, with_tail: bool = True, tail: str = "bucket") -> TopK:
    """What a capture keeps of a teacher's logits, in their dtype."""
    log_p = (logits.double() / temperature).log_softmax(-1)
    top = log_p.topk(k, dim=-1)
    rest = log_p.scatter(-1, top.indices, -torch.inf).logsumexp(-1)
    kept = rest.to(logits.dtype) if with_tail else None
    return TopK(top.indices, top.values.to(logits.dtype), kept, temperature, tail)


def leaves(arguments: dict[str, Any]) -> list[torch.Tensor]:
    names = [name for name in ("hidden", "weight", "bias") if name in arguments]
    return [*(arguments[name] for name in names), *arguments.get("low_rank", ())]


def oracle_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    drop = ("chunk_size", "memory_budget", "backend", "compact", "num_groups", "return_metrics")
    return {name: value for name, value in arguments.items() if name not in drop}


def differentiate(loss: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    seed = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype, device=loss.device).reshape(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, inputs, seed)]


class Judged(NamedTuple):
    """One result of a case through a backend, the oracle's, and the relative error that it is allowed."""

    name: str
    value: torch.Tensor
    exact: torch.Tensor
    condition: float
    allowed: float

    @property
    def error(self) -> float:
        return relative_error(self.value, self.exact)


CONDITIONS: dict[tuple[str, torch.dtype, str], list[float]] = {}  # of cases judged before


def exactly(arguments: dict[str, Any]) -> list[torch.Tensor]:
    """Loss and gradients of the float64 oracle."""
    wide = dict(arguments)
    for name in ("hidden", "weight", "bias"):
        if name in wide:
            wide[name] = wide[name].detach().double().requires_grad_()
    if "low_rank" in wide:
        wide["low_rank"] = tuple(part.detach().double().requires_grad_() for part in wide["low_rank"])
    return differentiate(dense_loss(**wide), leaves(wide))


def judge(case: Case, dtype: torch.dtype, backend: str, device: str = "cpu", **options: object) -> list[Judged]:
    """Loss and gradients of one case through one backend, each with the error gate of `testing.allowance`."""
    arguments = make(case, dtype, device)
    ours = differentiate(linear_distribution_loss(**{**arguments, "backend": backend, **options}), leaves(arguments))
    return judged(case, arguments, ours, options.get("chunk_size") == 1)


def judged(case: Case, arguments: dict[str, Any], ours: list[torch.Tensor], one_row: bool = False) -> list[Judged]:
    """Loss and gradients `ours` of a case, against the oracle's of the same arguments. one_row: of chunks of one."""
    dtype, device = arguments["hidden"].dtype, arguments["hidden"].device.type
    plain = oracle_arguments(arguments)
    exact, key = exactly(plain), (repr(case), dtype, device)
    if key not in CONDITIONS:
        CONDITIONS[key] = conditions(exactly, plain, exact)
    n, h, v = case.shape
    over_vocab = one_after_the_other(v) if n == 1 or one_row else v  # a product with a vector
    last = {"loss": n, "dhidden": over_vocab, "dweight": n}
    last |= {"dbias": n} if "bias" in arguments else {}
    last |= {"ddown": over_vocab, "dup": n} if "low_rank" in arguments else {}
    out = []
    for name, value, truth, condition in zip(last, ours, exact, CONDITIONS[key], strict=True):
        gate = allowance(truth, value.dtype, condition, (h, v, last[name]))
        if dtype == torch.float64:  # the oracle rounds too, and its textbook formulas cancel where p and q agree
            gate = 1e-11 if name == "loss" and case.teacher in ("near", "topk_near") else 1e-12
        out.append(Judged(name, value, truth, condition, gate))
    return out


def compare(
    case: Case, dtype: torch.dtype, backend: str, slack: float = 0.0, device: str = "cpu", **options: object
) -> None:
    """One case through one backend: loss and gradients within the error gate (and slack) of the float64 oracle."""
    for judged in judge(case, dtype, backend, device, **options):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert judged.value.dtype == (wide if judged.name == "loss" else dtype)
        error, gate = judged.error, judged.allowed
        if slack:  # of values of the size of 1, where these are smaller than that
            error, gate = error * min(1.0, 100 * float(judged.exact.norm()) or 1.0), gate + slack
        assert error <= gate, f"{judged.name}: error {error:.2e}, allowed {gate:.2e}"
