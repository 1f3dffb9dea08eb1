"""Context distillation: a teacher that reads a text of principles first, and a student that never sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny
from training_runs import config, curve, random_rows, teacher

from dft_kernels import Labels, Mixture
from dft_kernels.training.collators import PrinciplesCollator
from dft_kernels.training.trainer import DFTTrainer

pytestmark = pytest.mark.filterwarnings("ignore")  # Trainer's own
PRINCIPLES = [7, 40, 11, 33, 5]
ROWS = random_rows(9, 4, 12, 2)
ITEMS = [{"input_ids": row} for row in ROWS]
SIDES = ["right", "left"]


def distilled(model: Any, theirs: Any, rows: list[list[int]], principles: list[int], hard: float) -> Any:
    """The loss by hand: each sequence alone and unpadded, the teacher's logits with the principles' rows cut off."""
    soft = ce = 0.0
    for row in rows:
        ids = torch.tensor([row])
        with torch.no_grad():
            whole = theirs(input_ids=torch.tensor([principles + row])).logits
        log_p = whole[0, len(principles) :][:-1].log_softmax(-1)
        log_q = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        soft = soft + (log_p.exp() * (log_p - log_q)).sum()
        ce = ce + torch.nn.functional.nll_loss(log_q, ids[0, 1:], reduction="sum")
    return (soft + hard * ce) / sum(len(row) - 1 for row in rows)


def test_a_batch() -> None:
    items = [{"input_ids": [3, 4, 5], "labels": torch.tensor([-100, 4, 5])}, {"input_ids": torch.tensor([6, 7])}]
    right = PrinciplesCollator([8, 9], pad_token_id=1)(items)
    left = PrinciplesCollator([8, 9], pad_token_id=1, padding_side="left")(items)
    assert right["input_ids"].tolist() == [[3, 4, 5], [6, 7, 1]]
    assert left["input_ids"].tolist() == [[3, 4, 5], [1, 6, 7]]
    assert right["labels"].tolist() == [[-100, 4, 5], [-100, 7, -100]]
    assert left["labels"].tolist() == [[-100, 4, 5], [-100, -100, 7]]  # no pad predicts the first
    assert right["teacher_input_ids"].tolist() == [[8, 9, 3, 4, 5], [8, 9, 6, 7, 1]]
    assert left["teacher_input_ids"].tolist() == [[8, 9, 3, 4, 5], [1, 8, 9, 6, 7]]
    for batch, ids, mask in (
        (one, f"{who}input_ids", f"{who}attention_mask") for one in (right, left) for who in ("", "teacher_")
    ):
        assert torch.equal(batch[mask], (batch[ids] != 1).long())


def test_an_items_own_padding_is_left_out() -> None:
    padded = {"input_ids": [0, 0, 3, 4, 5], "attention_mask": [0, 0, 1, 1, 1], "labels": [-100, -100, 3, -100, 5]}
    bare = {"input_ids": [3, 4, 5], "labels": [3, -100, 5]}
    for side in SIDES:
        collate = PrinciplesCollator(PRINCIPLES, padding_side=side)
        one, other = collate([padded, ITEMS[0]]), collate([bare, ITEMS[0]])
        assert all(torch.equal(one[name], other[name]) for name in other)


def test_from_a_text() -> None:
    class Words:
        pad_token_id, padding_side = 2, "left"

        def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
            assert not add_special_tokens
            return {"input_ids": [len(word) for word in text.split()]}

    assert PrinciplesCollator.from_text("be brief and kind", Words()) == PrinciplesCollator([2, 5, 3, 4], 2, "left")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("side", SIDES)
def test_the_rows_that_line_up(kind: str, side: str, tmp_path: Path) -> None:
    """Loss and update of a step, against the formula; the student is given its own columns and no more."""
    theirs, lr = tiny(kind, num_hidden_layers=1).eval(), 0.1
    model, plain, given = tiny(), tiny(), []
    model.base_model.register_forward_pre_hook(lambda m, a, k: given.append(k), with_kwargs=True)
    loss = distilled(plain, theirs, ROWS, PRINCIPLES, 0.2)
    loss.backward()
    options = config(
        tmp_path, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2, optim="sgd",
        max_grad_norm=0.0, learning_rate=lr, hard_weight=0.2,
    )  # fmt: skip
    collate = PrinciplesCollator(PRINCIPLES, padding_side=side)
    trainer = DFTTrainer(model, options, theirs, train_dataset=ITEMS, data_collator=collate)
    given.clear()  # what attach ran to prove itself
    trainer.train()
    assert curve(trainer) == pytest.approx([float(loss.detach())], rel=1e-5)
    begun = dict(tiny().named_parameters())
    for name, p in model.named_parameters():
        want = -lr * dict(plain.named_parameters())[name].grad
        assert float(want.norm()) > 0
        torch.testing.assert_close(p.detach() - begun[name].detach(), want, rtol=1e-3, atol=1e-6)
    assert len(given) == 2
    assert all(call["input_ids"].shape[1] <= 12 and not any("teacher" in name for name in call) for call in given)


def losses(collate: Any, theirs: Any, tmp_path: Path, **changes: Any) -> list[float]:
    options = config(tmp_path, **changes)
    trainer = DFTTrainer(tiny(), options, theirs, train_dataset=ITEMS, data_collator=collate)
    trainer.train()
    return curve(trainer)


@pytest.mark.parametrize("side", SIDES)
def test_principles_of_nothing_are_plain_distillation(side: str, tmp_path: Path) -> None:
    collate = PrinciplesCollator([], padding_side=side)

    def plain(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {name: value for name, value in collate(items).items() if not name.startswith("teacher_")}

    expected = losses(plain, teacher(), tmp_path)
    assert losses(collate, teacher(), tmp_path) == pytest.approx(expected, rel=1e-5)
    prompted = PrinciplesCollator(PRINCIPLES, padding_side=side)
    assert losses(prompted, teacher(), tmp_path)[0] != pytest.approx(expected[0], rel=1e-3)


def test_a_function_and_a_mixture_find_them_in_the_batch(tmp_path: Path) -> None:
    collate, theirs = PrinciplesCollator(PRINCIPLES), teacher()

    def function(inputs: dict[str, Any]) -> Any:
        with torch.no_grad():
            whole = theirs(input_ids=inputs["teacher_input_ids"], attention_mask=inputs["teacher_attention_mask"])
        return whole.logits[:, len(PRINCIPLES) :]

    expected = losses(collate, teacher(), tmp_path)
    assert losses(collate, function, tmp_path) == pytest.approx(expected, rel=1e-5)
    mixture = Mixture([teacher(), function], [0.4, 0.6])
    assert losses(collate, mixture, tmp_path) == pytest.approx(expected, rel=1e-5)
    labels = Mixture([teacher(), Labels()], [0.8, 0.2])  # forward KL to it has the gradient of weights 0.8 and 0.2
    update = losses(collate, labels, tmp_path, soft_weight=1.0, hard_weight=0.0)
    assert len(update) == 4


def test_evaluation_is_the_students_alone(tmp_path: Path) -> None:
    plain = PrinciplesCollator([])
    found = [
        DFTTrainer(tiny(), config(tmp_path), teacher(), eval_dataset=ITEMS, data_collator=collate).evaluate()
        for collate in (plain, PrinciplesCollator(PRINCIPLES))
    ]
    assert found[0]["eval_loss"] == pytest.approx(found[1]["eval_loss"], rel=1e-6)


def test_mistakes(tmp_path: Path) -> None:
    cases = [
        (lambda: PrinciplesCollator("be kind"), "principles must be token ids, got a text"),
        (lambda: PrinciplesCollator([3, -1]), "principles must be ids of at least 0, got -1"),
        (lambda: PrinciplesCollator([3], padding_side="middle"), "padding_side must be right or left, got 'middle'"),
        (lambda: PrinciplesCollator([3])([{"text": "a"}]), "items must have input_ids .*got only text"),
        (lambda: PrinciplesCollator([3])([{"input_ids": []}]), r"of a token at least.*got input_ids \[0\]"),
        (
            lambda: PrinciplesCollator([3])([{"input_ids": [1, 2], "labels": [1]}]),
            r"got input_ids \[2\], labels \[1\]",
        ),
        (lambda: PrinciplesCollator([3])([{"input_ids": [1], "attention_mask": [0]}]), "does not hide, got none"),
        (
            lambda: PrinciplesCollator([3])([{"input_ids": [1, 2], "position_ids": [0, 0]}]),
            "items must be one sequence each, without position_ids",
        ),
    ]
    for call, message in cases:
        with pytest.raises((ValueError, TypeError), match=f"PrinciplesCollator: .*{message}|{message}"):
            call()
    long = PrinciplesCollator([5] * 60)
    message = r"fit into the teacher's 64 positions, got 60 of principles \+ (9|12) of the sequence = (69|72) tokens"
    with pytest.raises(ValueError, match=message):
        losses(long, teacher(), tmp_path)

    def shifted(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = PrinciplesCollator(PRINCIPLES)(items)
        return {**batch, "teacher_input_ids": batch["teacher_input_ids"].roll(1, 1)}

    with pytest.raises(ValueError, match="teacher_input_ids must end with the columns of input_ids"):
        losses(shifted, teacher(), tmp_path)
    wrapped = PrinciplesCollator(PRINCIPLES)
    with pytest.raises(ValueError, match="teacher must be a model, or a function of the batch"):
        losses(lambda items: wrapped(items), None, tmp_path)  # seen with the first batch
