"""`DFTTrainer`: which steps match the teacher, by what weights, and teachers that are mixtures."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny
from training_runs import config, curve, teacher, top_k_store

import dft_kernels
from dft_kernels import Labels, Mixture, TopK
from dft_kernels.models.heads import hidden_states
from dft_kernels.store.reader import Store
from dft_kernels.testing import dense_loss
from dft_kernels.training.trainer import DFTTrainer

pytestmark = pytest.mark.filterwarnings("ignore")  # Trainer's own


def test_steps_of_matching_alternate(store: Store, tmp_path: Path) -> None:
    asked: list[int] = []

    def function(inputs: dict[str, Any]) -> Any:
        asked.append(trainer.state.global_step)
        return torch.zeros(*inputs["input_ids"].shape, 64)

    options = config(tmp_path, max_steps=8, matching_every=3, matching_from=1, gradient_accumulation_steps=2)
    trainer = DFTTrainer(tiny(), options, function, train_dataset=store, data_collator=store.collate)
    trainer.train()
    assert asked == [3, 3, 6, 6]
    logged = [entry["step"] - 1 for entry in trainer.state.log_history if "soft_loss" in entry]
    assert logged == [3, 6]


@pytest.mark.parametrize("every", [1, 2])
def test_matching_comes_in_by_a_ramp(store: Store, tmp_path: Path, every: int) -> None:
    """Weights step by step; the loss of each is that of its metrics under them, and plain cross-entropy before."""
    options = config(
        tmp_path, max_steps=8, matching_from=2, matching_ramp=4, matching_every=every, soft_weight=0.7, hard_weight=0.2
    )
    trainer = DFTTrainer(tiny(), options, store)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 8
    for step, entry in enumerate(logged):
        r = min(1.0, (step - 2 + 1) / 4)
        if step < 2 or (step - 2 + 1) % every:
            assert "soft_loss" not in entry
            assert entry["loss"] == pytest.approx(entry["hard_loss"], rel=1e-5)
        else:
            expected = 0.7 * r * entry["soft_loss"] + (0.2 * r + 1 - r) * entry["hard_loss"]
            assert entry["loss"] == pytest.approx(expected, rel=1e-5), step


def test_a_step_within_a_ramp_is_the_formula(store: Store, tmp_path: Path) -> None:
    options = config(tmp_path, max_steps=1, per_device_train_batch_size=8, matching_ramp=4, hard_weight=0.2)
    trainer = DFTTrainer(tiny(), options, store)
    trainer.train()
    model, batch = tiny(), store.batch(range(8))
    with torch.no_grad():
        hidden = hidden_states(model, batch["input_ids"], batch["attention_mask"])
        exact = dense_loss(
            hidden, model.get_output_embeddings().weight, dft_kernels.shift_labels(batch["labels"]),
            store.teacher(batch), soft_weight=0.25, hard_weight=0.2 * 0.25 + 0.75,
        )  # fmt: skip
    assert curve(trainer) == pytest.approx([float(exact)], rel=1e-3)


def test_resumed_within_a_ramp_it_is_the_same_curve(store: Store, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "matching_from": 1, "matching_ramp": 4}
    whole = DFTTrainer(tiny(), config(tmp_path, **options), store)
    whole.train()
    resumed = DFTTrainer(tiny(), config(tmp_path, **options), store)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert curve(resumed)[3:] == pytest.approx(curve(whole)[3:], rel=1e-6)
    assert len(curve(resumed)) == 6


@pytest.mark.parametrize("kind", ["linear", "log_linear"])
def test_a_mixture_is_the_formula(store: Store, tmp_path: Path, kind: str) -> None:
    """A store, a running model, a function and, where it can be, the label; the store gives the batches."""
    live, asked = tiny(num_hidden_layers=1), []

    def function(inputs: dict[str, Any]) -> Any:
        asked.append(inputs["sequence"])
        return inputs["input_ids"][..., None] * torch.linspace(-0.1, 0.1, 64)

    parts = [store, live, function, *([Labels()] if kind == "linear" else [])]
    weights = [0.4, 0.3, 0.2, 0.1] if kind == "linear" else [0.8, 0.5, -0.3]
    options = config(
        tmp_path, max_steps=1, per_device_train_batch_size=8, divergence="jensen_shannon", hard_weight=0.3,
        temperature=2.0, teacher_temperature=1.5,
    )  # fmt: skip
    trainer = DFTTrainer(tiny(), options, Mixture(parts, weights, kind))
    trainer.train()
    assert len(asked) == 1
    assert not any(p.requires_grad for p in live.parameters())
    model, batch = tiny(), store.batch(asked[0].tolist())
    labels, valid = dft_kernels.shift_labels(batch["labels"]), batch["labels"][:, 1:] != -100
    with torch.no_grad():
        given = store.teacher(batch, dtype=torch.float32)
        mask = batch["attention_mask"]
        z = [
            torch.nn.functional.linear(given.hidden, given.weight),
            tiny(num_hidden_layers=1).eval()(input_ids=batch["input_ids"], attention_mask=mask).logits,
            function(batch),
        ]
        p = [(one[:, :-1] / 1.5).softmax(-1).double() for one in z]
        if kind == "linear":
            p.append(torch.nn.functional.one_hot(batch["input_ids"][:, 1:], 64).double())
            p = sum(w * one for w, one in zip(weights, p, strict=True))
        else:
            p = sum(w * one.log() for w, one in zip(weights, p, strict=True)).softmax(-1)
        logits = model(input_ids=batch["input_ids"], attention_mask=mask).logits[:, :-1].double()
        q = (logits / 2.0).softmax(-1)
        m = (p + q) / 2
        soft = 0.5 * (torch.xlogy(p, p / m) + torch.xlogy(q, q / m)).sum(-1)[valid].mean()
        hard = torch.nn.functional.cross_entropy(logits[valid], labels[:, :-1][valid])
    (logged,) = [entry for entry in trainer.state.log_history if "soft_loss" in entry]
    assert logged["soft_loss"] == pytest.approx(float(soft), rel=1e-2)  # the store's product is bf16's
    assert logged["loss"] == pytest.approx(float(soft + 0.3 * hard), rel=1e-3)


def test_a_top_k_store_is_mixed_as_its_error_says(tmp_path: Path) -> None:
    sparse = top_k_store(tmp_path / "sparse")

    def function(batch: dict[str, Any]) -> TopK:
        return dataclasses.replace(sparse.teacher(batch), tail="renormalise")

    mixture = Mixture([function, teacher()], [0.5, 0.5])
    trainer = DFTTrainer(tiny(), config(tmp_path), mixture, train_dataset=sparse, data_collator=sparse.collate)
    trainer.train()
    assert len(curve(trainer, "soft_loss")) == 4
