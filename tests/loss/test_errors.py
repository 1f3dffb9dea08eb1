"""Every mistake of a call: one clear error, of one form, before any work."""

from __future__ import annotations

import re

import pytest
import torch

import dft_kernels as dk
from dft_kernels import TeacherHead, TeacherLogits, divergences
from dft_kernels.backends import BACKENDS
from dft_kernels.backends.reference import ReferenceBackend
from dft_kernels.loss.build import check_options
from dft_kernels.loss.options import Function

FORM = re.compile(r"^[\w.]+: .+ must .+, got .+\. .+\.$", re.S)
N, H, V = 6, 4, 9
H_ = torch.randn(N, H)
W = torch.randn(V, H)
T = torch.randint(0, V, (N,))
P = torch.randn(N, V)

CALLS = {  # what is given beside hidden, weight, target -> what the message must say
    "hidden_type": ({"hidden": [1.0]}, TypeError, "hidden must be a tensor, got list"),
    "hidden_dtype": ({"hidden": H_.long()}, TypeError, "hidden must be float32"),
    "hidden_0d": ({"hidden": torch.tensor(1.0)}, ValueError, r"hidden must have shape \[..., H\]"),
    "weight_2d": ({"weight": W[0]}, ValueError, r"weight must be 2-D \[V, H\], got \[4\]"),
    "weight_transposed": ({"weight": W.t()}, ValueError, r"must have shape \[V, 4\] to fit hidden \[6, 4\], got \[4, 9\]"),
    "weight_dtype": ({"weight": W.bfloat16()}, TypeError, "weight must have hidden's dtype torch.float32, got torch.bfloat16"),
    "weight_device": ({"weight": W.to("meta")}, ValueError, "weight must be on hidden's device cpu, got meta"),
    "weight_empty": ({"weight": W[:0]}, ValueError, "at least one row"),
    "bias_shape": ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \[9\]"),
    "low_rank_one": ({"low_rank": P}, TypeError, r"low_rank must be two tensors \(down \[\.\.\., r\], up \[V, r\]\), got Tensor"),
    "low_rank_rows": ({"low_rank": (H_[:3], W)}, ValueError, r"low_rank's down must have shape \[6, 4\].*got \[3, 4\]"),
    "low_rank_empty": ({"low_rank": (H_[:, :0], W[:, :0])}, ValueError, "r >= 1"),
    "low_rank_up": ({"low_rank": (H_, W.t())}, ValueError, r"low_rank's up must have shape \[9, 4\].*got \[4, 9\]"),
    "low_rank_dtype": ({"low_rank": (H_, W.bfloat16())}, TypeError, "low_rank's up must have hidden's dtype torch.float32"),
    "low_rank_device": ({"low_rank": (H_.to("meta"), W)}, ValueError, "low_rank's down must be on hidden's device cpu"),
    "target_teacher": ({"target": dk.TeacherHead(H_, W)}, TypeError, "got TeacherHead. Pass a .*; a teacher goes in as teacher="),
    "target_shape": ({"target": T[:3]}, ValueError, r"target must have shape \[6\] \(hidden's leading shape\), got \[3\]"),
    "target_dtype": ({"target": T.int()}, TypeError, "target must be int64, got torch.int32"),
    "target_probabilities": ({"target": P[:, 0]}, TypeError, "Class probabilities"),
    "target_range": ({"target": torch.tensor([0, 1, 9, 2, -100, 3])}, ValueError, r"labels in 0\.\.8 or -100 .*got 9 at row 2"),
    "target_negative": ({"target": torch.tensor([0, 1, 2, 2, -100, -3])}, ValueError, "got -3 at row 5"),
    "teacher_type": ({"teacher": "llama"}, TypeError, "teacher must be a tensor of logits, TeacherLogits, TeacherHead, TopK"),
    "teacher_vocabulary": ({"teacher": torch.randn(N, 12)}, ValueError, r"vocabulary of 9, got a vocabulary of 12.*vocab_size=9"),
    "teacher_rows": ({"teacher": P[:5]}, ValueError, r"teacher must have shape \[6, 9\]"),
    "teacher_grad": ({"teacher": P.clone().requires_grad_()}, ValueError, "not require grad"),
    "teacher_ints": ({"teacher": P.long()}, TypeError, "teacher must have a floating dtype"),
    "head_vocabulary": ({"teacher": TeacherHead(torch.randn(N, 3), torch.randn(12, 3))}, ValueError, "got a vocabulary of 12"),
    "head_hidden": ({"teacher": TeacherHead(torch.randn(N, 3), torch.randn(V, 2))}, ValueError, r"teacher.weight must have shape \[V, 3\]"),
    "head_rows": ({"teacher": TeacherHead(torch.randn(5, 3), torch.randn(V, 3))}, ValueError, r"teacher.hidden must have shape \[6, 3\]"),
    "head_grad": ({"teacher": TeacherHead(H_, W.clone().requires_grad_())}, ValueError, r"requires_grad_\(False\)"),
    "head_softcap": ({"teacher": TeacherHead(H_, W, softcap=-1.0)}, ValueError, "teacher.softcap must be greater than 0"),
    "divergence_name": ({"divergence": "kl"}, ValueError, "divergence must be one of forward_kl, .*got 'kl'"),
    "divergence_type": ({"divergence": divergences.forward_kl}, TypeError, "what a function of dft_kernels.divergences returns"),
    "beta": ({"divergence": divergences.jensen_shannon(1.5)}, ValueError, "jensen_shannon's beta must lie strictly between 0 and 1"),
    "alpha": ({"divergence": divergences.alpha_divergence(1.0)}, ValueError, "neither 0 nor 1"),
    "skew": ({"divergence": divergences.skew_kl(0.0)}, ValueError, "skew_kl's alpha must lie strictly"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature must be greater than 0, got 0.0"),
    "temperature_nan": ({"temperature": float("nan")}, ValueError, "temperature must be greater than 0, got nan"),
    "temperature_type": ({"temperature": "2"}, TypeError, "got str '2'"),
    "teacher_temperature": ({"teacher_temperature": -1}, ValueError, "teacher_temperature must be greater than 0"),
    "scaling": ({"temperature_scaling": "T2"}, ValueError, "temperature_scaling must be one of none, squared"),
    "smoothing": ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must lie in 0\.\.1"),
    "z_loss": ({"z_loss": -1.0}, ValueError, "z_loss must be at least 0"),
    "logit_scale": ({"logit_scale": 0}, ValueError, "logit_scale must be a number other than 0"),
    "softcap": ({"softcap": 0.0}, ValueError, "softcap must be greater than 0 or None"),
    "hard_without_target": ({"target": None, "teacher": P, "hard_weight": 0.5}, ValueError, "target must be given where"),
    "nothing": ({"target": None}, ValueError, "target or teacher must be given, got neither"),
    "potential": ({"potential": torch.zeros(2, V)}, ValueError, r"potential must have shape \[1, 9\]"),
    "group_missing": ({"potential": torch.zeros(2, V), "num_groups": 2}, ValueError, "group must be given with num_groups=2"),
    "group_range": ({"group": torch.full((N,), 5), "num_groups": 2}, ValueError, r"group must hold groups in 0\.\.1, got 5 at row 0"),
    "feature_weight_alone": ({"feature_weight": torch.ones(N, 2)}, ValueError, "features must be given with feature_weight, got None"),
    "feature_weight": ({"features": torch.ones(V, 2), "feature_weight": torch.ones(N, 3)}, ValueError, r"feature_weight must have shape \[6, 2\]"),
    "entropy_weight": ({"entropy_weight": torch.ones(3)}, ValueError, r"entropy_weight must have shape \[6\]"),
    "row_weight": ({"row_weight": torch.ones(3)}, ValueError, r"row_weight must have shape \[6\]"),
    "row_weight_grad": ({"row_weight": torch.ones(N).requires_grad_()}, ValueError, "row_weight must not require grad"),
    "ignore_index": ({"ignore_index": None}, TypeError, "ignore_index must be an int"),
    "reduction": ({"reduction": "avg"}, ValueError, "reduction must be one of mean, sum, none"),
    "num_items": ({"num_items": 0}, ValueError, "num_items must be greater than 0"),
    "num_items_sum": ({"num_items": 3, "reduction": "sum"}, ValueError, "num_items must come with reduction='mean'"),
    "chunk_size": ({"chunk_size": 0}, ValueError, "chunk_size must be an int of at least 1"),
    "budget": ({"memory_budget": 10}, ValueError, r"memory_budget must be at least \d+ bytes \(one row of 9 logits\), got 10"),
    "both_sizes": ({"memory_budget": 1 << 20, "chunk_size": 2}, ValueError, "chunk_size must be None where memory_budget"),
    "backend": ({"backend": "metal"}, ValueError, "backend must be one of auto, native, cuda, triton, reference"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_loss(name: str) -> None:
    options, error, text = CALLS[name]
    arguments = {"hidden": H_, "weight": W, "target": T, **options}
    with pytest.raises(error, match=text) as caught:
        dk.linear_distribution_loss(**arguments)
    assert FORM.match(str(caught.value)), str(caught.value)


def test_options_alone() -> None:
    """Of a call that is not made yet: a dtype that hidden states may have, a backend of a device that may come."""
    function = Function("later")
    check_options(function, {"logits_dtype": torch.bfloat16, "backend": "cuda"}, torch.zeros(1, 2))
    for wrong, text in (
        ({"logits_dtype": torch.int8}, "later: logits_dtype must be None"),
        ({"backend": "gpu"}, "later: backend must be one of auto"),
        ({"temperature": -1.0}, "later: temperature must be greater than 0"),
    ):
        with pytest.raises(ValueError, match=text):
            check_options(function, wrong, torch.zeros(1, 2))


def test_cross_entropy_names_its_own_arguments() -> None:
    with pytest.raises(ValueError, match=r"linear_cross_entropy: linear_weight must have shape"):
        dk.linear_cross_entropy(H_, W.t(), T)
    with pytest.raises(TypeError, match="linear_cross_entropy: target must be a tensor of labels, got NoneType"):
        dk.linear_cross_entropy(H_, W, None)
    with pytest.raises(ValueError, match="weight must come without label_smoothing"):
        dk.linear_cross_entropy(H_, W, T, weight=torch.ones(V), label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"weight must have shape \[9\]"):
        dk.cross_entropy(P, T, weight=torch.ones(3))
    with pytest.raises(ValueError, match="K-dimensional"):
        dk.linear_cross_entropy(H_, W[None], T)
    with pytest.raises(TypeError, match="Class probabilities"):
        dk.cross_entropy(P, P)
    with pytest.raises(TypeError, match="bias must be left out"):
        dk.distribution_loss(P, T, bias=torch.zeros(V))
    with pytest.raises(ValueError, match=r"features must have shape \[9, K\]"):
        dk.linear_distribution_statistics(H_, W, features=torch.ones(3, 2))
    with pytest.raises(TypeError, match="labels must be a tensor"):
        dk.shift_labels([1, 2])


def test_an_unavailable_backend_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(ReferenceBackend):
        def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
            return "it needs a GPU"

    monkeypatch.setitem(BACKENDS, "elsewhere", Elsewhere())
    with pytest.raises(
        ValueError, match=r"backend must be available for torch\.float32 on cpu, got 'elsewhere': it needs a GPU"
    ):
        dk.linear_distribution_loss(H_, W, T, backend="elsewhere")
    dk.linear_distribution_loss(H_, W, T, backend="auto")


def test_teacher_logits_as_tensor_and_wrapped_agree() -> None:
    assert torch.equal(
        dk.linear_distribution_loss(H_, W, T, P), dk.linear_distribution_loss(H_, W, T, TeacherLogits(P))
    )
