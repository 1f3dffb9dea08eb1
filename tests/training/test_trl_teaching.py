"""A teacher and terms in TRL's SFTTrainer: the steps of DFTTrainer on the same batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import WORDS, far, word_tokenizer
from training_runs import top_k_store
from trl_runs import SETTINGS, Run, assert_equal, datasets, loaded, make, run, trl

from dft_kernels import DFTConfig, DFTTrainer, Mixture, TopK, capture
from dft_kernels.terms import TokenL2
from dft_kernels.training.trl import fuse

pytestmark = pytest.mark.filterwarnings("ignore")
LOSS = {"divergence": "reverse_kl", "soft_weight": 0.7, "hard_weight": 0.3, "temperature": 2.0}
SHARED = ("loss", "grad_norm", "entropy", "soft_loss", "hard_loss", "teacher_agreement", "train_loss", "eval_loss")


def teacher() -> Any:
    return far(hidden_size=24)


def ours(sft: Any, folder: Path, given: Any, terms: Any = None, **options: Any) -> Run:
    """DFTTrainer on the data of an SFTTrainer, from the same parameters."""
    trainer = DFTTrainer(
        loaded(folder / "model"), DFTConfig(str(folder), **{**SETTINGS, **LOSS, **options}), given,
        train_dataset=sft.train_dataset, eval_dataset=sft.eval_dataset, data_collator=sft.data_collator, terms=terms,
    )  # fmt: skip
    return run(trainer)


def assert_same_steps(sft: Run, dft: Run, names: tuple[str, ...] = SHARED) -> None:
    """Of the logs what both have; DFTTrainer's means are over tokens, TRL's over batches."""
    both = [[{k: line[k] for k in names if k in line} for line in one.logs] for one in (sft, dft)]
    assert {"loss", "grad_norm", "eval_loss"} <= {name for line in both[0] for name in line}
    assert_equal(Run(both[0], sft.change, sft.rounding), Run(both[1], dft.change, dft.rounding), 1e-4)


def function(model: Any) -> Callable[[dict[str, Any]], TopK]:
    """The eight likeliest tokens of every row, on either trainer's batch."""

    def top(inputs: dict[str, Any]) -> TopK:
        packed = {name: inputs[name] for name in ("attention_mask", "position_ids") if inputs.get(name) is not None}
        with torch.no_grad():
            log_p = (model(input_ids=inputs["input_ids"], **packed).logits / 2.0).log_softmax(-1)
        kept = log_p.topk(8)
        tail = log_p.scatter(-1, kept.indices, -torch.inf).logsumexp(-1)
        return TopK(kept.indices, kept.values, tail, temperature=2.0)

    return top


TEACHERS: dict[str, Callable[[], Any]] = {
    "model": teacher,
    "top k": lambda: function(teacher()),
    "mixture": lambda: Mixture([teacher(), far(hidden_size=8, head_dim=4)], [0.6, 0.4]),
}


@pytest.mark.kept(where=lambda given, data: (given, data) in (("model", "SFT completions"), ("top k", "SFT packed")))
@pytest.mark.parametrize(
    ("given", "data"),
    [
        ("model", "SFT"),
        ("model", "SFT completions"),
        ("model", "SFT packed"),
        ("top k", "SFT packed"),
        ("mixture", "SFT"),
    ],
)
def test_a_teacher(given: str, data: str, tmp_path: Path) -> None:
    """On whole texts, on completions alone, and on packed ones, where no token sees another text."""
    sft = fuse(make(data, tmp_path), TEACHERS[given](), **LOSS)
    equal = [
        name for name in SHARED if data == "SFT packed" or not name.startswith(("entropy", "soft", "hard", "teach"))
    ]
    taught = run(sft)
    assert_same_steps(taught, ours(sft, tmp_path, TEACHERS[given]()), tuple(equal))
    for line in taught.logs[:2]:
        assert 0 < line["soft_loss"] != line["hard_loss"] > 0


