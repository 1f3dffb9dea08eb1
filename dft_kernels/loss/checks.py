"""The vocabulary of `problem.py`: single checks that raise the one form of message users of this package see.

FUNCTION: ARGUMENT must RELATION, got VALUE. REMEDY.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .. import backends
from ..divergences import TABLE, Divergence
from ..errors import fail
from ..teachers.contract import Head, Source
from ..teachers.head import TeacherHead
from ..teachers.logits import TeacherLogits
from ..teachers.mixture import Given, Labels, Mixture
from ..teachers.stream import LogitStream
from ..teachers.top_k import TAILS, TopK

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Cast as `F.linear` would under an active autocast of the tensors' device: all but fp64 to its dtype."""
    device = next((t.device.type for t in tensors if isinstance(t, Tensor)), "cpu")
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def pair(function: str, value: Any) -> tuple[Any, Any]:
    """What low_rank holds: two tensors, or nothing."""
    if value is None:
        return None, None
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(isinstance(part, Tensor) for part in value):
        remedy = "Pass (down, up), with down = hidden @ A.T"
        fail(function, "low_rank", "be two tensors (down [..., r], up [V, r])", type(value).__name__, remedy, TypeError)
    return value[0], value[1]


class Taught(NamedTuple):
    """A teacher, flattened: tensors and their head, a sparse one, or a source's handle."""

    hidden: Tensor | None = None
    head: Head = Head()
    top: TopK | None = None
    source: int = 0


