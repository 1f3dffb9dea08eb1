"""`DFTTrainer`: an accumulated step is the formula over all its rows, whatever batches it is made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny
from training_runs import batch_of, config, curve, masked_out, packed, random_rows, teacher, unlabelled

import dft_kernels
from dft_kernels.store.reader import Store
from dft_kernels.training.trainer import DFTTrainer

pytestmark = pytest.mark.filterwarnings("ignore")  # Trainer's own


def test_accumulation_is_the_batch(store: Store, tmp_path: Path) -> None:
    weights = []
    for size, accumulation in ((4, 1), (1, 4)):
        options = config(
            tmp_path, max_steps=2, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
            optim="sgd", max_grad_norm=0.0,
        )  # fmt: skip
        model = tiny()
        DFTTrainer(model, options, store).train()
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
    begun = dict(tiny().named_parameters())
    for name, one in weights[0].items():
        assert not torch.equal(one, begun[name])
        torch.testing.assert_close(weights[1][name] - begun[name], one - begun[name], rtol=2e-3, atol=1e-6)


BATCHES = {
    "right": lambda: [batch_of(random_rows(3, 9), "right"), batch_of(random_rows(12, 2), "right")],
    "left": lambda: [batch_of(random_rows(3, 9), "left"), batch_of(random_rows(12, 2), "left")],
    "packed": lambda: [packed(3, 9, 2), packed(7)],
    "packed and labels": lambda: [packed(3, 9, 2, labelled=True), packed(7, labelled=True)],
    "no labels": lambda: [unlabelled(random_rows(3, 9), "right"), unlabelled(random_rows(12, 2), "left")],
    "masked out": lambda: [
        batch_of(random_rows(3, 9), "right"),
        masked_out(random_rows(4, 5)),
        batch_of(random_rows(12, 2), "right"),
    ],
}


@pytest.mark.parametrize("live", [False, True], ids=["function", "model"])
@pytest.mark.parametrize("name", BATCHES)
def test_an_accumulated_step_is_the_formula(name: str, live: bool, tmp_path: Path) -> None:
    """The update of one step of several batches: -lr times the gradient of the sum over all rows, over their number."""
    batches = BATCHES[name]()
    hard, lr = (0.0 if name == "no labels" else 0.3), 0.1
    model, theirs = tiny(), teacher()

    def logits(one: Any, inputs: dict[str, Any]) -> Any:
        more = {n: inputs[n] for n in ("attention_mask", "position_ids") if n in inputs}
        return one(input_ids=inputs["input_ids"], use_cache=False, **more).logits  # with a cache a pack is one text

    def function(inputs: dict[str, Any]) -> Any:
        with torch.no_grad():
            return logits(theirs, inputs)

    plain, total, items, sums = tiny(), 0.0, 0, torch.zeros(2)
    for batch in batches:
        shifted = batch.get("shift_labels")
        if shifted is None:
            labels = batch.get("labels", batch["input_ids"].masked_fill(batch.get("attention_mask") == 0, -100))
            shifted = dft_kernels.shift_labels(labels)
        valid = shifted != -100
        log_q, log_p = logits(plain, batch)[valid].log_softmax(-1), function(batch)[valid].log_softmax(-1)
        soft = (log_p.exp() * (log_p - log_q)).sum()
        ce = torch.nn.functional.nll_loss(log_q, shifted[valid], reduction="sum")
        total, items = total + 0.7 * soft + hard * ce, items + int(valid.sum())
        sums += torch.stack([soft, ce]).detach()
    (total / items).backward()
    options = config(
        tmp_path, max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=len(batches), optim="sgd",
        max_grad_norm=0.0, learning_rate=lr, soft_weight=0.7, hard_weight=hard,
    )  # fmt: skip
    collate: Callable[[Any], Any] = lambda items: items[0]  # noqa: E731
    trainer = DFTTrainer(model, options, teacher() if live else function, train_dataset=batches, data_collator=collate)
    trainer.train()
    assert curve(trainer) == pytest.approx([float(total.detach()) / items], rel=1e-4)
    assert curve(trainer, "soft_loss") == pytest.approx([float(sums[0]) / items], rel=1e-4)
    assert curve(trainer, "hard_loss") == pytest.approx([float(sums[1]) / items], rel=1e-4)
    begun = dict(tiny().named_parameters())
    for key, p in model.named_parameters():
        want = -lr * dict(plain.named_parameters())[key].grad
        assert float(want.norm()) > 0
        torch.testing.assert_close(p.detach() - begun[key].detach(), want, rtol=1e-3, atol=1e-6)


def test_a_step_of_nothing_but_masked_batches_changes_nothing(tmp_path: Path) -> None:
    batches = [masked_out(random_rows(3, 9)), masked_out(random_rows(4, 5))]
    model = tiny()
    options = config(tmp_path, max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=2, optim="sgd")
    trainer = DFTTrainer(model, options, teacher(), train_dataset=batches, data_collator=lambda items: items[0])
    trainer.train()
    assert curve(trainer) == [0.0]
    assert curve(trainer, "soft_loss") == []
    for one, other in zip(model.parameters(), tiny().parameters(), strict=True):
        assert torch.equal(one, other)


def test_steps_of_cross_entropy_need_labels(tmp_path: Path) -> None:
    batches = [unlabelled(random_rows(3, 9), "right")]
    options = config(tmp_path, max_steps=1, per_device_train_batch_size=1, matching_from=1)
    trainer = DFTTrainer(tiny(), options, teacher(), train_dataset=batches, data_collator=lambda items: items[0])
    with pytest.raises(ValueError, match="labels must be given in a step of cross-entropy, got None in step 1"):
        trainer.train()