def test_terms(tmp_path: Path) -> None:
    """Running statistics of the first step pull in the second; with a teacher and without."""
    target = torch.softmax(torch.linspace(-3, 3, 100), 0)
    plain = run(make("SFT", tmp_path))
    for given in (None, teacher()):
        options = {} if given is None else LOSS
        sft = fuse(make("SFT", tmp_path), given, terms=50.0 * TokenL2(target), terms_decay=0.5, **options)
        taught, other = run(sft), ours(sft, tmp_path, given, 50.0 * TokenL2(target), terms_decay=0.5)
        assert_same_steps(taught, other, ("loss", "grad_norm", "eval_loss"))
        assert abs(taught.logs[1]["loss"] - plain.logs[1]["loss"]) > 0.01


def test_a_store(tmp_path: Path) -> None:
    """Its sequences by number, collated by it; its columns do not reach the model."""
    model, tokenizer = teacher(), word_tokenizer(["<pad>", "<s>", "</s>", "<unk>", *WORDS])
    sequences = [torch.randint(4, 94, (n,)) for n in (9, 5, 7, 8, 6, 9, 4, 8)]
    store = capture(model, tokenizer, sequences, tmp_path / "store", "hidden")
    settings = {"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    args = trl.SFTConfig(str(tmp_path), **{**SETTINGS, **settings})
    rows = datasets.Dataset.from_dict({"sequence": list(range(len(store)))})
    sft = trl.SFTTrainer(
        loaded(tmp_path / "model"), args=args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer,
        data_collator=lambda rows: store.batch([row["sequence"] for row in rows]),
    )  # fmt: skip
    taught = run(fuse(sft, store, **LOSS))
    assert_same_steps(taught, ours(sft, tmp_path, store), ("loss", "grad_norm", "eval_loss"))


def test_nothing_counts(tmp_path: Path) -> None:
    """A batch without a label: 0, with gradients of 0."""
    sft = fuse(make("SFT", tmp_path), teacher(), **LOSS)
    ids = torch.randint(4, 94, (2, 7))
    out = sft.model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    out.log_probs.sum().backward()
    assert float(out.loss) == 0.0
    assert all(float(parameter.grad.norm()) == 0.0 for parameter in sft.model.parameters())


WRONG: dict[str, tuple[str, dict[str, Any], Callable[[Path], dict[str, Any]]]] = {
    "trainer must be an SFTTrainer where there is a teacher or terms, got DPOTrainer": (
        "DPO", {}, lambda _: {"teacher": teacher()}),
    "loss_type must be 'nll' where there is a teacher or terms, got 'dft'": (
        "SFT", {"loss_type": "dft"}, lambda _: {"teacher": teacher()}),
    "label_smoothing_factor must be 0 where": (
        "SFT", {"label_smoothing_factor": 0.1}, lambda _: {"teacher": teacher()}),
    "teacher or terms must be given with hard_weight, got neither": ("SFT", {}, lambda _: {"hard_weight": 0.1}),
    "teacher must be a Store, a model, a function of the batch, or a Mixture": (
        "SFT", {}, lambda _: {"teacher": torch.zeros(2, 3)}),
    "divergence must be one of forward_kl": ("SFT", {}, lambda _: {"teacher": teacher(), "divergence": "kl"}),
    "reduction must be a keyword that it takes": ("SFT", {}, lambda _: {"teacher": teacher(), "reduction": "sum"}),
    "batches must have the store's rows": ("SFT", {}, lambda at: {"teacher": top_k_store(at / "kept")}),
    "teacher must have the model's vocabulary of 100, got a vocabulary of 120": (
        "SFT", {}, lambda _: {"teacher": far(vocab_size=120)}),
}  # fmt: skip


@pytest.mark.parametrize("message", list(WRONG))
def test_errors(message: str, tmp_path: Path) -> None:
    name, settings, given = WRONG[message]
    trainer = make(name, tmp_path, **settings)
    with pytest.raises((ValueError, TypeError), match=message):
        fuse(trainer, **given(tmp_path)).train()