class Checks:
    """The checks of one call: `function` names it in messages, `lead` is hidden's leading shape."""

    def __init__(self, function: str, names: tuple[str, str, str], hidden: Any) -> None:
        self.function = function
        self.names = names  # what this function calls hidden, weight and bias
        self.hidden = self.tensor(names[0], hidden)
        if hidden.dtype not in FLOATING:
            self.fail(names[0], "be float32, bfloat16, float16 or float64", hidden.dtype, "Cast it", TypeError)
        if hidden.ndim == 0:
            self.fail(names[0], "have shape [..., H]", "a 0-d tensor", "Add the feature dimension")
        self.lead = hidden.shape[:-1]

    def fail(
        self, argument: str, relation: str, got: object, remedy: str, kind: type[Exception] = ValueError
    ) -> NoReturn:
        fail(self.function, argument, relation, got, remedy, kind)

    def tensor(self, argument: str, value: Any) -> Tensor:
        if not isinstance(value, Tensor):
            self.fail(argument, "be a tensor", type(value).__name__, "Pass a torch.Tensor", TypeError)
        if hasattr(value, "full_tensor"):  # a DTensor, told without importing torch.distributed
            remedy = f"Pass {argument}.to_local() where its rows are split as the model's are, else .full_tensor()"
            if argument in self.names[1:]:
                remedy = f'Pass {argument}.full_tensor(grad_placements=[Partial("avg")]) under data parallelism, whose '
                remedy += "gradients are means over processes, or use attach, which reads the head inside of forward"
            got = f"a {type(value).__name__} {list(getattr(value, 'placements', ()))}"
            self.fail(argument, "be a tensor of this process", got, remedy, TypeError)
        return value

    def constant(self, argument: str, value: Any, *, floating: bool = True) -> Tensor:
        """A tensor on hidden's device that no gradient flows to."""
        self.tensor(argument, value)
        if floating and not value.is_floating_point():
            self.fail(argument, "have a floating dtype", value.dtype, "Cast it with .float()", TypeError)
        if value.requires_grad:
            self.fail(
                argument,
                "not require grad (no gradient flows to it)",
                "requires_grad=True",
                f"Pass {argument}.detach(), or freeze the teacher with requires_grad_(False)",
            )
        if value.device != self.hidden.device:
            self.fail(argument, f"be on {self.names[0]}'s device {self.hidden.device}", value.device, "Move it there")
        return value

    def shape(self, argument: str, value: Tensor, want: tuple[int, ...], why: str) -> Tensor:
        if tuple(value.shape) != want:
            self.fail(argument, f"have shape {list(want)} ({why})", list(value.shape), "Reshape or slice it to match")
        return value

    def per_row(self, argument: str, value: Any, *, floating: bool) -> Tensor | None:
        """An argument that follows hidden's leading shape, flattened to [N]."""
        if value is None:
            return None
        self.constant(argument, value, floating=floating)
        if not floating and value.dtype != torch.int64:
            remedy = "Cast it with .long()"
            if value.is_floating_point():
                remedy = "Class probabilities as targets go in as teacher=TeacherLogits(probabilities.log())"
            self.fail(argument, "be int64", value.dtype, remedy, TypeError)
        return self.shape(argument, value, tuple(self.lead), f"{self.names[0]}'s leading shape").reshape(-1)

    def number(self, argument: str, value: Any, relation: str, holds: Callable[[float], bool]) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.fail(argument, relation, f"{type(value).__name__} {value!r}", "Pass a number", TypeError)
        if not (math.isfinite(value) and holds(value)):
            self.fail(argument, relation, value, "Pass a finite number in that range")
        return float(value)

    def positive_int(self, argument: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.fail(argument, "be an int of at least 1", repr(value), "Pass a positive int")
        return value

    def choice(self, argument: str, value: Any, options: tuple[str, ...]) -> str:
        if value not in options:
            self.fail(argument, f"be one of {', '.join(options)}", repr(value), "Pick one of these")
        return value

    def head(self, weight: Any, bias: Any, hidden: Tensor, names: tuple[str, str, str]) -> None:
        """[V, H] and [V] that fit hidden [..., H] in shape, dtype and device."""
        self.tensor(names[1], weight)
        if weight.ndim != 2:
            self.fail(
                names[1],
                "be 2-D [V, H]",
                list(weight.shape),
                "K-dimensional losses are not served: fold the extra class dimensions into rows",
            )
        if weight.shape[0] == 0:
            self.fail(names[1], "have at least one row (V >= 1)", list(weight.shape), "Pass the head [V, H]")
        if weight.shape[1] != hidden.shape[-1]:
            self.fail(
                names[1],
                f"have shape [V, {hidden.shape[-1]}] to fit {names[0]} {list(hidden.shape)}",
                list(weight.shape),
                f"Pass the head as [V, H], as nn.Linear keeps it, with the H of {names[0]}",
            )
        for name, value in ((names[1], weight), (names[2], bias)):
            if value is None:
                continue
            self.like(names[0], hidden, name, self.tensor(name, value))
        if bias is not None:
            self.shape(names[2], bias, (weight.shape[0],), f"V of {names[1]}")

    def low_rank(self, down: Any, up: Any, weight: Tensor) -> None:
        """[..., r] and [V, r] that fit hidden [..., H] and weight [V, H]."""
        if down is None:
            return
        if down.ndim == 0 or down.shape[-1] == 0:
            self.fail("low_rank's down", "have shape [..., r], r >= 1", list(down.shape), "Pass hidden @ A.T")
        self.shape("low_rank's down", down, (*self.lead, down.shape[-1]), f"{self.names[0]}'s leading shape, then r")
        self.shape("low_rank's up", up, (weight.shape[0], down.shape[-1]), f"V of {self.names[1]}, and down's r")
        self.like(self.names[0], self.hidden, "low_rank's down", down)
        self.like(self.names[0], self.hidden, "low_rank's up", up)

    def like(self, other: str, hidden: Tensor, name: str, value: Tensor) -> None:
        """In dtype and device."""
        if value.dtype != hidden.dtype:
            remedy = "Cast one of them, or run under torch.autocast"
            self.fail(name, f"have {other}'s dtype {hidden.dtype}", value.dtype, remedy, TypeError)
        if value.device != hidden.device:
            self.fail(name, f"be on {other}'s device {hidden.device}", value.device, "Move it there")

    def divergence(self, value: Any) -> Divergence:
        if isinstance(value, str):
            name = self.choice("divergence", value, tuple(TABLE))
            return Divergence(name, TABLE[name].default)
        if not isinstance(value, Divergence) or value.name not in TABLE:
            self.fail(
                "divergence",
                "be a name or what a function of dft_kernels.divergences returns",
                repr(value),
                f"Pass one of {', '.join(TABLE)}, or divergences.jensen_shannon(0.5)",
                TypeError,
            )
        entry = TABLE[value.name]
        if not entry.admits(value.parameter):
            remedy = f"Its default is {entry.default}; the limits are forward_kl and reverse_kl"
            self.fail(f"{value.name}'s {entry.parameter}", entry.domain, value.parameter, remedy)
        return value

    def backend(self, name: Any) -> str:
        self.choice("backend", name, ("auto", *backends.BACKENDS))
        reason = None if name == "auto" else backends.BACKENDS[name].unavailable(self.hidden.device, self.hidden.dtype)
        if reason is not None:
            where = f"be available for {self.hidden.dtype} on {self.hidden.device}"
            self.fail("backend", where, f"{name!r}: {reason}", 'Use backend="auto"')
        return name

    def features(self, value: Any, vocab: int) -> tuple[Tensor | None, Tensor | None, int]:
        """Dense [V, K], or the values and indices of a sparse one; and K."""
        if value is None:
            return None, None, 0
        self.constant("features", value)
        if value.ndim != 2 or value.shape[0] != vocab:
            self.fail("features", f"have shape [{vocab}, K]", list(value.shape), "Give one row for each vocabulary id")
        if value.layout == torch.strided:
            return value, None, value.shape[1]
        value = value.to_sparse_coo().coalesce()
        return value.values(), value.indices(), value.shape[1]

    def feature_weight(self, value: Any, features: int | None) -> Tensor | None:
        """[..., K] beside features [V, K], flattened to [N, K]."""
        if value is None:
            return None
        if features is None:
            self.fail("features", "be given with feature_weight", "None", "Pass the features [V, K] that it weighs")
        self.constant("feature_weight", value)
        why = f"{self.names[0]}'s leading shape, then features' K"
        return self.shape("feature_weight", value, (*self.lead, features), why).reshape(-1, features)

    def num_items(self, value: Any, reduction: str) -> Tensor | None:
        """What "mean" divides by instead, 0-d."""
        if value is None:
            return None
        if reduction != "mean":
            remedy = "Divide the result yourself, or use reduction='mean'"
            self.fail("num_items", "come with reduction='mean'", f"reduction={reduction!r}", remedy)
        if isinstance(value, Tensor):
            self.tensor("num_items", value)
            if value.ndim != 0 or value.requires_grad:
                self.fail("num_items", "be a number or a 0-d tensor without grad", list(value.shape), "Pass its sum")
            return value
        number = self.number("num_items", value, "be greater than 0", lambda x: x > 0)
        return torch.tensor(number, dtype=torch.float64)

    def teacher(self, teacher: Any, vocab: int, temperature: float, divergence: Divergence, labelled: bool) -> Taught:
        """A teacher, checked against the model's rows, its vocabulary and the rest of the call, and flattened.
        temperature: the teacher's."""
        if teacher is None:
            return Taught()
        if isinstance(teacher, Mixture):
            self._mixture(teacher, vocab, temperature, divergence, labelled)
            return Taught(source=teacher.handle)
        part = self._part(teacher, vocab, temperature, divergence)
        if isinstance(part, Source):
            return Taught(source=part.handle)
        return Taught(top=part) if isinstance(part, TopK) else Taught(part.hidden, part.head)

    def _part(self, teacher: Any, vocab: int, temperature: float, divergence: Divergence) -> Given | TopK | Source:
        if isinstance(teacher, LogitStream):
            self.positive_int("LogitStream prefetch", teacher.prefetch)
            if not callable(teacher.source) and not hasattr(teacher.source, "__iter__"):
                got = type(teacher.source).__name__
                remedy = "Pass an iterator of logits, or a function rows -> logits"
                self.fail("LogitStream source", "be an iterator or a callable", got, remedy, TypeError)
            return teacher
        if isinstance(teacher, TopK):
            return self._top_k(teacher, vocab, temperature, divergence)
        if isinstance(teacher, Tensor):
            teacher = TeacherLogits(teacher)
        if isinstance(teacher, TeacherLogits):
            logits = self.constant("teacher", teacher.logits)
            if logits.ndim and self._sliced("teacher", logits.shape[-1], teacher.vocab_size, vocab):
                logits = logits[..., :vocab]
            self.shape("teacher", logits, (*self.lead, vocab), f"{self.names[0]}'s leading shape and V")
            return Given(logits.reshape(-1, vocab), Head())
        if not isinstance(teacher, TeacherHead):
            self.fail(
                "teacher",
                "be a tensor of logits, TeacherLogits, TeacherHead, TopK, LogitStream or Mixture",
                type(teacher).__name__,
                "Wrap the teacher's hidden states and head as TeacherHead(hidden, weight)",
                TypeError,
            )
        hidden, weight, bias = autocast(teacher.hidden, teacher.weight, teacher.bias)
        names = ("teacher.hidden", "teacher.weight", "teacher.bias")
        for name, value in zip(names, (hidden, weight, bias), strict=True):
            if value is not None:
                self.constant(name, value)
        if hidden.ndim == 0:
            self.fail(names[0], "have shape [..., Ht]", "a 0-d tensor", "Pass the teacher's last hidden states")
        self.head(weight, bias, hidden, names)
        if self._sliced("teacher", weight.shape[0], teacher.vocab_size, vocab):
            weight, bias = weight[:vocab], None if bias is None else bias[:vocab]
        self.shape(names[0], hidden, (*self.lead, hidden.shape[-1]), f"{self.names[0]}'s leading shape, then Ht")
        scale = self.number("teacher.logit_scale", teacher.logit_scale, "be a number other than 0", lambda x: x != 0)
        softcap = teacher.softcap
        if softcap is not None:
            softcap = self.number("teacher.softcap", softcap, "be greater than 0 or None", lambda x: x > 0)
        return Given(hidden.reshape(-1, hidden.shape[-1]), Head(weight, bias, scale, softcap))

    def _top_k(self, top: TopK, vocab: int, temperature: float, divergence: Divergence) -> TopK:
        indices = self.constant("teacher.indices", top.indices, floating=False)
        if indices.dtype != torch.int64:
            self.fail("teacher.indices", "be int64", indices.dtype, "Cast it with .long()", TypeError)
        k = indices.shape[-1] if indices.ndim else 0
        if not 1 <= k <= vocab:
            remedy = "Pass token ids [..., k]"
            self.fail("teacher.indices", f"hold 1 to {vocab} ids a row (V)", list(indices.shape), remedy)
        self.shape("teacher.indices", indices, (*self.lead, k), f"{self.names[0]}'s leading shape, then k")
        log_probs = self.constant("teacher.log_probs", top.log_probs)
        self.shape("teacher.log_probs", log_probs, tuple(indices.shape), "one for each of teacher.indices")
        tail_log_prob = self.per_row("teacher.tail_log_prob", top.tail_log_prob, floating=True)
        self.choice("teacher.tail", top.tail, TAILS)
        captured = self.number("teacher.temperature", top.temperature, "be greater than 0", lambda x: x > 0)
        if top.tail != "renormalise" and captured != temperature:
            self.fail(
                "teacher_temperature",
                f"be {captured}, at which this TopK was captured (what its tail weighs at another is not known)",
                temperature,
                f'Pass teacher_temperature={captured}, capture at {temperature}, or use tail="renormalise"',
            )
        if top.tail == "renormalise" and not TABLE[divergence.name].finite_at_zero(divergence.parameter):
            self.fail(
                "divergence",
                'be finite where the target is 0 with tail="renormalise"',
                f"{divergence.name}, which is infinite there",
                'Use tail="bucket", or jensen_shannon',
            )
        tail = "ignore" if top.tail == "bucket" and k == vocab else top.tail  # there is nothing outside
        return TopK(indices.reshape(-1, k), log_probs.reshape(-1, k), tail_log_prob, captured, tail)

    def _mixture(
        self, mixture: Mixture, vocab: int, temperature: float, divergence: Divergence, labelled: bool
    ) -> None:
        linear = self.choice("Mixture kind", mixture.kind, ("linear", "log_linear")) == "linear"
        count = len(mixture.teachers)
        if count == 0 or len(mixture.weights) != count:
            got = f"{count} teachers, {len(mixture.weights)} weights"
            self.fail(
                "Mixture", "have one weight for each of its teachers, and one teacher at least", got, "Count them"
            )
        for weight in mixture.weights:
            if linear:
                self.number("Mixture weights", weight, "be greater than 0", lambda x: x > 0)
            else:
                self.number("Mixture weights", weight, "be a number other than 0", lambda x: x != 0)
        if linear and abs(math.fsum(mixture.weights) - 1.0) > 1e-6:
            total = math.fsum(mixture.weights)
            self.fail("Mixture weights", "sum to 1 in a linear mixture", total, "Divide them by their sum")
        parts: list[Given | TopK | Source | Labels] = []
        for teacher in mixture.teachers:
            if isinstance(teacher, Labels):
                if not (linear and labelled):
                    got = "no target" if linear else "a log-linear mixture, in which all else would be 0"
                    self.fail("Labels()", "come with target in a linear mixture", got, "Pass the labels as target")
                parts.append(teacher)
                continue
            if isinstance(teacher, TopK) and teacher.tail != "renormalise":
                relation = 'have tail="renormalise" in a mixture, which weighs single tokens (a bucket does not)'
                remedy = 'Use TopK alone with hard_weight for the label, a whole teacher, or tail="renormalise"'
                self.fail("TopK", relation, repr(teacher.tail), remedy)
            if isinstance(teacher, Mixture):
                remedy = "Multiply the weights out"
                self.fail("Mixture", "hold teachers that are not mixtures", "a Mixture", remedy, TypeError)
            parts.append(self._part(teacher, vocab, temperature, divergence))
        mixture.parts = parts

    def _sliced(self, argument: str, theirs: int, vocab_size: Any, ours: int) -> bool:
        """Whether the teacher's vocabulary is to be cut to the model's, as its vocab_size says."""
        if vocab_size is not None:
            self.positive_int(f"{argument}.vocab_size", vocab_size)
            if vocab_size != ours or vocab_size > theirs:
                relation = f"be the model's vocabulary of {ours}, and at most the teacher's of {theirs}"
                remedy = "A model whose own vocabulary is the padded one is sliced by its weight: weight[:vocab_size]"
                self.fail(f"{argument}.vocab_size", relation, vocab_size, remedy)
            return theirs > ours
        if theirs != ours:
            remedy = (
                f"If its first {ours} ids are the model's and the rest is padding, give the teacher vocab_size={ours}"
            )
            if theirs < ours:
                remedy = f"If the model's ids from {theirs} on are padding, slice its head: weight[:{theirs}]"
            self.fail(argument, f"have the model's vocabulary of {ours}", f"a vocabulary of {theirs}", remedy)
        return False
